"""SPECIAL: operations whose discrete gradient is neither elementwise nor the vjp at the midpoint.

Softmax and its kin, maxima and pooling (the winner may change), division, powers, the parts of a tuple.
"""

import math
import operator
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from ..kernels import discrete, slopes
from .ends import Ends, Pairs, arguments

aten = torch.ops.aten


def _item(node: fx.Node, c: Any, ends: Ends) -> Pairs:
    source, position = arguments(node)
    yield source, {position: c}


def _along(rule: Callable[..., Tensor], node: fx.Node, c: Tensor, ends: Ends) -> Pairs:
    """Softmax and its kin, along args[1]."""
    x = arguments(node)[0]
    yield x, rule(c, *ends.of(x), arguments(node)[1])


def _logsumexp(node: fx.Node, c: Tensor, ends: Ends) -> Pairs:
    x, dims = arguments(node)[0], arguments(node)[1]
    keep = arguments(node)[2] if len(arguments(node)) > 2 else False
    (x0, x1), dims = ends.of(x), [dims] if isinstance(dims, int) else list(dims)
    flat0, back = _join(x0, dims)
    wide = c if keep else _reinsert(c, dims, x0.dim())
    yield x, back(discrete.logsumexp(_join(wide, dims)[0], flat0, _join(x1, dims)[0], -1))


def _join(x: Tensor, dims: list[int]) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Move `dims` to the end and flatten them to one; the second value undoes it for a tensor of x's shape."""
    if x.dim() == 0:
        return x.reshape(1), lambda t: t.reshape(())
    chosen = sorted(d % x.dim() for d in dims) or list(range(x.dim()))
    others = [d for d in range(x.dim()) if d not in chosen]
    moved = x.permute(*others, *chosen)
    shape, order = moved.shape, torch.argsort(torch.tensor([*others, *chosen])).tolist()
    return moved.reshape(*shape[: len(others)], -1), lambda t: t.reshape(shape).permute(order)


def _reinsert(c: Tensor, dims: list[int], rank: int) -> Tensor:
    if rank == 0:
        return c
    for d in sorted(d % rank for d in dims) or range(rank):
        c = c.unsqueeze(d)
    return c


def _extreme(sign: int, node: fx.Node, c: Any, ends: Ends) -> Pairs:
    """amax, amin, and max, min along one dimension (tuples) or over all."""
    x = arguments(node)[0]
    x0, x1 = (sign * v for v in ends.of(x))
    dims = arguments(node)[1] if len(arguments(node)) > 1 else []
    keep = arguments(node)[2] if len(arguments(node)) > 2 else False
    dims = [dims] if isinstance(dims, int) else list(dims)
    if isinstance(c, dict):
        c = c[0]
    flat0, back = _join(x0, dims)
    flat1 = _join(x1, dims)[0]
    wide = _join(c if keep else _reinsert(c, dims, x0.dim()), dims)[0]
    j0, j1 = (f.argmax(-1, keepdim=True) for f in (flat0, flat1))
    yield x, back(discrete.maximum_along(wide, flat0, flat1, j0, j1, -1))


def _larger(sign: int, node: fx.Node, c: Tensor, ends: Ends) -> Pairs:
    """maximum(a, b) and minimum(a, b), broadcasting."""
    (a0, a1), (b0, b1) = ends.of(arguments(node)[0]), ends.of(arguments(node)[1])
    x0 = torch.stack(torch.broadcast_tensors(a0, b0)) * sign
    x1 = torch.stack(torch.broadcast_tensors(a1, b1)) * sign
    j0, j1 = (x.argmax(0, keepdim=True) for x in (x0, x1))
    both = discrete.maximum_along(c.unsqueeze(0), x0, x1, j0, j1, 0)
    yield arguments(node)[0], both[0].sum_to_size(a0.shape)
    yield arguments(node)[1], both[1].sum_to_size(b0.shape)


def _max_pool(spatial: int, node: fx.Node, c: Any, ends: Ends) -> Pairs:
    """Windows' winners come with the operation, as flat positions in the last `spatial` dimensions."""
    x = arguments(node)[0]
    x0, x1 = (v.flatten(-spatial) for v in ends.of(x))
    j0, j1 = (v[1].flatten(-spatial) for v in ends.of(node))
    values = c[0].flatten(-spatial)
    yield x, discrete.maximum_along(values, x0, x1, j0, j1, -1).reshape(ends.first[x].shape)


