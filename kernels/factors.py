"""The gradient of a weight, example by example, in the form that a layer gives it, without writing it out.

    Outer        g_i = sum_t left[i, t] right[i, t]^T     a matrix met at t = 1 .. n positions: linear layer, product
    Convolution  the same over patches of the input       which need not be cut out for a few queries
    Lookup       g_i = sum_t rows[i, t] at index[i, t]    rows of a table: embedding
    Dense        g_i itself                               norms, biases, whatever is small or has no shorter form

For each: `contract` with directions U (Q, *weight) -> <U_q, g_i> (Q, B) in float64; `rows` -> g (B, entries);
`total` -> sum_i g_i (entries,). Lossless: nothing is approximated. Source: Goodfellow 2015 (arXiv 1510.01799).
"""

from collections.abc import Iterator
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from .contraction import nonzero_rows, row_dots
from .convolution import Geometry, convolve, patches

SLICE_BYTES = 4 << 20  # what a contraction holds at once, to stay in the cache
ROWS = 1024  # of a matrix product: fewer, and packing its other side is felt
TRAFFIC = 12  # multiplications that fit into the time of writing a number and reading it back, in the cache


class Outer(NamedTuple):
    """left (B, n, o), right (B, n, i): a weight (o, i), whatever shape its last dimensions have."""

    left: Tensor
    right: Tensor


class Convolution(NamedTuple):
    """inputs (B, k, C, *space), delta (B, k, O, *positions), k images of an example: a weight (O, C / groups, *kernel)."""

    inputs: Tensor
    delta: Tensor
    geometry: Geometry


class Lookup(NamedTuple):
    """index (B, n) int64, rows (B, n, d): a weight (height, d)."""

    index: Tensor
    rows: Tensor
    height: int


class Dense(NamedTuple):
    """values (B, *weight)."""

    values: Tensor


Factor = Outer | Convolution | Lookup | Dense


def examples(factor: Factor) -> int:
    """B, the number of examples."""
    return len(factor[0])


def entries(factor: Factor) -> int:
    """Of the weight."""
    if isinstance(factor, Outer):
        return factor.left.shape[2] * factor.right.shape[2]
    if isinstance(factor, Convolution):
        outputs, inputs = factor.delta.shape[2], factor.inputs.shape[2] // factor.geometry.groups
        return outputs * inputs * prod(factor.geometry.kernel)
    return factor.height * factor.rows.shape[2] if isinstance(factor, Lookup) else factor.values[0].numel()


def contract(factor: Factor, directions: Tensor) -> Tensor:
    """(Q, *weight) -> <U_q, g_i>, (Q, B) float64."""
    if isinstance(factor, Outer):
        return _contract_outer(*factor, directions.flatten(2))
    if isinstance(factor, Convolution):
        return _contract_convolution(*factor, directions)
    if isinstance(factor, Lookup):
        return _contract_lookup(*factor, directions)
    return directions.flatten(1).double() @ factor.values.flatten(1).double().T


def rows(factor: Factor) -> Tensor:
    """The gradient of each example, (B, entries)."""
    if isinstance(factor, Outer):
        return torch.bmm(factor.left.transpose(1, 2), factor.right).flatten(1)
    if isinstance(factor, Convolution):
        return _convolution_rows(*factor)
    if isinstance(factor, Lookup):
        index, values = factor.index.unsqueeze(-1).expand_as(factor.rows), factor.rows
        out = values.new_zeros(len(values), factor.height, values.shape[-1])
        return out.scatter_add_(1, index, values).flatten(1)
    return factor.values.flatten(1)


def weighted(factor: Factor, weights: Tensor) -> Factor:
    """Each example's gradient times its weight, (B,)."""

    def times(t: Tensor) -> Tensor:
        return t * weights.view(-1, *(1,) * (t.dim() - 1))

    if isinstance(factor, Outer):
        return factor._replace(left=times(factor.left))
    if isinstance(factor, Convolution):
        return factor._replace(delta=times(factor.delta))
    if isinstance(factor, Lookup):
        return factor._replace(rows=times(factor.rows))
    return Dense(times(factor.values))


def total(factor: Factor) -> Tensor:
    """The sum over the examples, (entries,)."""
    if isinstance(factor, Outer):
        return (factor.left.flatten(0, 1).T @ factor.right.flatten(0, 1)).flatten()
    if isinstance(factor, Convolution):
        together = factor.inputs.flatten(0, 1)[None], factor.delta.flatten(0, 1)[None]
        return _convolution_rows(*together, factor.geometry)[0]
    if isinstance(factor, Lookup):
        values = factor.rows.flatten(0, 1)
        return values.new_zeros(factor.height, values.shape[-1]).index_add_(0, factor.index.flatten(), values).flatten()
    return factor.values.sum(0).flatten()


def products_are_cheaper(queries: int, positions: int, count: int, outputs: int, inputs: int) -> bool:
    """Count, in multiplications: a product for every query and position, or every example's gradient made once and then
    multiplied by every query. `positions` in all, of `count` examples; writing a number costs TRAFFIC of them."""
    entries = outputs * inputs
    products = queries * positions * (entries + TRAFFIC * min(outputs, inputs))
    gradients = (positions + queries * count) * entries + TRAFFIC * count * entries
    return products <= gradients


