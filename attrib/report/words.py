"""What the page says of itself: which of the three questions it answers and which not, and what its parts are called.

Names in braces are filled in where the page is made; `initial`, `final` and `change` of a query, by the page itself.
"""

from typing import Any, NamedTuple

from ..result import Difference, Influence, Labelled


class Words(NamedTuple):
    """title, answer: per query. asked, silent: what the page answers, and what it does not. term: of one example. ledger,
    examples: heads of sections. raised, lowered: of the tables. rest: of all others, their number before it. timeline: what
    its bars are; change: the title of their axis. trace: its line. layers: what the bars of groups are. token: of the
    shades of tokens, where each is a query. signs: of what positive is, and more that is needed to read the page."""

    title: str
    answer: str
    asked: str
    silent: str
    term: str
    ledger: str
    examples: str
    raised: str
    lowered: str
    rest: str
    timeline: str
    change: str
    trace: str
    layers: str
    token: str
    signs: tuple[str, ...]


_ACCOUNT = Words(
    title="Why is {measurement} {final}?",
    answer="In {steps}, {measurement} went from {initial} to {final}.",
    asked="This page answers what each example contributed to the change that happened: accounting.",
    silent="It does not answer what the model would have done without an example: a contribution is no counterfactual.",
    term="contribution",
    ledger="The ledger",
    examples="From which train examples",
    raised="Raised the measurement most",
    lowered="Lowered it most",
    rest="together",
    timeline="Bars: what each group's updates changed. Line: the measurement itself.",
    change="change",
    trace="{measurement}",
    layers="Contributions of the gradients that the window's batches supplied, of weight decay, and of a remainder where "
    "there is one.",
    token="change from the start of the training to its end",
    signs=(
        "A positive contribution raised the measurement. Units are the measurement's.",
        "The timeline stands on the step that moved the parameters, tables and bars on the step whose batch supplied the "
        "gradient; with momentum the two differ.",
    ),
)

_SENSITIVITY = "sensitivity, times that at the end"

_INFLUENCE = Words(
    title="What if an example weighed less? {measurement} {final}",
    answer="After {steps}, {measurement} is {final}.",
    asked="This page answers what would change if an example weighed a little less: influence, the derivative of the final "
    "{measurement} by the weight of each example's loss.",
    silent="It does not answer what each example contributed to what happened, and its numbers add up to nothing; of a "
    "change that is not small it is a prediction.",
    term="influence",
    ledger="What is differentiated",
    examples="By the weight of which train examples",
    raised="Weighing more, they raise the measurement most",
    lowered="Weighing more, they lower it most",
    rest="if all weighed more alike",
    timeline="Bars: the derivative by the weight of all examples of a step, through each group. Line: how large the "
    "sensitivity of the measurement to the parameters is at that step, times that at the end.",
    change="influence",
    trace=_SENSITIVITY,
    layers="Influence of all examples of the window's batches, through the gradients of each group.",
    token="log-probability at the end",
    signs=(
        "A positive influence: weighing more, the example raises the measurement; weighing less, or left out, it lowers "
        "it, to first order. Units: the measurement's per unit of weight, 1 of which each example has.",
        "A sum over steps is the derivative by a weight at these steps; one over examples, by a weight that all of them "
        "share.",
        "Where the sensitivity grows a thousandfold on its way back, no derivative predicts.",
    ),
)

_DIFFERENCE = Words(
    title="Why do these two runs differ? {measurement} {initial}, {final}",
    answer="After {steps}, {measurement} is {initial} by the base, and {final} by the changed run: {change}.",
    asked="This page answers why these two runs differ, exactly: a difference, the ledger of a change that was run. By "
    "{via}: {meaning}.",
    silent="It does not answer what each example contributed to what happened in either run, nor what another change would "
    "do.",
    term="contribution",
    ledger="The ledger",
    examples="By which train examples",
    raised="Raised the measurement most",
    lowered="Lowered it most",
    rest="together",
    timeline="Bars: all that separates the runs and was done at a step, through each group. Line: how large the sensitivity "
    "of the measurement to the parameters is at that step, times that at the end.",
    change="change",
    trace=_SENSITIVITY,
    layers="What was done otherwise at the steps of the window, by examples and by what is no example's.",
    token="change from the base to the changed run",
    signs=(
        "A positive term: by it the changed run is above the base. Units are the measurement's.",
        "By cause, an example has what was done to it and what followed from that; by reaction, every example has what it "
        "did otherwise, those that were left out no longer.",
        "reduction: those that remain weigh more in a mean over fewer. context: they draw other random numbers, or meet "
        "others in their batch.",
        "Where the runs come apart, terms are far larger than what they sum to: little can be read from each, and the "
        "residual is their rounding.",
    ),
)

TOKENS = "tokens"  # what attrib.measure.tokens calls itself
_MEASURED = {TOKENS: "the log-probability of the token"}  # where the name alone says too little in a sentence
_OF: dict[str, Words] = {"accounting": _ACCOUNT, Influence.question: _INFLUENCE, Difference.question: _DIFFERENCE}


def words_of(result: Labelled) -> Words:
    """Those of a result, with what is the same for all of its queries filled in."""
    steps, measurement = result.dataset.sizes["step"], str(result.dataset.attrs.get("measurement", "measurement"))
    known = {
        "measurement": _MEASURED.get(measurement, measurement),
        "steps": f"{steps} step{'' if steps == 1 else 's'}",
        "via": str(result.dataset.attrs.get("via", "")),
        "meaning": str(result.dataset.attrs.get("meaning", "")).partition(": ")[2],
    }
    words = _OF[result.question]
    filled: dict[str, Any] = {n: _filled(v, known) for n, v in words._asdict().items() if isinstance(v, str)}
    return words._replace(**filled)


def _filled(text: str, known: dict[str, str]) -> str:
    for name, value in known.items():
        text = text.replace(f"{{{name}}}", value)
    return text