def _divide(node: fx.Node, c: Tensor, ends: Ends) -> Pairs:
    """a / b = a * (1 / b)."""
    a, b = arguments(node)[:2]
    b0, b1 = ends.of(b) if isinstance(b, fx.Node) else (b, b)
    a0, a1 = ends.of(a)
    if not isinstance(b0, Tensor):
        yield a, c / b0
        return
    yield a, (c * (1 / b0 + 1 / b1) / 2).sum_to_size(a0.shape)
    if isinstance(b, fx.Node):
        yield b, (c * (a0 + a1) / 2 * slopes.reciprocal(b0, b1)).sum_to_size(b0.shape)


def _prelu(node: fx.Node, c: Tensor, ends: Ends) -> Pairs:
    """relu(x) + w n with n = min(x, 0) = x - relu(x): a product, so each factor's change times the mean of the other."""
    x, w = arguments(node)[:2]
    (x0, x1), (w0, w1) = ends.of(x), ends.of(w)
    rising = slopes.relu(x0, x1)
    yield x, c * (rising + (w0 + w1) / 2 * (1 - rising))
    yield w, (c * (x0.clamp(max=0) + x1.clamp(max=0)) / 2).sum_to_size(w0.shape)


def _power(node: fx.Node, c: Tensor, ends: Ends) -> Pairs:
    base, exponent = arguments(node)
    if isinstance(base, fx.Node):
        yield base, c * slopes.power(*ends.of(base), exponent)
    else:  # a number to the power of x
        factor = math.log(base)
        x0, x1 = ends.of(exponent)
        yield exponent, c * factor * slopes.exp(factor * x0, factor * x1)


def _compare(node: fx.Node, c: Tensor, ends: Ends) -> Pairs:
    """A mask that depends on parameters: c is what its 0 or 1 would be worth."""
    a, b = arguments(node)
    a0, a1 = ends.of(a) if isinstance(a, fx.Node) else (a, a)
    b0, b1 = ends.of(b) if isinstance(b, fx.Node) else (b, b)
    inward = c * slopes.step(*ends.of(node), a0 - b0, a1 - b1)
    if isinstance(a, fx.Node):
        yield a, inward.sum_to_size(a0.shape)
    if isinstance(b, fx.Node):
        yield b, -inward.sum_to_size(b0.shape)


def _rounded(node: fx.Node, c: Tensor, ends: Ends) -> Pairs:
    """To whole numbers, or to the nearest of some: nothing but jumps."""
    x = arguments(node)[0]
    yield x, c * slopes.step(*ends.of(node), *ends.of(x))


def _converted(node: fx.Node, c: Tensor, ends: Ends) -> Pairs:
    """To another type; to whole numbers, by its jumps."""
    x = arguments(node)[0]
    if ends.first[x].is_floating_point() and not ends.first[node].is_floating_point():
        yield from _rounded(node, c, ends)
    else:
        yield x, c


SPECIAL: dict[Any, Callable[[fx.Node, Any, Ends], Pairs]] = {
    operator.getitem: _item,
    aten._softmax: partial(_along, discrete.softmax),
    aten._safe_softmax: partial(_along, discrete.softmax),
    aten._log_softmax: partial(_along, discrete.log_softmax),
    aten.logsumexp: _logsumexp,
    aten.amax: partial(_extreme, 1),
    aten.amin: partial(_extreme, -1),
    aten.max: partial(_extreme, 1),
    aten.min: partial(_extreme, -1),
    aten.maximum: partial(_larger, 1),
    aten.minimum: partial(_larger, -1),
    aten.max_pool2d_with_indices: partial(_max_pool, 2),
    aten.max_pool3d_with_indices: partial(_max_pool, 3),
    aten._prelu_kernel: _prelu,
    aten.div: _divide,
    aten.pow: _power,
    **dict.fromkeys((aten.floor, aten.ceil, aten.round, aten.trunc, aten.fix, aten.sign, aten.sgn), _rounded),
    aten._to_copy: _converted,
    **dict.fromkeys((aten.gt, aten.ge, aten.lt, aten.le, aten.eq, aten.ne), _compare),
}


def applies(node: fx.Node) -> bool:
    """Whether SPECIAL has the rule of this very call: not of rounded division, nor of x ** y with both moving."""
    operation = getattr(node.target, "overloadpacket", node.target)
    both = operation is aten.pow and all(isinstance(a, fx.Node) for a in arguments(node)[:2])
    return operation in SPECIAL and not both and not node.kwargs.get("rounding_mode")
