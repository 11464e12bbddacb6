"""The rule of each operation: a cotangent of y becomes cotangents of its inputs with <c, y1 - y0> = sum <c_i, dx_i>.

Read as a table: ELEMENTWISE (slope of a function of one element), MIDPOINT (linear, bilinear and quadratic operations: the
ordinary vector-Jacobian product with every operand at the average of its two values), SPECIAL (softmax, maxima, division,
tuples). What is in none of them goes by Gonzalez' formula, and is logged once by name. WRITTEN_OUT holds the commonest
operations of the MIDPOINT kind with their vjp spelled out, for speed.

A rule sees an fx node and the values at both ends and yields (input node, cotangent) pairs. No rule branches on data.
"""

import logging
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from ..kernels import discrete, slopes
from .ends import Ends, Pairs, Values, arguments, run_node
from .special import SPECIAL, applies

log = logging.getLogger("attrib")
aten = torch.ops.aten


def pull(node: fx.Node, c: Any, ends: Ends, moving: set[fx.Node]) -> Pairs:
    """Apply the rule of a node's operation. `moving`: the nodes whose values differ between the ends."""
    operation = getattr(node.target, "overloadpacket", node.target)
    if applies(node):
        pairs = SPECIAL[operation](node, c, ends)
    elif operation in ELEMENTWISE and not any(isinstance(a, fx.Node) for a in arguments(node)[1:]):
        pairs = _elementwise(node, c, ends, ELEMENTWISE[operation])
    elif operation in WRITTEN_OUT:
        pairs = _written_out(node, c, ends, WRITTEN_OUT[operation])
    elif operation in MIDPOINT and not _reads_moving_integers(node, ends, moving):
        pairs = zip(*_midpoint(node, c, ends, moving), strict=True)
    else:
        pairs = _gonzalez(node, c, ends, moving)
    yield from ((source, inward) for source, inward in pairs if source in moving)


# one operand, element by element


def _elementwise(node: fx.Node, c: Tensor, ends: Ends, slope: Callable[..., Tensor]) -> Pairs:
    x0, x1 = ends.of(arguments(node)[0])
    yield arguments(node)[0], c * slope(x0, x1, *arguments(node)[1:], **node.kwargs)


