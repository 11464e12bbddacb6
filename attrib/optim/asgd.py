"""Averaged stochastic gradient descent (Polyak and Juditsky 1992), as torch.optim.ASGD computes it.

    g = sign * gradient + weight_decay * theta
    theta' = theta - lambd eta_t theta - eta_t g
    x = x + mu_t (theta' - x)                  the average beside the training; x = theta' where mu = 1
    eta_{t+1} = lr / (1 + lambd lr t)^alpha    mu_{t+1} = 1 / max(1, t - t0)

Frozen: nothing but eta. Linear in the gradients: the update itself; there is no momentum. lambd is a decoupled decay. The
average moves nothing; what is measured is the model that is trained.
"""

from typing import Any

import torch
from torch import Tensor

from ..kernels.recurrence import Coefficients
from .numbers import choice, flag, number
from .rule import Options, Rule, State, always, coupled_gradient, taken_off


def _freeze(o: Options, state: State, gradient: Tensor, theta: Tensor) -> tuple[Coefficients, State]:
    sign, coupled, g = coupled_gradient(o, gradient, theta)
    eta, mu = float(o["eta"]), float(o["mu"])
    moved = (theta * (1 - o["lambd"] * eta)).add_(g, alpha=-eta)
    average = moved if mu == 1 else state["ax"] + mu * (moved - state["ax"])
    decoupled = taken_off(o["lambd"] * eta, theta.dtype)
    frozen = Coefficients(keep=1.0, feed=0.0, apply_old=0.0, apply_new=sign * eta, coupled=coupled, decoupled=decoupled)
    return frozen, {"ax": average}


def _eta(options: Options) -> Any:
    return torch.as_tensor(float(options["lr"]), dtype=torch.get_default_dtype())


ASGD = Rule(
    name="ASGD",
    accumulators={"ax": always},
    clock="step",
    scalars={
        "eta": (number("eta"), _eta),
        "mu": (number("mu"), lambda options: torch.ones((), dtype=torch.get_default_dtype())),
    },
    numbers=(
        *map(number, ("lr", "lambd", "alpha", "t0", "weight_decay")),
        flag("maximize"),
        choice("foreach"),
    ),
    freeze=_freeze,
)
