"""Adadelta (Zeiler 2012), as torch.optim.Adadelta computes it.

    g = sign * gradient + weight_decay * theta         v = rho v + (1 - rho) g^2
    d = sqrt(a + eps) / sqrt(v + eps) * g              a = rho a + (1 - rho) d^2
    theta' = theta - lr d

Frozen: the quotient, of v and a. Linear in the gradients: the update itself; there is no momentum.
"""

from torch import Tensor

from ..kernels.recurrence import Coefficients
from .numbers import choice, flag, number
from .rule import Options, Rule, State, always, coupled_gradient


def _freeze(o: Options, state: State, gradient: Tensor, theta: Tensor) -> tuple[Coefficients, State]:
    sign, coupled, g = coupled_gradient(o, gradient, theta)
    rho, eps = o["rho"], o["eps"]
    variance = (state["square_avg"] * rho).addcmul_(g, g, value=1 - rho)
    quotient = state["acc_delta"].add(eps).sqrt_().div_(variance.add(eps).sqrt_())
    moved = quotient * g
    after = {"square_avg": variance, "acc_delta": (state["acc_delta"] * rho).addcmul_(moved, moved, value=1 - rho)}
    taken = float(o["lr"]) * sign * quotient
    return Coefficients(keep=1.0, feed=0.0, apply_old=0.0, apply_new=taken, coupled=coupled), after


ADADELTA = Rule(
    name="Adadelta",
    accumulators={"square_avg": always, "acc_delta": always},
    clock="step",
    numbers=(*map(number, ("lr", "rho", "eps", "weight_decay")), flag("maximize"), choice("foreach")),
    freeze=_freeze,
)
