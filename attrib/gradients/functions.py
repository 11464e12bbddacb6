"""FUNCTIONS: torch calls y = f(data, weight) whose shares have a closed form, keyed by the very function.

Each row says, for each weight that the call takes (its *role*):

    pair(call, delta, U)        two tensors whose product, summed over an example, is <dl_i/dy, dy/dweight U>
    rows(call, delta, split)    the gradient of each example, (B, *weight)

with delta = dl/dy. The usual pair is delta and the tangent, how y moves when the weight moves along U.

Calls that are not listed go through forward-mode derivatives (`sites.jvp`); their rows through `vmap`.
Sources: per-example gradients of linear layers, Goodfellow 2015 (arXiv 1510.01799); convolutions, Rochette et al. 2019.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Bound = dict[str, Any]  # argument name -> value
Split = Callable[[Tensor], Tensor]  # (..., B k, ...) -> (B, ..., k, ...)


@dataclass(frozen=True)
class Role:
    """What a call does with one of its weights.

    small: the rows are no larger than the output itself. outputs: the dimension of the weight that counts its outputs,
    where the call multiplies every position by the whole weight.
    """

    pair: Callable[[Bound, Tensor, Tensor], tuple[Tensor, Tensor]]
    rows: Callable[[Bound, Tensor, Split], Tensor]
    small: bool = False
    outputs: int | None = None


@dataclass(frozen=True)
class Function:
    """Argument names in order, and the roles among them."""

    names: tuple[str, ...]
    roles: dict[str, Role]

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Bound:
        return {**dict(zip(self.names, args, strict=False)), **kwargs}


def _per_position(t: Tensor, split: Split, features: int) -> Tensor:
    """(..., features) -> (B, n, features), n positions of each example."""
    rows = split(t)
    return rows.reshape(rows.shape[0], -1, features)


# Linear: y = x W^T + b over any leading positions


def _linear_rows(b: Bound, delta: Tensor, split: Split) -> Tensor:
    out, inner = b["weight"].shape
    return torch.bmm(_per_position(delta, split, out).transpose(1, 2), _per_position(b["input"], split, inner))


def _linear_pair(b: Bound, delta: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    """delta^T U a, multiplied from the side that leaves the narrower tensors."""
    out, inner = direction.shape
    return (delta @ direction, b["input"]) if inner < out else (delta, F.linear(b["input"], direction))


def _broadcast_pair(b: Bound, delta: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    return delta, direction.expand(delta.shape)


def _last_bias_rows(b: Bound, delta: Tensor, split: Split) -> Tensor:
    shape = b["bias"].shape
    rows = split(delta)
    return rows.reshape(rows.shape[0], -1, *shape).sum(1)


# Convolution: y (B, C, ...); weight rows by one grouped convolution over the batch (vmap of the vjp)


def _per_channel(direction: Tensor, like: Tensor) -> Tensor:
    return direction.reshape(-1, *(1,) * (like.dim() - 2)).expand(like.shape)


def _channel_pair(b: Bound, delta: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    return delta, _per_channel(direction, delta)


def _channel_sum(rows: Tensor) -> Tensor:
    """(B, k, C, ...) -> (B, C)."""
    return rows.reshape(*rows.shape[:3], -1).sum((1, 3))


def _convolution(function: Callable[..., Tensor]) -> Function:
    def without_bias(b: Bound, **changed: Tensor) -> Tensor:
        return function(**{**b, "bias": None, **changed})

    def pair(b: Bound, delta: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
        return delta, without_bias(b, weight=direction)

    def rows(b: Bound, delta: Tensor, split: Split) -> Tensor:
        def one(x: Tensor, d: Tensor) -> Tensor:
            _, pull = torch.func.vjp(lambda w: without_bias(b, input=x, weight=w), b["weight"])
            return pull(d)[0]

        return torch.vmap(one)(split(b["input"]), split(delta))

    bias = Role(_channel_pair, lambda b, d, split: _channel_sum(split(d)), small=True)
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    return Function(names, {"weight": Role(pair, rows, outputs=0), "bias": bias})


# Normalisation: y = weight * normalised(x) + bias, with no share through the statistics' own weights


def _normalised(function: Callable[..., Tensor], b: Bound) -> Tensor:
    return function(**{name: value for name, value in b.items() if name not in ("weight", "bias")})


def _norm_last(function: Callable[..., Tensor], names: tuple[str, ...]) -> Function:
    """Weights over the last dimensions: layer_norm, rms_norm."""

    def rows(b: Bound, delta: Tensor, split: Split) -> Tensor:
        product = split(delta * _normalised(function, b))
        return product.reshape(product.shape[0], -1, *b["weight"].shape).sum(1)

    def pair(b: Bound, delta: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
        return delta, _normalised(function, b) * direction

    return Function(
        names,
        {
            "weight": Role(pair, rows, small=True),
            "bias": Role(_broadcast_pair, _last_bias_rows, small=True),
        },
    )


def _norm_channel(function: Callable[..., Tensor], names: tuple[str, ...]) -> Function:
    """Weights over dimension 1: group_norm, batch_norm with fixed statistics."""

    def rows(b: Bound, delta: Tensor, split: Split) -> Tensor:
        return _channel_sum(split(delta * _normalised(function, b)))

    def pair(b: Bound, delta: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
        return delta, _normalised(function, b) * _per_channel(direction, delta)

    return Function(
        names,
        {
            "weight": Role(pair, rows, small=True),
            "bias": Role(_channel_pair, lambda b, d, split: _channel_sum(split(d)), small=True),
        },
    )


# Embedding: rows of the weight, the padding row excepted


def _embedding_pair(b: Bound, delta: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    y = F.embedding(b["input"], direction)
    return delta, y if b.get("padding_idx") is None else y * _unpadded(b)


def _unpadded(b: Bound) -> Tensor:
    return (b["input"] != b["padding_idx"] % b["weight"].shape[0]).unsqueeze(-1)


def _embedding_rows(b: Bound, delta: Tensor, split: Split) -> Tensor:
    vocabulary, width = b["weight"].shape
    if b.get("padding_idx") is not None:
        delta = delta * _unpadded(b)
    d, index = _per_position(delta, split, width), split(b["input"])
    index = index.reshape(len(d), -1, 1).expand_as(d)
    return d.new_zeros(len(d), vocabulary, width).scatter_add_(1, index, d)


# Elementwise sum and product with a weight that is broadcast over the examples


def _sum_rows(product: Tensor, shape: torch.Size, split: Split) -> Tensor:
    """(y's shape) -> (B, *shape): each example's part, summed over what was broadcast."""
    rows = split(product)
    wide = (1,) * (rows.dim() - 1 - len(shape)) + tuple(shape)
    over = [d + 1 for d, n in enumerate(wide) if n == 1 and rows.shape[d + 1] != 1]
    rows = rows.sum(over, keepdim=True) if over else rows
    if prod(rows.shape[1:]) != prod(shape):
        raise NotImplementedError("the weight is not broadcast over the examples")
    return rows.reshape(rows.shape[0], *shape)


def _elementwise(product: bool) -> Function:
    def role(mine: str, other: str) -> Role:
        def pair(b: Bound, delta: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
            return delta, (direction * b[other] if product else direction).expand(delta.shape)

        def rows(b: Bound, delta: Tensor, split: Split) -> Tensor:
            return _sum_rows(delta * b[other] if product else delta, b[mine].shape, split)

        return Role(pair, rows, small=True)

    return Function(("input", "other"), {"input": role("input", "other"), "other": role("other", "input")})


# Product with a weight matrix on the right


def _matmul_rows(b: Bound, delta: Tensor, split: Split) -> Tensor:
    if b["other"].dim() != 2:
        raise NotImplementedError("only a matrix has one row per input")
    inner, out = b["other"].shape
    return torch.bmm(_per_position(b["input"], split, inner).transpose(1, 2), _per_position(delta, split, out))


_LINEAR = ("input", "weight", "bias")
_EMBEDDING = ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")
_LAYER_NORM = ("input", "normalized_shape", "weight", "bias", "eps")
_RMS_NORM = ("input", "normalized_shape", "weight", "eps")
_GROUP_NORM = ("input", "num_groups", "weight", "bias", "eps")
_BATCH_NORM = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")

_MATMUL = Function(
    ("input", "other"),
    {"other": Role(lambda b, delta, direction: (delta, b["input"] @ direction), _matmul_rows, outputs=1)},
)

FUNCTIONS: dict[Callable[..., Any], Function] = {
    F.linear: Function(
        _LINEAR,
        {
            "weight": Role(_linear_pair, _linear_rows, outputs=0),
            "bias": Role(_broadcast_pair, _last_bias_rows, small=True),
        },
    ),
    F.conv1d: _convolution(F.conv1d),
    F.conv2d: _convolution(F.conv2d),
    F.conv3d: _convolution(F.conv3d),
    F.embedding: Function(_EMBEDDING, {"weight": Role(_embedding_pair, _embedding_rows)}),
    F.layer_norm: _norm_last(F.layer_norm, _LAYER_NORM),
    F.rms_norm: _norm_last(F.rms_norm, _RMS_NORM),
    F.group_norm: _norm_channel(F.group_norm, _GROUP_NORM),
    F.batch_norm: _norm_channel(F.batch_norm, _BATCH_NORM),
    **dict.fromkeys((torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__), _elementwise(product=False)),
    **dict.fromkeys((torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__), _elementwise(product=True)),
    **dict.fromkeys((torch.matmul, Tensor.matmul, Tensor.__matmul__), _MATMUL),
}
