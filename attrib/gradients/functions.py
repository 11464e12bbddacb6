"""FUNCTIONS: torch calls y = f(data, weight) whose shares have a closed form, keyed by the very function.

Each row says, for each weight that the call takes, how the gradient of every example follows from the call's arguments and
delta = dl/dy, as a `kernels.factors.Factor`. `split` tells the examples apart, (..., B k, ...) -> (B, ..., k, ...).

Calls that are not listed, or whose rule raises NotImplementedError for the shapes at hand, go through forward-mode
derivatives (`sites.jvp`); their gradients, where they have to be written out, through `vmap` of the loss.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.convolution import geometry
from ..kernels.factors import Convolution, Dense, Factor, Lookup, Outer

Bound = dict[str, Any]  # argument name -> value
Split = Callable[[Tensor], Tensor]  # (..., B k, ...) -> (B, ..., k, ...)
Rule = Callable[[Bound, Tensor, Split], Factor]


@dataclass(frozen=True)
class Function:
    """Argument names in order, and the rule of each weight among them. rounds: whether autocast has it read its arguments
    rounded to the type that it returns."""

    names: tuple[str, ...]
    rules: dict[str, Rule]
    rounds: bool = False

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Bound:
        return {**dict(zip(self.names, args, strict=False)), **kwargs}


def _per_position(t: Tensor, split: Split, features: int) -> Tensor:
    """(..., features) -> (B, n, features), n positions of each example."""
    rows = split(t)
    return rows.reshape(rows.shape[0], -1, features)


# Linear: y = x W^T + b over any leading positions


def _linear(b: Bound, delta: Tensor, split: Split) -> Factor:
    out, inner = b["weight"].shape
    return Outer(_per_position(delta, split, out), _per_position(b["input"], split, inner))


def _bias_of_last(b: Bound, delta: Tensor, split: Split) -> Factor:
    shape = b["bias"].shape
    rows = split(delta)
    return Dense(rows.reshape(rows.shape[0], -1, *shape).sum(1))


# Convolution: several images of an example may stand in the batch dimension


def _convolution(b: Bound, delta: Tensor, split: Split) -> Factor:
    kernel = tuple(b["weight"].shape[2:])
    if b["input"].dim() != len(kernel) + 2:
        raise NotImplementedError("the input has no batch dimension")
    options = (b.get("stride", 1), b.get("padding", 0), b.get("dilation", 1), b.get("groups", 1))
    return Convolution(split(b["input"]), split(delta), geometry(kernel, *options))


def _bias_of_channel(b: Bound, delta: Tensor, split: Split) -> Factor:
    return Dense(_channel_sum(split(delta)))


def _channel_sum(rows: Tensor) -> Tensor:
    """(B, k, C, ...) -> (B, C)."""
    return rows.reshape(*rows.shape[:3], -1).sum((1, 3))


# Normalisation: y = weight * normalised(x) + bias, with no share through the statistics' own weights


def _normalised(function: Callable[..., Tensor], b: Bound) -> Tensor:
    return function(**{name: value for name, value in b.items() if name not in ("weight", "bias")})


def unwritten(function: Callable[..., Any], args: Any, kwargs: Bound) -> tuple[Any, Bound]:
    """The arguments of a call without the running statistics that it writes on its way, so that it may be made again: they
    are read in no training pass."""
    if function is not F.batch_norm:
        return args, kwargs
    bound = dict(zip(_BATCH_NORM, args, strict=False)) | kwargs
    return ((), {**bound, "running_mean": None, "running_var": None}) if bound.get("training") else (args, kwargs)


def _norm_last(function: Callable[..., Tensor], names: tuple[str, ...]) -> Function:
    """Weights over the last dimensions: layer_norm, rms_norm."""

    def weight(b: Bound, delta: Tensor, split: Split) -> Factor:
        product = split(delta * _normalised(function, b))
        return Dense(product.reshape(product.shape[0], -1, *b["weight"].shape).sum(1))

    return Function(names, {"weight": weight, "bias": _bias_of_last})


def _norm_channel(function: Callable[..., Tensor], names: tuple[str, ...]) -> Function:
    """Weights over dimension 1: group_norm, batch_norm, whatever its statistics."""

    def weight(b: Bound, delta: Tensor, split: Split) -> Factor:
        return Dense(_channel_sum(split(delta * _normalised(function, b))))

    return Function(names, {"weight": weight, "bias": _bias_of_channel})


# Embedding: rows of the weight, the padding row excepted


def _embedding(b: Bound, delta: Tensor, split: Split) -> Factor:
    count, width = b["weight"].shape
    if b.get("padding_idx") is not None:
        delta = delta * (b["input"] != b["padding_idx"] % count).unsqueeze(-1)
    index = split(b["input"])
    return Lookup(index.reshape(index.shape[0], -1), _per_position(delta, split, width), count)


# Elementwise sum and product with a weight that is broadcast over the examples


def _broadcast(product: Tensor, shape: torch.Size, split: Split) -> Factor:
    """(y's shape) -> (B, *shape): each example's part, summed over what was broadcast."""
    rows = split(product)
    wide = (1,) * (rows.dim() - 1 - len(shape)) + tuple(shape)
    over = [d + 1 for d, n in enumerate(wide) if n == 1 and rows.shape[d + 1] != 1]
    rows = rows.sum(over, keepdim=True) if over else rows
    if prod(rows.shape[1:]) != prod(shape):
        raise NotImplementedError("the weight is not broadcast over the examples")
    return Dense(rows.reshape(rows.shape[0], *shape))


def _elementwise(product: bool) -> Function:
    def rule(mine: str, other: str) -> Rule:
        return lambda b, delta, split: _broadcast(delta * b[other] if product else delta, b[mine].shape, split)

    return Function(("input", "other"), {"input": rule("input", "other"), "other": rule("other", "input")})


# Product with a weight matrix on the right, with a bias before it or without


def _matmul(b: Bound, delta: Tensor, split: Split) -> Factor:
    if b["other"].dim() != 2:
        raise NotImplementedError("only a matrix is met once at each position")
    inner, out = b["other"].shape
    return Outer(_per_position(b["input"], split, inner), _per_position(delta, split, out))


def _addmm_matrix(b: Bound, delta: Tensor, split: Split) -> Factor:
    return _matmul({"input": b["mat1"], "other": b["mat2"]}, delta * b.get("alpha", 1), split)


def _addmm_bias(b: Bound, delta: Tensor, split: Split) -> Factor:
    return _broadcast(delta * b.get("beta", 1), b["input"].shape, split)


_LINEAR = ("input", "weight", "bias")
_CONVOLUTION = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_EMBEDDING = ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")
_LAYER_NORM = ("input", "normalized_shape", "weight", "bias", "eps")
_RMS_NORM = ("input", "normalized_shape", "weight", "eps")
_GROUP_NORM = ("input", "num_groups", "weight", "bias", "eps")
_BATCH_NORM = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")

_CONVOLVED = Function(_CONVOLUTION, {"weight": _convolution, "bias": _bias_of_channel}, rounds=True)

FUNCTIONS: dict[Callable[..., Any], Function] = {
    F.linear: Function(_LINEAR, {"weight": _linear, "bias": _bias_of_last}, rounds=True),
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d), _CONVOLVED),
    **dict.fromkeys(
        (torch.addmm, Tensor.addmm),
        Function(("input", "mat1", "mat2"), {"input": _addmm_bias, "mat2": _addmm_matrix}, rounds=True),
    ),
    F.embedding: Function(_EMBEDDING, {"weight": _embedding}),
    F.layer_norm: _norm_last(F.layer_norm, _LAYER_NORM),
    F.rms_norm: _norm_last(F.rms_norm, _RMS_NORM),
    F.group_norm: _norm_channel(F.group_norm, _GROUP_NORM),
    F.batch_norm: _norm_channel(F.batch_norm, _BATCH_NORM),
    **dict.fromkeys((torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__), _elementwise(product=False)),
    **dict.fromkeys((torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__), _elementwise(product=True)),
    **dict.fromkeys(
        (torch.matmul, Tensor.matmul, Tensor.__matmul__),
        Function(("input", "other"), {"other": _matmul}, rounds=True),
    ),
}
