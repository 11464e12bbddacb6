"""Stochastic gradient descent with momentum (Polyak 1964; Sutskever et al. 2013), as torch.optim.SGD computes it.

g = sign * gradient + weight_decay * theta
b = momentum b + (1 - dampening) g                      (b = g the first time)
theta' = theta - lr b,  with Nesterov: theta - lr (g + momentum b)
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..kernels.recurrence import Coefficients
from .rule import Hyper, Rule, State, kernels, read_kernels, realised

NUMBERS = ("lr", "momentum", "dampening", "weight_decay")
FLAGS = ("nesterov", "maximize")
HYPER = (*NUMBERS, *FLAGS, "foreach", "fused", "age")


def _read(group: Mapping[str, Any], state: Mapping[str, Any]) -> tuple[float, ...]:
    age = float(state.get("momentum_buffer") is not None)
    return (*(float(group[name]) for name in (*NUMBERS, *FLAGS)), *read_kernels(group), age)


def _options(h: Hyper) -> dict[str, Any]:
    return {key: h[key] for key in NUMBERS} | {key: bool(h[key]) for key in FLAGS} | kernels(h)


def _resume(h: Hyper, state: State) -> State:
    return state if h["age"] else {}


def _freeze(h: Hyper, state: State, gradient: Tensor, theta: Tensor) -> tuple[Coefficients, State]:
    sign = -1.0 if h["maximize"] else 1.0
    lr, mu, fresh, weight_decay = (
        realised(value, theta.dtype) for value in (h["lr"], h["momentum"], 1 - h["dampening"], h["weight_decay"])
    )
    coupled = sign * weight_decay  # g = sign * (gradient + sign * weight_decay * theta)
    if mu == 0:  # torch leaves the buffer alone
        return Coefficients(1.0, 0.0, 0.0, lr * sign, coupled, 0.0), {}
    keep, feed = (mu, fresh) if h["age"] else (0.0, 1.0)
    if h["nesterov"]:
        apply_old, apply_new = lr * mu * keep, lr * (1 + mu * feed)
    else:
        apply_old, apply_new = lr * keep, lr * feed
    return Coefficients(keep, feed * sign, apply_old, apply_new * sign, coupled, 0.0), {}


SGD = Rule("SGD", "momentum_buffer", (), HYPER, _read, _freeze, _options, _resume)
