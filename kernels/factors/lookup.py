"""Rows of a table, looked up at several positions: g_i = sum_t values[i, t] at row at[i, t]."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import base


class Lookup(NamedTuple):
    """at (B, n) int64, values (B, n, d): a weight (height, d)."""

    at: Tensor
    values: Tensor
    height: int

    @property
    def examples(self) -> int:
        return len(self.values)

    @property
    def entries(self) -> int:
        return self.height * self.values.shape[2]

    def contract(self, directions: Tensor) -> Tensor:
        """Positions that look up the same row are multiplied together."""
        size, flat = self.at.shape, self.at.flatten()
        values = self.values.flatten(0, 1)
        if len(directions) == 1:
            return base.dots(directions[0][flat], values).view(1, *size).sum(2)
        order = flat.argsort(stable=True)
        looked_up, lengths = torch.unique_consecutive(flat[order], return_counts=True)
        pieces = values[order].split(lengths.tolist())
        products = [piece @ directions[:, row].T for row, piece in zip(looked_up.tolist(), pieces, strict=True)]
        out = torch.empty(len(flat), len(directions), dtype=torch.float64, device=values.device)
        out[order] = torch.cat(products).double()
        return out.view(*size, -1).sum(1).T

    def rows(self) -> Tensor:
        index = self.at.unsqueeze(-1).expand_as(self.values)
        out = self.values.new_zeros(self.examples, self.height, self.values.shape[-1])
        return out.scatter_add_(1, index, self.values).flatten(1)

    def total(self) -> Tensor:
        values = self.values.flatten(0, 1)
        return values.new_zeros(self.height, values.shape[-1]).index_add_(0, self.at.flatten(), values).flatten()

    def weighted(self, weights: Tensor) -> "Lookup":
        return self._replace(values=base.times(self.values, weights))

    def tensors(self) -> dict[str, Tensor]:
        return {"index": self.at, "rows": self.values}

    def constants(self) -> dict[str, Any]:
        return {"height": self.height}

    @classmethod
    def restored(cls, read: Callable[[str], Tensor], constants: Mapping[str, Any]) -> "Lookup":
        return cls(read("index"), read("rows"), constants["height"])
