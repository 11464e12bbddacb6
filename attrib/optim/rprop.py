"""Resilient backpropagation (Riedmiller and Braun 1993), as torch.optim.Rprop computes it.

    g = sign * gradient,  p the one before
    s = clamp(s * (eta+ where g p > 0, eta- where g p < 0), between the step sizes)        s = lr the first time
    g = 0 where g p < 0
    theta' = theta - s sign(g)                         sign(g) = g / |g|

Frozen: s / |g|, 0 where g is 0. Linear in the gradients: the update itself, of which only the sign of g is left:
the examples share s as they share |g|. Where |g| is tiny, and its sign that of rounding, the update is no example's: it goes
to a row of its own. There is no momentum.
"""

import torch
from torch import Tensor

from ..kernels.recurrence import Coefficients
from .numbers import choice, flag, number, several
from .rule import Options, Rule, State, always, inverse_size


def _freeze(o: Options, state: State, gradient: Tensor, theta: Tensor) -> tuple[Coefficients, State]:
    sign = -1.0 if o["maximize"] else 1.0
    g = sign * gradient
    less, more = map(float, o["etas"])
    size = state["step_size"] if o["age"] else torch.full_like(gradient, float(o["lr"]))
    agrees = g.mul(state["prev"]).sign_()
    factor = torch.ones_like(g).masked_fill_(agrees > 0, more).masked_fill_(agrees < 0, less)
    size = (size * factor).clamp_(*map(float, o["step_sizes"]))
    g = g.masked_fill(agrees < 0, 0.0)
    frozen = Coefficients(keep=1.0, feed=0.0, apply_old=0.0, apply_new=(sign * size * inverse_size(g)).reshape(-1))
    return frozen, {"prev": g, "step_size": size}


RPROP = Rule(
    name="Rprop",
    accumulators={"prev": always, "step_size": always},
    clock="step",
    numbers=(
        number("lr"),
        several("etas", "etaminus", "etaplus"),
        several("step_sizes", "step_size_min", "step_size_max"),
        flag("maximize"),
        choice("foreach"),
    ),
    freeze=_freeze,
    whole=True,
    unmodelled=True,
)
