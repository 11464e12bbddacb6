"""RAdam (Liu et al. 2020), as torch.optim.RAdam computes it.

    g = sign * gradient (+ weight_decay * theta, unless that is decoupled: then -lr weight_decay theta)
    m = beta1 m + (1 - beta1) g                        v = beta2 v + (1 - beta2) g^2
    rho = rho_inf - 2 t beta2^t / (1 - beta2^t)        rho_inf = 2 / (1 - beta2) - 1
    theta' = theta - lr / (1 - beta1^t) m                                                 while rho <= 5, then
             theta - lr / (1 - beta1^t) m r sqrt(1 - beta2^t) / (sqrt(v) + eps)           r: of rho, the rectification

Frozen: the division, of v. Linear in the gradients: m; in the first steps all of it.
"""

from typing import Any

from torch import Tensor

from ..kernels.recurrence import Coefficients
from .numbers import choice, flag, number, several
from .rule import Options, Rule, State, always, averaged, decays


def _freeze(o: Options, state: State, gradient: Tensor, theta: Tensor) -> tuple[Coefficients, State]:
    sign, coupled, decoupled, g = decays(o, gradient, theta)
    (beta1, beta2), t = o["betas"], o["age"] + 1
    variance = (state["exp_avg_sq"] * beta2).addcmul_(g, g, value=1 - beta2)
    rate: Any = float(o["lr"]) / (1 - beta1**t)
    rectified = _rectification(beta2, t)
    if rectified is not None:
        rate = rate * rectified * (1 - beta2**t) ** 0.5 / variance.sqrt().add_(o["eps"])
    frozen = averaged(sign, rate, 0.0, beta1, theta.dtype, coupled=coupled, decoupled=decoupled)
    return frozen, {"exp_avg_sq": variance}


def _rectification(beta2: float, t: float) -> float | None:
    """None while the variance is not to be trusted."""
    most = 2 / (1 - beta2) - 1
    rho = most - 2 * t * (beta2**t) / (1 - beta2**t)
    return ((rho - 4) * (rho - 2) * most / ((most - 4) * (most - 2) * rho)) ** 0.5 if rho > 5.0 else None


RADAM = Rule(
    name="RAdam",
    momentum="exp_avg",
    accumulators={"exp_avg": always, "exp_avg_sq": always},
    clock="step",
    numbers=(
        number("lr"),
        several("betas", "beta1", "beta2"),
        *map(number, ("eps", "weight_decay")),
        *map(flag, ("decoupled_weight_decay", "maximize")),
        choice("foreach"),
    ),
    freeze=_freeze,
)
