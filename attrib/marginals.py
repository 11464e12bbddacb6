"""Sums of the contribution cube (query, step, example, group) over some of its axes, accumulated step by step.

The cube itself is seldom made: a run of 2000 full-batch steps over 4000 examples and 6 groups has 48 million entries a
query. What is kept is chosen beforehand; whatever can be summed from a kept array need not be kept itself.
"""

from collections.abc import Iterable, Sequence
from math import prod

import numpy as np

from .errors import KeptAxesError

AXES = ("step", "example", "group")
KEPT_BYTES = 64 << 20  # an array that the default keeps is not larger than this

Axes = tuple[str, ...]


def order(axes: Iterable[str]) -> Axes:
    """Axes in the order of AXES; KeptAxesError for an unknown or repeated one."""
    chosen = list(axes)
    unknown = [a for a in chosen if a not in AXES]
    if unknown or len(set(chosen)) != len(chosen):
        raise KeptAxesError(f"unknown axes: got {chosen}, expected some of {', '.join(AXES)}, each once.")
    return tuple(a for a in AXES if a in chosen)


def choose(keep: Sequence[str] | Sequence[Sequence[str]] | None, queries: int, sizes: dict[str, int]) -> list[Axes]:
    """Which marginals to keep: those asked for, or by default all that fit and are not sums of a larger one.

    keep: one set of axes ("step", "example") or several; None for the default.
    """
    if keep is not None:
        keep = [keep] if isinstance(keep, str) else keep
        several = [keep] if keep and all(isinstance(k, str) for k in keep) else keep
        wanted = {order(axes) for axes in several}  # type: ignore[arg-type]
    else:
        wanted = {("example",), ("step", "group")}
        for axes in (("step", "example"), ("example", "group"), AXES):
            if bytes_of([axes], queries, sizes) <= KEPT_BYTES:
                wanted.add(axes)
    return sorted((a for a in wanted if not any(set(a) < set(b) for b in wanted)), key=lambda a: (len(a), a))


def bytes_of(kept: Sequence[Axes], queries: int, sizes: dict[str, int]) -> int:
    """What the arrays take, in float64."""
    return sum(8 * queries * prod(sizes[a] for a in axes) for axes in kept)


class Marginals:
    """Accumulates contributions into arrays (Q, *axes), float64.

    Args:
        kept: sets of axes. queries: Q. sizes: length of each axis.
    """

    def __init__(self, kept: list[Axes], queries: int, sizes: dict[str, int]) -> None:
        self.arrays = {axes: np.zeros((queries, *(sizes[a] for a in axes))) for axes in kept}

    def add(self, step: int, examples: "Places", contributions: np.ndarray) -> None:
        """Contributions (Q, B, G) of one step and where its examples stand on their axis."""
        for axes, out in self.arrays.items():
            values = contributions if "group" in axes else contributions.sum(-1)
            target = out[:, step] if "step" in axes else out
            if "example" in axes:
                examples.add(target, values)
            else:
                target += values.sum(1)


class Places:
    """Positions on the example axis of the ids of a batch, (B,), given all ids in order, (N,)."""

    def __init__(self, known: np.ndarray, ids: np.ndarray) -> None:
        self.ids = ids
        self._at = np.searchsorted(known, ids)
        self._repeated = len(np.unique(ids)) < len(ids)

    def add(self, target: np.ndarray, values: np.ndarray) -> None:
        """target (Q, N, ...) += values (Q, B, ...); repeated ids add up."""
        if self._repeated:
            for q in range(len(values)):
                np.add.at(target[q], self._at, values[q])
        else:
            target[:, self._at] += values
