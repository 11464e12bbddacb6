"""A kernel met under every position of its input: the outer products of patches, which are cut out only for many queries."""

from collections.abc import Callable, Mapping
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..convolution import Geometry, convolve, patches
from . import base


class Convolution(NamedTuple):
    """inputs (B, k, C, *space), delta (B, k, O, *positions), k images of an example: a weight (O, C / groups, *kernel)."""

    inputs: Tensor
    delta: Tensor
    geometry: Geometry

    @property
    def examples(self) -> int:
        return len(self.inputs)

    @property
    def entries(self) -> int:
        outputs, inputs = self.delta.shape[2], self.inputs.shape[2] // self.geometry.groups
        return outputs * inputs * prod(self.geometry.kernel)

    def contract(self, directions: Tensor) -> Tensor:
        count, images = self.delta.shape[:2]
        queries, outputs = directions.shape[:2]
        positions = self.delta[0, :, 0].numel()
        if not base.products_are_cheaper(queries, positions * count, count, outputs, directions[0, 0].numel()):
            return base.by_rows(directions, self._rows, count)
        x, d = self.inputs.flatten(0, 1), self.delta.flatten(0, 1).flatten(1)
        products = [base.dots(convolve(x, u, self.geometry).flatten(1), d) for u in directions]
        return torch.stack(products).view(queries, count, images).sum(2)

    def rows(self) -> Tensor:
        count, groups = self.examples, self.geometry.groups
        left = self.delta.flatten(3).movedim(2, 3).reshape(count, -1, groups, self.delta.shape[2] // groups)
        right = patches(self.inputs.flatten(0, 1), self.geometry).reshape(count, left.shape[1], groups, -1)
        return torch.einsum("bngo,bngi->bgoi", left, right).flatten(1)

    def total(self) -> Tensor:
        together = self.inputs.flatten(0, 1)[None], self.delta.flatten(0, 1)[None]  # as the images of one example
        return Convolution(*together, self.geometry).rows()[0]

    def weighted(self, weights: Tensor) -> "Convolution":
        return self._replace(delta=base.times(self.delta, weights))

    def tensors(self) -> dict[str, Tensor]:
        return {"inputs": self.inputs, "delta": self.delta}

    def constants(self) -> dict[str, Any]:
        return {"geometry": list(self.geometry)}

    @classmethod
    def restored(cls, read: Callable[[str], Tensor], constants: Mapping[str, Any]) -> "Convolution":
        kernel, stride, padding, dilation, groups = constants["geometry"]
        sides = tuple((before, after) for before, after in padding)
        geometry = Geometry(tuple(kernel), tuple(stride), sides, tuple(dilation), groups)
        return cls(read("inputs"), read("delta"), geometry)

    def _rows(self, some: slice) -> Tensor:
        return Convolution(self.inputs[some], self.delta[some], self.geometry).rows()
