"""What the shares of a step are multiplied with: U, in whichever form the products cost least."""

from collections.abc import Mapping

from torch import Tensor

from ..kernels.factors import LowRank, Outer
from .terms import Term, contract


class Directions:
    """What is found out about U with the first slice of a batch serves the others.

    Args:
        exact, rounded: parameter -> U (Q, *parameter), in float64 and in the type of the shares. examples: that U is
            multiplied with, in all.
    """

    def __init__(self, exact: Mapping[str, Tensor], rounded: Mapping[str, Tensor], examples: int) -> None:
        self._exact, self._rounded, self._examples = exact, rounded, examples
        self._low_rank: dict[str, LowRank | None] = {}

    def contract(self, term: Term) -> Tensor:
        """(Q, B) float64."""
        if term.along is None and isinstance(term.factor, Outer):
            low_rank = self._in_pairs(term.name, term.factor)
            if low_rank is not None:
                return term.factor.contract(low_rank)
        return contract(term, self._rounded[term.name])

    def _in_pairs(self, name: str, factor: Outer) -> LowRank | None:
        if name not in self._low_rank:
            self._low_rank[name] = factor.low_rank(self._exact[name], self._examples / max(1, factor.examples))
        return self._low_rank[name]
