"""A matrix met at n positions of each example: g_i = sum_t left[i, t] right[i, t]^T."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..contraction import nonzero_rows
from . import base
from .lowrank import LowRank, low_rank

ROWS = 1024  # of a matrix product: fewer, and packing its other side is felt


class Outer(NamedTuple):
    """left (B, n, o), right (B, n, i): a weight (o, i), whatever shape its last dimensions have."""

    left: Tensor
    right: Tensor

    @property
    def examples(self) -> int:
        return len(self.left)

    @property
    def entries(self) -> int:
        return self.left.shape[2] * self.right.shape[2]

    def contract(self, directions: Tensor | LowRank) -> Tensor:
        count, positions = self.left.shape[:2]
        alive = _alive(self.left)
        if isinstance(directions, LowRank):
            return _by_pairs(self, directions, alive)
        directions = directions.flatten(2)
        reached = count * positions if alive is None else len(alive)
        queries, outputs, inputs = directions.shape
        if base.products_are_cheaper(queries, reached, count, outputs, inputs):
            return _by_products(self, directions, alive)
        return base.by_rows(directions, lambda some: Outer(self.left[some], self.right[some]).rows(), count)

    def low_rank(self, directions: Tensor, slices: float) -> LowRank | None:
        """U (Q, *weight) float64 in pairs, where these cost less for so many factors of this size. None where they do not,
        on an accelerator, which would have to be waited for, and where products are made to more digits."""
        if self.left.device.type != "cpu" or self.left.dtype != torch.float32 or len(directions) == 1:
            return None
        directions, alive = directions.flatten(2), _alive(self.left)
        reached = self.examples * self.left.shape[1] if alive is None else len(alive)
        instead = min(base.multiplications(len(directions), reached, self.examples, *directions.shape[1:]))
        count = self.examples if alive is None else reached  # products that are summed first are those of all positions
        return low_rank(directions, slices * reached, slices * count, slices * instead)

    def rows(self) -> Tensor:
        return torch.bmm(self.left.transpose(1, 2), self.right).flatten(1)

    def total(self) -> Tensor:
        return (self.left.flatten(0, 1).T @ self.right.flatten(0, 1)).flatten()

    def weighted(self, weights: Tensor) -> "Outer":
        return self._replace(left=base.times(self.left, weights))

    def tensors(self) -> dict[str, Tensor]:
        return {"left": self.left, "right": self.right}

    def constants(self) -> dict[str, Any]:
        return {}

    @classmethod
    def restored(cls, read: Callable[[str], Tensor], constants: Mapping[str, Any]) -> "Outer":
        return cls(read("left"), read("right"))


def _alive(left: Tensor) -> Tensor | None:
    """The positions (m,) that a gradient reached, None for all: of those that were masked, padded or never read there is
    nothing to multiply. On an accelerator it would have to be waited for; of few, looking costs as much."""
    if left.device.type != "cpu" or left.shape[1] == 1 or left.numel() < base.COMPILED:
        return None
    alive = nonzero_rows(left.flatten(0, 1).numpy())
    return None if alive.all() else torch.from_numpy(alive.nonzero()[0])


def _by_products(factor: Outer, directions: Tensor, alive: Tensor | None) -> Tensor:
    """left^T U right at every position, multiplied from the side that leaves the narrower tensors."""
    left, right = factor.left.flatten(0, 1), factor.right.flatten(0, 1)
    if alive is not None:
        left, right = left[alive], right[alive]
    if directions.shape[2] > directions.shape[1]:
        left, right, directions = right, left, directions.transpose(1, 2)
    return _summed(_bilinear(left, directions, right), factor, alive)


def _by_pairs(factor: Outer, directions: LowRank, alive: Tensor | None) -> Tensor:
    if alive is None:
        return directions.contract(factor.left, factor.right)
    left, right = (t.flatten(0, 1)[alive].unsqueeze(1) for t in (factor.left, factor.right))
    return _summed(directions.contract(left, right), factor, alive)


def _summed(out: Tensor, factor: Outer, alive: Tensor | None) -> Tensor:
    """(Q, m) of the positions -> (Q, B)."""
    count, positions = factor.left.shape[:2]
    if alive is None:
        return out.view(len(out), count, positions).sum(2)
    return out.new_zeros(len(out), count).index_add_(1, alive // positions, out)


def _bilinear(left: Tensor, directions: Tensor, right: Tensor) -> Tensor:
    """(m, o), (Q, o, i), (m, i) -> left^T U_q right, (Q, m) float64."""
    if len(directions) == 1:
        return base.dots(left @ directions[0], right)[None]
    queries, _, inputs = directions.shape
    out = left.new_empty(len(left), queries)
    if not len(left):  # no gradient reached any position
        return out.T.double()
    few = max(1, base.SLICE_BYTES // (left.element_size() * inputs * ROWS))
    for q in base.slices(queries, few):  # a tile of ROWS x (few queries x inputs) stays in the cache
        side = directions[q].transpose(0, 1).flatten(1)
        for p in base.slices(len(left), -(-len(left) // -(-len(left) // ROWS))):
            products = (left[p] @ side).view(-1, side.shape[1] // inputs, inputs)
            out[p, q] = torch.bmm(products, right[p].unsqueeze(2)).squeeze(2)
    return out.T.double()
