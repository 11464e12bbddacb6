"""Sums of the contribution cube (query, step, example, group) over some of its axes, accumulated step by step.

The cube itself is seldom made: a run of 2000 full-batch steps over 4000 examples and 6 groups has 48 million entries a
query. What is kept is chosen beforehand; whatever can be summed from a kept array need not be kept itself.
"""

from collections.abc import Iterable, Sequence
from math import prod
from typing import Any

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
        one = bool(keep) and all(isinstance(k, str) for k in keep)
        several: Iterable[Any] = [keep] if one else keep
        wanted = {order(axes) for axes in several}
    else:
        wanted = {("example",), ("step", "group")}
        for axes in (("step", "example"), ("example", "group"), AXES):
            if bytes_of([axes], queries, sizes) <= KEPT_BYTES:
                wanted.add(axes)
    return sorted((a for a in wanted if not any(set(a) < set(b) for b in wanted)), key=lambda a: (len(a), a))


def bytes_of(kept: Sequence[Axes], queries: int, sizes: dict[str, int]) -> int:
    """What the arrays take, in float64."""
    return sum(8 * queries * prod(sizes[a] for a in axes) for axes in kept)


class Slots:
    """The ids of a step's slots, (B,), and the examples among them, each once."""

    def __init__(self, ids: np.ndarray) -> None:
        self.ids = self.examples = ids
        self._slot_of: np.ndarray | None = None
        examples, at = np.unique(ids, return_inverse=True)
        if len(examples) < len(ids):
            self.examples, self._slot_of = examples, at

    def sums(self, kept: Sequence[Axes], contributions: np.ndarray) -> dict[Axes, np.ndarray]:
        """(Q, B, G) of one step -> of each set of axes the sums along them, (Q, *axes), the step axis of length one."""
        each = self._by_example(contributions) if any("example" in axes for axes in kept) else contributions
        found = {}
        for axes in kept:
            values = each if "group" in axes else each.sum(-1)
            values = values if "example" in axes else values.sum(1)
            found[axes] = values[:, None] if "step" in axes else values
        return found

    def _by_example(self, contributions: np.ndarray) -> np.ndarray:
        if self._slot_of is None:
            return contributions
        out = np.zeros((len(contributions), len(self.examples), contributions.shape[-1]))
        for q, values in enumerate(contributions):
            np.add.at(out[q], self._slot_of, values)
        return out
