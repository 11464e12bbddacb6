"""RMSprop (Hinton 2012; centered: Graves 2013), as torch.optim.RMSprop computes it.

    g = sign * gradient + weight_decay * theta
    v = alpha v + (1 - alpha) g^2          a = alpha a + (1 - alpha) g          (a: centered only)
    D = sqrt(v - a^2) + eps                                                    (without a: sqrt(v) + eps)
    b = momentum b + g / D                 theta' = theta - lr b               (without momentum: theta - lr g / D)

Frozen: D, of v and of a (which is linear in the gradients, but divides). Linear in the gradients: b; the division stands
inside its recurrence.
"""

from torch import Tensor

from ..kernels.recurrence import Coefficients
from .numbers import choice, flag, number
from .rule import Options, Rule, State, always, coupled_gradient, where


def _freeze(o: Options, state: State, gradient: Tensor, theta: Tensor) -> tuple[Coefficients, State]:
    sign, coupled, g = coupled_gradient(o, gradient, theta)
    alpha, lr, mu = o["alpha"], float(o["lr"]), o["momentum"]
    after = {"square_avg": (state["square_avg"] * alpha).addcmul_(g, g, value=1 - alpha)}
    variance = after["square_avg"]
    if o["centered"]:
        mean = after["grad_avg"] = state["grad_avg"].lerp(g, 1 - alpha)
        variance = variance.addcmul(mean, mean, value=-1)
    inverse = sign / variance.sqrt().add_(o["eps"])
    if mu == 0:
        return Coefficients(keep=1.0, feed=0.0, apply_old=0.0, apply_new=lr * inverse, coupled=coupled), after
    frozen = Coefficients(keep=mu, feed=inverse, apply_old=lr * mu, apply_new=lr * inverse, coupled=coupled)
    return frozen, after


RMSPROP = Rule(
    name="RMSprop",
    momentum="momentum_buffer",
    accumulators={"square_avg": always, "momentum_buffer": where("momentum"), "grad_avg": where("centered")},
    clock="step",
    numbers=(
        *map(number, ("lr", "momentum", "alpha", "eps", "weight_decay")),
        *map(flag, ("centered", "maximize")),
        choice("foreach"),
    ),
    freeze=_freeze,
)
