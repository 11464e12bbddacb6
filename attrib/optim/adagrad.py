"""Adagrad (Duchi, Hazan and Singer 2011), as torch.optim.Adagrad computes it.

    g = sign * gradient + weight_decay * theta         s = s + g^2,  initial_accumulator_value from the start
    theta' = theta - lr / (1 + (t - 1) lr_decay) * g / (sqrt(s) + eps)

Frozen: the division, of s. Linear in the gradients: the update itself; there is no momentum. Where s is tiny beside its
tensor the gradients are zero but for rounding, since eps is so small: that update is no example's, and has a row of its own.
"""

from torch import Tensor

from ..kernels.recurrence import Coefficients
from .numbers import choice, flag, number
from .rule import Options, Rule, State, always, coupled_gradient, quotient_by


def _freeze(o: Options, state: State, gradient: Tensor, theta: Tensor) -> tuple[Coefficients, State]:
    sign, coupled, g = coupled_gradient(o, gradient, theta)
    total = state["sum"].addcmul(g, g, value=1)
    lr = float(o["lr"]) if o["fused"] else o["lr"]  # whose kernel takes numbers
    rate = float(lr / (1 + o["age"] * o["lr_decay"]))
    scaled = (rate * sign * quotient_by(total.sqrt().add_(o["eps"]))).reshape(-1)
    return Coefficients(keep=1.0, feed=0.0, apply_old=0.0, apply_new=scaled, coupled=coupled), {"sum": total}


ADAGRAD = Rule(
    name="Adagrad",
    accumulators={"sum": always},
    clock="step",
    begins="initial_accumulator_value",
    numbers=(
        *map(number, ("lr", "lr_decay", "eps", "weight_decay", "initial_accumulator_value")),
        flag("maximize"),
        *map(choice, ("foreach", "fused")),
    ),
    freeze=_freeze,
    whole=True,
    unmodelled=True,
)