def _contract_outer(left: Tensor, right: Tensor, directions: Tensor) -> Tensor:
    count, positions = left.shape[:2]
    queries, outputs, inputs = directions.shape
    alive = _alive(left)
    reached = count * positions if alive is None else len(alive)
    if products_are_cheaper(queries, reached, count, outputs, inputs):
        return _by_products(left, right, directions, alive)
    flat = directions.flatten(1)
    at_once = max(1, SLICE_BYTES // (left.element_size() * outputs * inputs))
    made = (rows(Outer(left[part], right[part])) for part in _slices(count, at_once))
    return torch.cat([(flat @ g.T).double() for g in made], 1)


def _alive(left: Tensor) -> Tensor | None:
    """The positions (m,) that a gradient reached, None for all: of those that were masked, padded or never read there is
    nothing to multiply. On an accelerator it would have to be waited for."""
    if left.device.type != "cpu" or left.shape[1] == 1:
        return None
    alive = nonzero_rows(left.flatten(0, 1).numpy())
    return None if alive.all() else torch.from_numpy(alive.nonzero()[0])


def _by_products(left: Tensor, right: Tensor, directions: Tensor, alive: Tensor | None) -> Tensor:
    """left^T U right at every position, multiplied from the side that leaves the narrower tensors."""
    count, positions = left.shape[:2]
    left, right = left.flatten(0, 1), right.flatten(0, 1)
    if alive is not None:
        left, right = left[alive], right[alive]
    if directions.shape[2] > directions.shape[1]:
        left, right, directions = right, left, directions.transpose(1, 2)
    out = _bilinear(left, directions, right)
    if alive is None:
        return out.view(len(out), count, positions).sum(2)
    return out.new_zeros(len(out), count).index_add_(1, alive // positions, out)


def _bilinear(left: Tensor, directions: Tensor, right: Tensor) -> Tensor:
    """(m, o), (Q, o, i), (m, i) -> left^T U_q right, (Q, m) float64."""
    if len(directions) == 1:
        return _dots(left @ directions[0], right)[None]
    queries, _, inputs = directions.shape
    out = left.new_empty(len(left), queries)
    if not len(left):  # no gradient reached any position
        return out.T.double()
    few = max(1, SLICE_BYTES // (left.element_size() * inputs * ROWS))
    for q in _slices(queries, few):  # a tile of ROWS x (few queries x inputs) stays in the cache
        side = directions[q].transpose(0, 1).flatten(1)
        for p in _slices(len(left), -(-len(left) // -(-len(left) // ROWS))):
            products = (left[p] @ side).view(-1, side.shape[1] // inputs, inputs)
            out[p, q] = torch.bmm(products, right[p].unsqueeze(2)).squeeze(2)
    return out.T.double()


def _contract_convolution(inputs: Tensor, delta: Tensor, geometry: Geometry, directions: Tensor) -> Tensor:
    count, images = delta.shape[:2]
    queries, outputs = directions.shape[:2]
    positions = delta[0, :, 0].numel()
    if products_are_cheaper(queries, positions * count, count, outputs, directions[0, 0].numel()):
        x, d = inputs.flatten(0, 1), delta.flatten(0, 1)
        return torch.stack([_dots(convolve(x, u, geometry).flatten(1), d.flatten(1)) for u in directions]).view(
            queries, count, images
        ).sum(2)  # fmt: skip
    flat, at_once = directions.flatten(1), max(1, SLICE_BYTES // (delta.element_size() * directions[0].numel()))
    made = (_convolution_rows(inputs[part], delta[part], geometry) for part in _slices(count, at_once))
    return torch.cat([(flat @ g.T).double() for g in made], 1)


def _convolution_rows(inputs: Tensor, delta: Tensor, geometry: Geometry) -> Tensor:
    """(B, entries)."""
    count, groups = len(inputs), geometry.groups
    left = delta.flatten(3).movedim(2, 3).reshape(count, -1, groups, delta.shape[2] // groups)
    right = patches(inputs.flatten(0, 1), geometry).reshape(count, left.shape[1], groups, -1)
    return torch.einsum("bngo,bngi->bgoi", left, right).flatten(1)


def _contract_lookup(index: Tensor, values: Tensor, count: int, directions: Tensor) -> Tensor:
    """Positions that look up the same row are multiplied together."""
    size, flat = index.shape, index.flatten()
    values = values.flatten(0, 1)
    if len(directions) == 1:
        return _dots(directions[0][flat], values).view(1, *size).sum(2)
    order = flat.argsort(stable=True)
    found, lengths = torch.unique_consecutive(flat[order], return_counts=True)
    pieces = values[order].split(lengths.tolist())
    products = [piece @ directions[:, row].T for row, piece in zip(found.tolist(), pieces, strict=True)]
    out = torch.empty(len(flat), len(directions), dtype=torch.float64, device=values.device)
    out[order] = torch.cat(products).double()
    return out.view(*size, -1).sum(1).T


def _dots(first: Tensor, second: Tensor) -> Tensor:
    """(m, k), (m, k) -> (m,) float64."""
    if first.device.type == "cpu":
        return torch.from_numpy(row_dots(first.numpy(), second.numpy()))
    return (first * second).sum(1, dtype=torch.float64)


def _slices(count: int, at_once: int) -> Iterator[slice]:
    return (slice(lo, lo + at_once) for lo in range(0, count, at_once))
