"""The passes that the gradients of some steps were made of: see `schema`, array `passes`."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from .schema import PASS_FACTS


class Pass(NamedTuple):
    """One of them. slots: of the step; kind, shared: where its inputs stand; scale: NaN where it is to be fitted;
    factor_scale: of stored factors."""

    slots: slice
    kind: int
    shared: int
    scale: float
    factor_scale: float


@dataclass(frozen=True)
class Passes:
    """values (n, M, fact): of n steps of at most M passes."""

    values: np.ndarray

    def numbers(self, name: str) -> np.ndarray:
        """(n, M); where a step had fewer passes, 0."""
        return self.values[..., PASS_FACTS.index(name)]

    def of_step(self, n: int) -> Iterator[Pass]:
        """Those of the n-th step."""
        first = 0
        for size, kind, shared, scale, factor_scale in self.values[n].tolist():
            if size:
                yield Pass(slice(first, first + int(size)), int(kind), int(shared), scale, factor_scale)
                first += int(size)

    def of_slots(self, name: str, width: int) -> np.ndarray:
        """(n, width): of every slot the number of its pass, NaN beyond the last."""
        slots, found = np.arange(width), np.full((len(self.values), width), np.nan)
        ends = np.cumsum(self.numbers("size"), 1)
        for m in reversed(range(ends.shape[1])):
            np.copyto(found, self.numbers(name)[:, m : m + 1], where=slots < ends[:, m : m + 1])
        return found
