"""What a change that was run did to examples, beside what a result says of them: "dropped for real".

The result is an account or an influence of the base run of a difference, by the same measurement at its last state.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from ..ledger import said, terms_of
from ..result import Difference, Influence, Labelled, Result

ROWS = 200  # examples in the page, a query
CLOSE = 1e-4  # relatively, that one measurement at one state may differ by the types it was computed in
SAME = ("measurement", "model", "parameters", "optimizer", "recorded")  # attributes of a run and a measurement


class Beside(NamedTuple):
    """Of a query. number: of the examples that something was done to. ids, terms (n,): of the largest terms among them.
    contributions: what the result says of each, None where it does not know it. totals: name, of the result, of the
    difference; the last is the net change. title, sentences: what to read from it."""

    title: str
    number: int
    ids: list[Any]
    terms: np.ndarray
    contributions: list[float | None]
    totals: list[tuple[str, float | None, float]]
    sentences: list[str]


def matched(result: Labelled, difference: Any) -> Difference:
    """The difference, its queries those of the result.

    Raises:
        ValueError: it is none, or not of that run, or of another measurement.
    """
    if not isinstance(difference, Difference) or isinstance(result, Difference):
        raise ValueError(
            f"a difference stands beside an account or an influence: got {type(difference).__name__} beside "
            f"{type(result).__name__}, expected a result of attrib.difference beside one of attrib.attribute or "
            f"attrib.influence."
        )
    ours, theirs = result.dataset.attrs, difference.dataset.attrs
    for name in SAME:
        if ours.get(name) != theirs.get(name):
            raise ValueError(
                f"the difference is not of this run and measurement: got another {_SAID.get(name, name)}, "
                f"{theirs.get(name)!r}, expected {ours.get(name)!r}. Ask for attrib.difference with the run of the result "
                f"as its base, and with the same measurement."
            )
    numbers = difference.dataset["query"].values.tolist()
    lacking = [q for q in result.dataset["query"].values.tolist() if q not in numbers]
    if lacking:
        raise ValueError(
            f"the difference lacks queries: got {_few(numbers)}, expected {_few(lacking)} among them. Ask for "
            f"attrib.difference of these, or show fewer: result.select([...])."
        )
    chosen = difference.select([numbers.index(q) for q in result.dataset["query"].values.tolist()])
    _check_ends(result, chosen)
    return chosen


_SAID = {"recorded": "run, recorded at"}


def _few(numbers: list[Any]) -> str:
    return ", ".join(map(str, numbers[:8])) + ", ..." * (len(numbers) > 8)


def _check_ends(result: Labelled, difference: Difference) -> None:
    """The measurement after the last step of the base is what the result explains."""
    final = result.dataset["final"].values
    gap = np.abs(difference.base.values - final)
    wrong = ~(gap <= CLOSE * np.maximum(1.0, np.abs(final)))
    if wrong.any() or difference.names != result.names:
        q = int(wrong.argmax())
        raise ValueError(
            f"the difference is not of what this result explains: got {float(difference.base[q]):.6g} by the base, for "
            f"{difference.names[q]!r}, expected {final[q]:.6g}, for {result.names[q]!r}. Compare up to the state at which "
            f"the result ends, with the same queries."
        )


def beside(result: Labelled, difference: Difference) -> list[Beside]:
    """Of each query, from a matched difference.

    Raises:
        ValueError: it says of all examples how they reacted, and not to what was done to which.
    """
    terms, labels = difference.by("example"), difference.dataset["example"].values
    touched = _touched(difference, terms.values)
    each, known = result.by("example"), {e: n for n, e in enumerate(result.dataset["example"].values.tolist())}
    found = []
    for q, values in enumerate(terms.values):
        order = touched[np.argsort(-np.abs(values[touched]), kind="stable")]
        ids = labels[order].tolist()
        mine = [float(each.values[q, known[e]]) if e in known else None for e in ids]
        together = sum(v for v in mine if v is not None), float(values[order].sum())
        totals = _totals(difference.select([q]), len(ids), together)
        sentences = _sentences(result.select([q]), difference.select([q]), [e for e in ids if e in known], totals)
        title = "Dropped for real" if _kinds(difference) == {"Drop"} else "Changed for real"
        found.append(Beside(title, len(ids), ids[:ROWS], values[order[:ROWS]], mine[:ROWS], totals, sentences))
    return found


def _touched(difference: Difference, terms: np.ndarray) -> np.ndarray:
    """(n,) positions of the examples that something was done to."""
    if difference.dataset.attrs["via"] == "cause":
        return np.flatnonzero((terms != 0).any(0))
    said = {i for each in difference.dataset.attrs.get("interventions") or [] for i in _examples(each)}
    found = np.flatnonzero([str(e) in said for e in difference.dataset["example"].values.tolist()])
    if not len(found):
        raise ValueError(
            'the difference does not say to which examples something was done: got one by via="reaction" of a run that is '
            'no replay with Drop or Reweight, expected via="cause". Ask for attrib.difference so.'
        )
    return found


def _examples(intervention: Mapping[str, Any]) -> list[str]:
    return [str(i) for i in intervention.get("examples") or intervention.get("weights") or ()]


def _totals(one: Difference, count: int, together: tuple[float, float]) -> list[tuple[str, float | None, float]]:
    terms = one.ledger().terms.isel(query=0)
    these = f"these {count} examples" if count != 1 else "this example"
    rest = float(terms["examples"]) - together[1]
    others = [("all other examples", None, rest)] if one.dataset.attrs["via"] == "reaction" else []
    rows = [(said(name), None, float(terms[name])) for name in (*terms_of(one.dataset), "residual")]
    return [(these, *together), *others, *rows, ("net change", None, float(one.change[0]))]


def _sentences(
    one: Labelled, difference: Difference, ids: list[Any], totals: list[tuple[str, float | None, float]]
) -> list[str]:
    (these, mine, done), measured = totals[0], str(difference.dataset.attrs.get("measurement", "the measurement"))
    units = f" {difference.units}" if difference.units else ""
    found = [f"In the changed run: {changes_of(difference)}."] if changes_of(difference) else []
    if isinstance(one, Result):
        found.append(
            f"{these.capitalize()} contributed {_signed(mine or 0.0)}{units} to what happened in the base run."
        )
    elif isinstance(one, Influence) and _dropped(difference):
        foretold = float(one.predict([ids])[0, 0] - one.final[0])
        found.append(f"To first order, leaving out {these} was to change {measured} by {_signed(foretold)}{units}.")
    base, changed, change = (float(v[0]) for v in (difference.base, difference.changed, difference.change))
    what = "what was done to them and what followed from that"
    if difference.dataset.attrs["via"] == "reaction":
        what = f"what they did otherwise, {_signed(totals[1][2])} is how all other examples reacted"
    found.append(
        f"Really {measured} ended at {_minus(f'{changed:.4g}')}{units} instead of {_minus(f'{base:.4g}')}: "
        f"{_signed(change)}, of which {_signed(done)} is {what}."
    )
    return found


def _dropped(difference: Difference) -> bool:
    """Whether examples were left out of the whole training, and nothing else was done."""
    attrs = difference.dataset.attrs
    whole = all(each.get("steps") is None for each in attrs.get("interventions") or ())
    return _kinds(difference) == {"Drop"} and whole and list(attrs.get("first", ())) == [0, 0]


def _kinds(difference: Difference) -> set[str]:
    return {str(each.get("kind")) for each in difference.dataset.attrs.get("interventions") or ()}


def _signed(value: float) -> str:
    return _minus(f"{value:+.4g}")


def _minus(text: str) -> str:
    return text.replace("-", "\N{MINUS SIGN}")


def changes_of(difference: Difference) -> str:
    """What was done in the changed run, in words; empty where the result does not say."""
    done = difference.dataset.attrs.get("interventions")
    if done is None:
        return ""
    return ", ".join(map(_change, done)) or "a training of its own"


def _change(intervention: Mapping[str, Any]) -> str:
    kind, count, steps = str(intervention.get("kind")), len(_examples(intervention)), intervention.get("steps")
    what = {"Drop": "left out", "Reweight": "weighed otherwise"}.get(kind)
    text = kind if what is None else f"{count} example{'' if count == 1 else 's'} {what}"
    if steps is None:
        return text
    first, stop = steps
    return f"{text} from step {first or 0}{'' if stop is None else f' to {stop - 1}'}"
