"""Stochastic gradient descent with momentum (Polyak 1964; Sutskever et al. 2013), as torch.optim.SGD computes it.

g = sign * gradient + weight_decay * theta
b = momentum b + (1 - dampening) g                      (b = g the first time)
theta' = theta - lr b,  with Nesterov: theta - lr (g + momentum b)

Frozen: nothing but the options. Linear in the gradients: b.
"""

from torch import Tensor

from ..kernels.recurrence import Coefficients
from .numbers import choice, flag, number
from .rule import Options, Rule, State, always, linear, realised


def _freeze(o: Options, state: State, gradient: Tensor, theta: Tensor) -> tuple[Coefficients, State]:
    sign = -1.0 if o["maximize"] else 1.0
    dampening = float(o["dampening"]) if o["fused"] else o["dampening"]  # whose kernel takes numbers
    lr, mu, fresh, weight_decay = (
        realised(value, theta.dtype) for value in (o["lr"], o["momentum"], 1 - dampening, o["weight_decay"])
    )
    coupled = sign * weight_decay  # g = sign * (gradient + sign * weight_decay * theta)
    if mu == 0:  # torch leaves the buffer alone
        return Coefficients(keep=1.0, feed=0.0, apply_old=0.0, apply_new=lr * sign, coupled=coupled), {}
    keep, feed = (mu, fresh) if o["age"] else (0.0, 1.0)
    if o["nesterov"]:
        apply_old, apply_new = lr * mu * keep, lr * (1 + mu * feed)
    else:
        apply_old, apply_new = lr * keep, lr * feed
    frozen = Coefficients(keep=keep, feed=feed * sign, apply_old=apply_old, apply_new=apply_new * sign, coupled=coupled)
    return frozen, {}


SGD = Rule(
    name="SGD",
    momentum="momentum_buffer",
    accumulators={"momentum_buffer": always},
    numbers=(
        *map(number, ("lr", "momentum", "dampening", "weight_decay")),
        *map(flag, ("nesterov", "maximize")),
        *map(choice, ("foreach", "fused")),
    ),
    freeze=_freeze,
    adjoint=linear(_freeze),
    roundings=5,  # decay into g, what is left of the accumulator, g into it, Nesterov's sum, the rate as a tensor
)
