"""What consecutive steps add to an account: sums that can be added up in pieces, wherever the pieces were made.

    total(pieces) = piece + piece + ...        in the order of a sweep, the last steps first

An array with a step axis holds the steps of its piece alone, one with an example axis the examples of its batches: a piece
is as small as what it is about, and their sum has room for all.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import numpy as np

from .marginals import Axes

Slots = tuple[np.ndarray, np.ndarray]  # of a step: ids (B,) and contributions (Q, B, G)


@dataclass(frozen=True)
class Tally:
    """The steps of `steps` together; Q queries, n steps, G groups, E examples.

    examples: (E,) ids, each once. marginals: kept axes -> (Q, *axes). rows: name -> (Q, n, G), what is no example's. states:
    name -> (Q, n + 1), at every state. sums: name -> (Q,). gaps: identity -> (n,), NaN where it was not checked. failures:
    identity -> a sentence. slots: of each step the contributions one by one, where they are wanted.
    coupled: whether a batch was met whose losses depend on each other.
    """

    steps: range
    examples: np.ndarray
    marginals: dict[Axes, np.ndarray]
    rows: dict[str, np.ndarray] = field(default_factory=dict)
    states: dict[str, np.ndarray] = field(default_factory=dict)
    sums: dict[str, np.ndarray] = field(default_factory=dict)
    gaps: dict[str, np.ndarray] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    slots: tuple[Slots, ...] = ()
    coupled: bool = False

    def __add__(self, other: "Tally") -> "Tally":
        """Of neighbouring steps."""
        first, last = sorted((self, other), key=lambda tally: tally.steps.start)
        if first.steps.stop != last.steps.start:
            raise ValueError(f"the steps are no neighbours: got {first.steps} and {last.steps}.")
        steps = range(first.steps.start, last.steps.stop)
        whole = total([last, first], steps, np.union1d(first.examples, last.examples))
        assert whole is not None
        return whole

    def since(self, step: int) -> "Tally":
        """Without the steps before `step`, of which nothing was added."""
        skipped = step - self.steps.start
        return replace(
            self,
            steps=range(step, self.steps.stop),
            marginals={axes: a[:, skipped:] if "step" in axes else a for axes, a in self.marginals.items()},
            rows={name: a[:, skipped:] for name, a in self.rows.items()},
            states={name: a[:, skipped:] for name, a in self.states.items()},
            gaps={name: a[skipped:] for name, a in self.gaps.items()},
        )


def total(pieces: Iterable[Tally], steps: range, examples: np.ndarray) -> Tally | None:
    """The sum of neighbouring pieces, the last steps first, with room for `steps` and the ids `examples` (E,), in order.
    None of no pieces.

    Pieces may end before the first of the steps: see `since`.
    """
    whole: Tally | None = None
    slots: list[Slots] = []
    known: np.ndarray | None = None
    at: slice | np.ndarray = slice(None)
    coupled = False
    for piece in pieces:
        whole = whole or _room(piece, steps, examples)
        if known is None or not np.array_equal(known, piece.examples):
            known = piece.examples
            at = slice(None) if np.array_equal(known, examples) else np.searchsorted(examples, known)
        _add(whole, piece, at)
        slots[:0] = piece.slots
        coupled = coupled or piece.coupled
    return None if whole is None else replace(whole, slots=tuple(slots), coupled=coupled)


def _room(like: Tally, steps: range, examples: np.ndarray) -> Tally:
    """Zeros for so many steps and examples; what is not checked is NaN."""
    length = {"step": len(steps), "example": len(examples)}

    def zeros(axes: Axes, values: np.ndarray) -> np.ndarray:
        shape = zip(axes, values.shape[1:], strict=True)
        return np.zeros((len(values), *(length.get(axis, size) for axis, size in shape)))

    return Tally(
        steps,
        examples,
        {axes: zeros(axes, values) for axes, values in like.marginals.items()},
        {name: zeros(("step", "group"), values) for name, values in like.rows.items()},
        {name: np.full((len(values), len(steps) + 1), np.nan) for name, values in like.states.items()},
        {name: np.zeros(len(values)) for name, values in like.sums.items()},
        {name: np.full(len(steps), np.nan) for name in like.gaps},
        {},
    )


def _add(whole: Tally, piece: Tally, examples: slice | np.ndarray) -> None:
    """Into the arrays of `whole`; `examples`: where those of the piece stand."""
    at = slice(piece.steps.start - whole.steps.start, piece.steps.stop - whole.steps.start)
    for axes, values in piece.marginals.items():
        target = whole.marginals[axes][:, at] if "step" in axes else whole.marginals[axes]
        if "example" in axes:
            target[(slice(None),) * axes.index("example") + (slice(None), examples)] += values
        else:
            target += values
    for name, values in piece.rows.items():
        whole.rows[name][:, at] = values
    for name, values in piece.states.items():
        whole.states[name][:, at.start : at.stop + 1] = values
    for name, sums in piece.sums.items():
        whole.sums[name][...] += sums
    for name, gaps in piece.gaps.items():
        whole.gaps[name][at] = gaps
    for name, sentence in piece.failures.items():
        whole.failures.setdefault(name, sentence)
