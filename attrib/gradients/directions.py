"""Directions: U of a step by parameter, in whichever form its products with the shares cost least."""

from collections.abc import Mapping

import torch
from torch import Tensor

from ..kernels.factors import Factor, LowRank, Outer


class Directions:
    """What is found out about U with the first slice of a batch serves the others.

    Args:
        exact: parameter -> U (Q, *parameter). dtype: of the shares. examples: that U is multiplied with, in all.
    """

    def __init__(self, exact: Mapping[str, Tensor], dtype: torch.dtype, examples: int) -> None:
        self._exact = exact
        self.named = {name: u.to(dtype) for name, u in exact.items()}
        self._examples = examples
        self._low_rank: dict[str, LowRank | None] = {}

    def contract(self, name: str, factor: Factor) -> Tensor:
        """<U_q, g_i> of a parameter whose gradients, or a term of them, are a factor: (Q, B) float64."""
        if not isinstance(factor, Outer):
            return factor.contract(self.named[name])
        if name not in self._low_rank:
            self._low_rank[name] = factor.low_rank(self._exact[name], self._examples / max(1, factor.examples))
        found = self._low_rank[name]
        return factor.contract(self.named[name] if found is None else found)
