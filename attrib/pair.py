"""Two runs over the same batches: which of their examples stand where, and whether they can be compared.

A run and itself is a pair, too. What cannot be compared is refused by its first step.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from .errors import ReplayError
from .optim import check_adjoints
from .run import Run
from .side import NOTHING, Made, Side, Unrecorded, shares_of


class Aligned(NamedTuple):
    """The examples of a step of both runs, each once for every time that a batch held it. examples (U,): among those of the
    pair. at: of either run, where each stands in its batch, -1 where it is not. alike: whether the batches are one and the
    same, in order, drawn from the same random numbers."""

    examples: np.ndarray
    at: tuple[np.ndarray, np.ndarray]
    alike: bool

    def of(self, side: int, values: np.ndarray) -> np.ndarray:
        """(B,) of either run -> (U,), 0 where it has none."""
        at = self.at[side]
        return np.where(at >= 0, values[np.maximum(at, 0)], 0.0)

    def spread(self, side: int, values: np.ndarray) -> np.ndarray:
        """(Q, B, K) of either run -> (Q, U, K)."""
        at = self.at[side]
        return values[:, np.maximum(at, 0)] * (at >= 0)[:, None]

    @property
    def wider(self) -> int | None:
        """The run whose batch holds all of them; None for neither."""
        return next((n for n, at in enumerate(self.at) if (at >= 0).all()), None)


@dataclass(frozen=True)
class Pair:
    """base, changed: the runs. labels (E,): ids of all examples of either. steps: how many they share."""

    base: Side
    changed: Side
    labels: np.ndarray
    steps: int

    @property
    def sides(self) -> tuple[Side, Side]:
        return self.base, self.changed

    @property
    def itself(self) -> bool:
        """Whether it is one run."""
        return self.base is self.changed

    def within(self, slices: int) -> "Pair":
        """The same by passes over slices of so many bytes."""
        base = self.base.within(slices)
        return replace(self, base=base, changed=base if self.itself else self.changed.within(slices))

    def aligned(self, made: tuple[Made, Made]) -> Aligned:
        """Raises ReplayError where the batches are not those of the same training."""
        a, b = made
        if self.itself:
            each = np.arange(len(a.slots))
            return Aligned(a.slots, (each, each), True)
        keys = [_keys(m.slots) for m in made]
        together = np.union1d(*keys)
        at = _found(together, keys[0]), _found(together, keys[1])
        examples = together // max(1, _TIMES)
        found = Aligned(examples, at, self._alike(a, b))
        common = int(((at[0] >= 0) & (at[1] >= 0)).sum())
        if found.wider is None and 2 * common < min(len(a.slots), len(b.slots)):
            raise ReplayError(
                f"the runs were not trained on the same batches: got {common} common examples of {len(a.slots)} and "
                f"{len(b.slots)}, expected one batch to hold the other, at step {a.recorded.number} of the base and "
                f"{b.recorded.number} of the changed run. Train both in the same order, with the same ids."
            )
        self._check_inputs(made, found)
        return found

    def _alike(self, a: Made, b: Made) -> bool:
        passes = list(zip(a.recorded.passes, b.recorded.passes, strict=False))
        return (
            len(a.recorded.passes) == len(b.recorded.passes)
            and np.array_equal(a.slots, b.slots)
            and all(p.size == q.size and _same(p.random, q.random) for p, q in passes)
        )

    def _check_inputs(self, made: tuple[Made, Made], aligned: Aligned) -> None:
        """The same id, the same inputs."""
        both = (aligned.at[0] >= 0) & (aligned.at[1] >= 0)
        rows = []
        for side, m, at in zip(self.sides, made, aligned.at, strict=True):
            batches = side.inputs(m.recorded)
            leaves = [[b.data[n] for b in batches] for n in range(len(batches[0].data))]
            try:
                whole = [torch.cat(parts)[torch.from_numpy(at[both])] for parts in leaves]
            except RuntimeError:  # passes padded to lengths of their own
                return
            rows.append(whole)
        for x, y in zip(*rows, strict=False):
            if x.shape == y.shape and not torch.equal(x, y):
                differs = (x != y).reshape(len(x), -1).any(1)
                example = self.labels[aligned.examples[both][int(differs.nonzero()[0])]]
                raise ReplayError(
                    f"the runs were not trained on the same inputs: got other ones for example {example!r}, expected those "
                    f"of the base, at step {made[0].recorded.number}. Augment with the same random numbers, or give what "
                    f"is another input an id of its own."
                )


_TIMES = 1 << 20  # that one example may stand in a batch, more than any


def _keys(slots: np.ndarray) -> np.ndarray:
    """(B,): the example and how many times it came before in the batch, as one number."""
    order = np.argsort(slots, kind="stable")
    ranked = slots[order]
    first = np.searchsorted(ranked, ranked)
    keys = np.empty(len(slots), np.int64)
    keys[order] = ranked * _TIMES + np.arange(len(slots)) - first
    return keys


def _found(together: np.ndarray, keys: np.ndarray) -> np.ndarray:
    at = np.full(len(together), -1)
    at[np.searchsorted(together, keys)] = np.arange(len(keys))
    return at


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and torch.equal(a, b))


def check_pair(base: Run, changed: Run) -> None:
    """Raise ReplayError where two runs cannot be compared."""
    for what, one, other in (
        ("parameters", base.layout, changed.layout),
        ("type", base.dtype, changed.dtype),
        ("optimizer", base.rules.described(), changed.rules.described()),
        ("definition of a share", base.definition, changed.definition),
    ):
        if one != other:
            raise ReplayError(
                f"the runs cannot be compared: got another {what}, {_short(other)}, expected that of the base, "
                f"{_short(one)}, at {changed.reader.target}. Train the changed run as the base was."
            )


def _short(value: Any) -> str:
    text = value["optimizer"] if isinstance(value, dict) else str(value)
    return text if len(text) < 80 else text[:77] + "..."


def paired(runs: tuple[Run, Run], model: nn.Module, loss: Callable[..., Tensor], member: np.ndarray) -> Pair:
    """Of the steps that both have. member: (K, G), which tensors make a group.

    Raises:
        ReplayError: they cannot be compared. LossError: there is no loss.
    """
    base, changed = runs
    check_adjoints(base.rules)
    check_pair(base, changed)
    for run in runs:
        check_known(run)
    labels, places = labels_of(base, changed)
    firsts = max(0, origin(changed) - origin(base)), max(0, origin(base) - origin(changed))
    sides = []
    for run, first, at in zip(runs, firsts, places, strict=True):
        sides.append(Side(run, shares_of(run, model, loss, member), first, at))
    steps = min(run.steps - first for run, first in zip(runs, firsts, strict=True))
    if steps < 1:
        raise ReplayError(
            f"the runs have no steps in common: got {base.steps} and {changed.steps} steps, which begin {firsts[0]} steps "
            f"apart, expected some. Compare a replay with the run that it was made of."
        )
    return Pair(sides[0], sides[1], labels, steps)


def alone(
    run: Run, model: nn.Module, loss: Callable[..., Tensor], member: np.ndarray, unrecorded: Unrecorded = NOTHING
) -> Pair:
    """A run and itself. unrecorded: what the record does not have of its loop.

    Raises:
        ReplayError: an optimizer without an adjoint, or what neither the record nor `unrecorded` holds. LossError: there is
            no loss.
    """
    check_adjoints(run.rules)
    check_known(run)
    check_penalty(run, unrecorded.penalty)
    places = {int(number): n for n, number in enumerate(run.numbers)}
    side = Side(run, shares_of(run, model, loss, member), 0, places, unrecorded)
    if (ambiguity := side.clipping.ambiguity) is not None:
        raise ReplayError(
            f"it cannot be told whether gradients were clipped: got {ambiguity}, expected to be told, at "
            f"{run.reader.target}. Pass clip=, the max_norm that clip_grad_norm_ was given, or clip=math.inf where nothing "
            f"was clipped."
        )
    return Pair(side, side, run.examples, run.steps)


def check_penalty(run: Run, penalty: Any) -> None:
    """Raise ReplayError where a run has a penalty and none is passed, or the other way round."""
    recorded = "penalty" in run.reader
    if recorded and penalty is None:
        raise ReplayError(
            f"the derivative of this training is not known: got a run with a penalty, of which the record has the gradient "
            f"and not the curvature, expected to be told, at {run.reader.target}. Pass penalty=, the function that "
            f"attrib.record was given."
        )
    if penalty is not None and not (recorded and callable(penalty)):
        what = "a run that was recorded without one" if not recorded else f"{penalty!r}"
        raise ReplayError(
            f"there is no such penalty: got penalty= and {what}, expected a function of the model, as given to "
            f"attrib.record, at {run.reader.target}. Leave it out, or declare it when recording."
        )


def check_known(run: Run) -> None:
    """Raise ReplayError where the loop did to gradients what the record does not explain."""
    if run.declares_remainder:
        raise ReplayError(
            f"what the loop did to gradients cannot be differentiated: got a run that was recorded with "
            f'remainder="account", at {run.reader.target}, expected gradients that are the examples\'. What is declared '
            f"there may be clipping by value or a mask, which depend on the gradients in a way that is not recorded, "
            f"as well as noise, which does not. Train without it, or ask what happened: attrib.attribute."
        )


def origin(run: Run) -> int:
    """The step that it begins with, of the run that was recorded first: of a replay, and of a replay of a replay."""
    return int(run.replayed.get("origin", run.replayed.get("start", 0)))


def labels_of(base: Run, changed: Run) -> tuple[np.ndarray, list[dict[int, int]]]:
    """The ids of both, those that are numbers in order, and of either run where its numbers stand among them."""
    if base.examples.dtype != object and changed.examples.dtype != object:
        labels = np.union1d(base.examples, changed.examples)
    else:
        labels = np.array(list(dict.fromkeys([*base.examples.tolist(), *changed.examples.tolist()])), dtype=object)
    at = {label: n for n, label in enumerate(labels.tolist())}
    places = [
        {int(number): at[label] for number, label in zip(run.numbers, run.examples.tolist(), strict=True)}
        for run in (base, changed)
    ]
    return labels, places