def _smooth(f: Callable[..., Tensor], *breaks: float) -> Callable[..., Tensor]:
    def slope(x0: Tensor, x1: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return slopes.smooth(lambda x: f(x, *args, **kwargs), x0, x1, breaks)

    return slope


def _softplus(x0: Tensor, x1: Tensor, beta: float = 1.0, threshold: float = 20.0) -> Tensor:
    """softplus(x, beta) = softplus(beta x) / beta."""
    return slopes.smooth(lambda x: F.softplus(x, 1.0, threshold), beta * x0, beta * x1, (threshold,))


def _log1p(x0: Tensor, x1: Tensor) -> Tensor:
    return slopes.log(1 + x0, 1 + x1)


ELEMENTWISE: dict[Any, Callable[..., Tensor]] = {
    aten.relu: slopes.relu,
    aten.leaky_relu: slopes.leaky_relu,
    aten.abs: slopes.absolute,
    aten.clamp: slopes.clamp,
    aten.clamp_min: lambda x0, x1, low: slopes.clamp(x0, x1, low),
    aten.clamp_max: lambda x0, x1, high: slopes.clamp(x0, x1, None, high),
    aten.hardtanh: lambda x0, x1, low=-1.0, high=1.0: slopes.clamp(x0, x1, low, high),
    aten.exp: slopes.exp,
    aten.expm1: slopes.exp,
    aten.log: slopes.log,
    aten.log1p: _log1p,
    aten.sqrt: slopes.sqrt,
    aten.rsqrt: slopes.rsqrt,
    aten.reciprocal: slopes.reciprocal,
    aten.tanh: slopes.tanh,
    aten.sigmoid: slopes.sigmoid,
    aten.silu: slopes.silu,
    aten.gelu: slopes.gelu,
    aten.erf: _smooth(torch.erf),
    aten.sin: _smooth(torch.sin),
    aten.cos: _smooth(torch.cos),
    aten.softplus: _softplus,
    aten.elu: _smooth(aten.elu, 0.0),
    aten.mish: _smooth(F.mish),
    aten.hardswish: _smooth(F.hardswish, -3.0, 3.0),
    aten.hardsigmoid: lambda x0, x1: slopes.clamp(x0 / 6 + 0.5, x1 / 6 + 0.5, 0.0, 1.0) / 6,
}


# linear, bilinear, quadratic: the ordinary vjp with all operands at their averages

MIDPOINT: set[Any] = {
    # shape
    *(aten.reshape, aten.permute, aten.slice, aten.select, aten.split, aten.split_with_sizes),
    *(aten.unbind, aten.flip, aten.roll, aten.repeat, aten.diagonal, aten.as_strided, aten.unfold),
    *(aten.constant_pad_nd, aten.im2col, aten.col2im),
    *(aten.cat, aten.stack, aten.tril, aten.triu, aten.lift_fresh_copy, aten.contiguous),
    # sums
    *(aten.rsub, aten.neg, aten.sum, aten.mean, aten.cumsum),
    *(aten.avg_pool1d, aten.avg_pool2d, aten.avg_pool3d, aten._adaptive_avg_pool2d, aten.adaptive_avg_pool1d),
    # lookups by a fixed index
    *(aten.gather, aten.index, aten.index_select, aten.embedding, aten.scatter),
    *(aten.select_scatter, aten.slice_scatter, aten.index_put, aten.scatter_add),
    # products
    *(aten.baddbmm, aten.mv, aten.dot, aten.addmv, aten.matmul, aten.einsum, aten.square),
}


def _between(a: Any, b: Any, dtype: torch.dtype | None = None) -> Any:
    """The average of the ends, in `dtype`; of a mask, how much of the way it holds. Whole numbers are operands where a type
    is asked for, else an index, which stays."""
    if not isinstance(a, Tensor) or not (a.is_floating_point() or a.dtype == torch.bool or dtype is not None):
        return a
    dtype = dtype or a.dtype
    return (a.to(dtype) + b.to(dtype)).div_(2)


def _float_inputs(node: fx.Node, ends: Ends, moving: set[fx.Node]) -> list[fx.Node]:
    return [n for n in dict.fromkeys(node.all_input_nodes) if n in moving and ends.first[n].is_floating_point()]


def _reads_moving_integers(node: fx.Node, ends: Ends, moving: set[fx.Node]) -> bool:
    """An index or a mask that itself depends on parameters."""
    inputs = [ends.first[n] for n in node.all_input_nodes if n in moving]
    return any(isinstance(v, Tensor) and not v.is_floating_point() for v in inputs)


def _vjp(node: fx.Node, c: Any, inputs: list[fx.Node], around: Values, points: list[Tensor]) -> list[Tensor]:
    """The ordinary vjp at `points`; all else as in `around`. c is a dict by position where the output is a tuple."""

    def run(*xs: Tensor) -> Any:
        y = run_node(node, {**around, **dict(zip(inputs, xs, strict=True))})
        return tuple(y[k] for k in c) if isinstance(c, dict) else y

    _, pullback = torch.func.vjp(run, *points)  # type: ignore[misc]
    return list(pullback(tuple(c.values()) if isinstance(c, dict) else c))


def _midpoint(node: fx.Node, c: Any, ends: Ends, moving: set[fx.Node]) -> tuple[list[fx.Node], list[Tensor]]:
    inputs = _float_inputs(node, ends, moving)
    around = {n: ends.first[n] for n in node.all_input_nodes}
    return inputs, _vjp(node, c, inputs, around, [_between(*ends.of(n)) for n in inputs])


# the commonest of these, written out: the same vjp without running the operation again

Middle = Callable[[Any], Any]  # a node or constant -> its average over the ends


def _add(c: Tensor, a: Any, b: Any, at: Middle, sign: float = 1.0, alpha: float = 1.0) -> Iterator[Any]:
    yield a, _fit(c, at(a))
    yield b, _fit(c * (sign * alpha), at(b))


def _multiply(c: Tensor, a: Any, b: Any, at: Middle) -> Iterator[Any]:
    yield a, _fit(c * at(b), at(a))
    yield b, _fit(c * at(a), at(b))


def _matrix_product(c: Tensor, a: Any, b: Any, at: Middle) -> Iterator[Any]:
    x, w = at(a), at(b)
    yield a, c @ w.transpose(-1, -2)
    if w.stride(-1) == 1:
        yield b, x.transpose(-1, -2) @ c
    else:  # a weight that is met transposed: its cotangent, too, is to lie in memory as the weight does
        yield b, (c.transpose(-1, -2) @ x).transpose(-1, -2)


def _addmm(c: Tensor, bias: Any, a: Any, b: Any, at: Middle, beta: float = 1.0, alpha: float = 1.0) -> Iterator[Any]:
    yield bias, _fit(c * beta, at(bias))
    yield from _matrix_product(c * alpha, a, b, at)


def _convolution(c: Tensor, x: Any, weight: Any, bias: Any, *how: Any, at: Middle) -> Iterator[Any]:
    if isinstance(bias, fx.Node):
        yield bias, c.sum([0, *range(2, c.dim())])
    if isinstance(x, fx.Node):
        yield x, aten.convolution_backward(c, at(x), at(weight), None, *how, [True, False, False])[0]
    if isinstance(weight, fx.Node):
        yield weight, _of_kernel(c, at(x), at(weight), *how)


def _of_kernel(c: Tensor, x: Tensor, weight: Tensor, stride: Any, padding: Any, dilation: Any, *how: Any) -> Tensor:
    """By a product with the patches of the input where they are fewer than the kernels, which mapped over queries torch
    copies several times."""
    transposed, _, groups = how
    if x.dim() == 4 and not transposed and groups == 1 and c.shape[0] * c.shape[2] * c.shape[3] <= c.shape[1]:
        patches = F.unfold(x, weight.shape[2:], dilation, padding, stride)
        rows = c.flatten(2).transpose(0, 1).flatten(1)
        return (rows @ patches.transpose(1, 2).flatten(0, 1)).view(weight.shape)
    found: Tensor = aten.convolution_backward(
        c, x, weight, None, stride, padding, dilation, *how, [False, True, False]
    )[1]
    return found


def _where(c: Tensor, mask: Any, a: Any, b: Any, at: Middle) -> Iterator[Any]:
    """mask a + (1 - mask) b."""
    share = at(mask)
    yield a, _fit(c * share, at(a))
    yield b, _fit(c * (1 - share), at(b))
    yield mask, _fit(c * _gain(at(a), at(b), c), share)


def _masked_fill(c: Tensor, x: Any, mask: Any, value: Any, at: Middle) -> Iterator[Any]:
    share = at(mask)
    yield x, _fit(c * (1 - share), at(x))
    yield value, _fit(c * share, at(value))
    yield mask, _fit(c * _gain(at(value), at(x), c), share)


def _gain(a: Any, b: Any, like: Tensor) -> Tensor:
    """a - b in the precision of `like`, 0 where one is infinite."""
    a, b = (torch.as_tensor(v, dtype=like.dtype, device=like.device) for v in (a, b))
    return torch.where(torch.isfinite(a - b), a - b, 0.0)


def _either(c: Tensor, a: Any, b: Any, at: Middle) -> Iterator[Any]:
    """a + b - a b, of masks."""
    yield a, _fit(c * (1 - at(b)), at(a))
    yield b, _fit(c * (1 - at(a)), at(b))


def _fit(c: Tensor, like: Any) -> Any:
    """Sum over what was broadcast; constants need no cotangent."""
    return c.sum_to_size(like.shape) if isinstance(like, Tensor) else None


def _reshaped(c: Tensor, x: Any, *shape: Any, at: Middle) -> Iterator[Any]:
    yield x, c.reshape(at(x).shape)


WRITTEN_OUT: dict[Any, Callable[..., Iterator[Any]]] = {
    aten.add: _add,
    aten.sub: partial(_add, sign=-1.0),
    aten.mul: _multiply,
    aten.mm: _matrix_product,
    aten.bmm: _matrix_product,
    aten.addmm: _addmm,
    aten.convolution: _convolution,
    aten.where: _where,
    aten.masked_fill: _masked_fill,
    aten.copy: lambda c, old, new, at, **_: iter([(new, _fit(c, at(new)))]),
    **dict.fromkeys((aten.logical_and, aten.bitwise_and), _multiply),
    **dict.fromkeys((aten.logical_or, aten.bitwise_or), _either),
    **dict.fromkeys((aten.logical_not, aten.bitwise_not), lambda c, x, at: iter([(x, -c)])),
    aten.t: lambda c, x, at: iter([(x, c.t())]),
    aten.transpose: lambda c, x, i, j, at: iter([(x, c.transpose(i, j))]),
    aten.expand: lambda c, x, shape, at: iter([(x, _fit(c, at(x)))]),
    **dict.fromkeys((aten.view, aten._unsafe_view, aten.unsqueeze, aten.squeeze), _reshaped),
    **dict.fromkeys((aten.clone, aten.alias, aten.detach), lambda c, x, at, **_: iter([(x, c)])),
}


def _written_out(node: fx.Node, c: Tensor, ends: Ends, rule: Callable[..., Iterator[Any]]) -> Pairs:
    known: dict[fx.Node, Any] = {}

    def at(value: Any) -> Any:
        if not isinstance(value, fx.Node):
            return value
        if value not in known:
            known[value] = _between(*ends.of(value), c.dtype)
        return known[value]

    yield from rule(c, *arguments(node), at=at, **node.kwargs)


# anything else


# piecewise constant: no derivative is none; of any other operation, one that cannot be had is an error
CONSTANT: set[Any] = {
    *(aten.heaviside, aten.floor_divide),
    *(
        aten.bucketize,
        aten.searchsorted,
        aten.one_hot,
        aten.argmax,
        aten.argmin,
        aten.argsort,
        aten.histc,
        aten.bincount,
    ),
    *(aten.isnan, aten.isinf, aten.isfinite, aten.signbit, aten.count_nonzero, aten.any, aten.all),
}

_reported: set[str] = set()


def _rounds(node: fx.Node) -> bool:
    """Division to whole numbers."""
    return bool(node.kwargs.get("rounding_mode"))


def _gonzalez(node: fx.Node, c: Any, ends: Ends, moving: set[fx.Node]) -> Pairs:
    """Midpoint vjp, its integer and boolean operands as at each end in turn, corrected along the change."""
    name = str(node.target)
    if name not in _reported:
        _reported.add(name)
        log.info("secant: %s has no rule of its own and goes by Gonzalez' formula (exact sum)", name)
    inputs = _float_inputs(node, ends, moving)
    y0, y1 = ends.of(node)
    if not inputs or (isinstance(y0, Tensor) and not y0.is_floating_point()):
        return
    points = [_between(*ends.of(n)) for n in inputs]
    operation = getattr(node.target, "overloadpacket", node.target)
    if operation in CONSTANT or _rounds(node):  # all of the change goes by the correction
        total = sum(ck.sum() for ck in (c.values() if isinstance(c, dict) else [c]))
        halves = [[torch.zeros_like(p) * total for p in points]] * 2
    else:
        halves = [_vjp(node, c, inputs, {n: end[n] for n in node.all_input_nodes}, points) for end in ends]
    means = [(a + b) / 2 for a, b in zip(*halves, strict=True)]
    parts = c.items() if isinstance(c, dict) else [(None, c)]
    change = [(ck * slopes.difference(*((y0, y1) if k is None else (y0[k], y1[k])))).sum() for k, ck in parts]
    differences = [slopes.difference(*ends.of(n)) for n in inputs]
    yield from zip(inputs, discrete.gonzalez(torch.stack(change).sum(), means, differences), strict=True)
