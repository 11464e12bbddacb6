"""What a factor is, and what several kinds need to multiply with it.

A factor is a named tuple of tensors (B, ...) and constants, so that torch's pytrees see through it. Which way a contraction
goes is a matter of cost: through every position, or through the gradients, made a few at a time.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from ..contraction import COMPILED, row_dots

SLICE_BYTES = 4 << 20  # what a contraction holds at once, to stay in the cache
TRAFFIC = 12  # multiplications that fit into the time of writing a number and reading it back, in the cache


class Factor(Protocol):
    """The gradients g_i of a weight for B examples."""

    @property
    def examples(self) -> int:
        """B."""

    @property
    def entries(self) -> int:
        """Of the weight."""

    def contract(self, directions: Tensor) -> Tensor:
        """U (Q, *weight) -> <U_q, g_i>, (Q, B) float64."""

    def rows(self) -> Tensor:
        """The gradient of each example, (B, entries)."""

    def total(self) -> Tensor:
        """The sum over the examples, (entries,)."""

    def weighted(self, weights: Tensor) -> Self:
        """Each example's gradient times its weight, (B,)."""

    def tensors(self) -> dict[str, Tensor]:
        """By the names that they have in the store, (B, ...) each; the last is of the gradient's type."""

    def constants(self) -> dict[str, Any]:
        """The rest, as JSON."""

    @classmethod
    def restored(cls, read: Callable[[str], Tensor], constants: Mapping[str, Any]) -> Self:
        """Again from what `tensors` and `constants` gave; read: the name of a tensor -> the tensor."""


def multiplications(queries: int, positions: int, count: int, outputs: int, inputs: int) -> tuple[int, int]:
    """Of a product for every query and position; of every example's gradient made once and then multiplied by every query.
    `positions` in all, of `count` examples; writing a number costs TRAFFIC of them."""
    entries = outputs * inputs
    products = queries * positions * (entries + TRAFFIC * min(outputs, inputs))
    return products, (positions + queries * count) * entries + TRAFFIC * count * entries


def products_are_cheaper(queries: int, positions: int, count: int, outputs: int, inputs: int) -> bool:
    products, gradients = multiplications(queries, positions, count, outputs, inputs)
    return products <= gradients


def by_rows(directions: Tensor, rows: Callable[[slice], Tensor], count: int) -> Tensor:
    """U (Q, *weight), examples -> their gradients, B -> (Q, B) float64: the gradients are made as many at once as fit."""
    flat, at_once = directions.flatten(1), max(1, SLICE_BYTES // directions[0].nbytes)
    return torch.cat([(flat @ rows(some).T).double() for some in slices(count, at_once)], 1)


def flat_rows(t: Tensor) -> Tensor:
    """(B, *weight) -> (B, entries); a weight may have no dimension."""
    return t.flatten(1) if t.dim() > 1 else t[:, None]


def dots(first: Tensor, second: Tensor) -> Tensor:
    """(m, k), (m, k) -> (m,) float64."""
    if first.device.type == "cpu" and first.numel() >= COMPILED:
        return torch.from_numpy(row_dots(first.numpy(), second.numpy()))
    return (first * second).sum(1, dtype=torch.float64)


def times(t: Tensor, weights: Tensor) -> Tensor:
    """(B, ...), (B,) -> (B, ...)."""
    return t * weights.view(-1, *(1,) * (t.dim() - 1))


def slices(count: int, at_once: int) -> Iterator[slice]:
    return (slice(lo, lo + at_once) for lo in range(0, count, at_once))
