"""Adamax (Kingma and Ba 2015, section 7), as torch.optim.Adamax computes it.

    g = sign * gradient + weight_decay * theta
    m = beta1 m + (1 - beta1) g                        u = max(beta2 u, |g| + eps)
    theta' = theta - lr / (1 - beta1^t) * m / u

Frozen: the division, of u. Linear in the gradients: m.
"""

import torch
from torch import Tensor

from ..kernels.recurrence import Coefficients
from .numbers import choice, flag, number, several
from .rule import Options, Rule, State, always, averaged, coupled_gradient


def _freeze(o: Options, state: State, gradient: Tensor, theta: Tensor) -> tuple[Coefficients, State]:
    sign, coupled, g = coupled_gradient(o, gradient, theta)
    beta1, beta2 = o["betas"]
    largest = torch.maximum(state["exp_inf"] * beta2, g.abs().add_(o["eps"]))
    rate = float(o["lr"] / (1 - beta1 ** (o["age"] + 1))) / largest
    return averaged(sign, rate, 0.0, beta1, theta.dtype, coupled=coupled), {"exp_inf": largest}


ADAMAX = Rule(
    name="Adamax",
    momentum="exp_avg",
    accumulators={"exp_avg": always, "exp_inf": always},
    clock="step",
    numbers=(
        number("lr"),
        several("betas", "beta1", "beta2"),
        *map(number, ("eps", "weight_decay")),
        flag("maximize"),
        choice("foreach"),
    ),
    freeze=_freeze,
)
