"""Gradients written out: (B, *weight), whatever made them."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from . import base


class Dense(NamedTuple):
    """values (B, *weight)."""

    values: Tensor

    @property
    def examples(self) -> int:
        return len(self.values)

    @property
    def entries(self) -> int:
        return self.values[0].numel()

    def contract(self, directions: Tensor) -> Tensor:
        return base.flat_rows(directions).double() @ base.flat_rows(self.values).double().T

    def rows(self) -> Tensor:
        return base.flat_rows(self.values)

    def total(self) -> Tensor:
        return self.values.sum(0).flatten()

    def weighted(self, weights: Tensor) -> "Dense":
        return Dense(base.times(self.values, weights))

    def tensors(self) -> dict[str, Tensor]:
        return {"values": self.values}

    def constants(self) -> dict[str, Any]:
        return {}

    @classmethod
    def restored(cls, read: Callable[[str], Tensor], constants: Mapping[str, Any]) -> "Dense":
        return cls(read("values"))
