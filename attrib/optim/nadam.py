"""NAdam (Dozat 2016), as torch.optim.NAdam computes it.

    g = sign * gradient (+ weight_decay * theta, unless that is decoupled: then -lr weight_decay theta)
    mu_t = beta1 (1 - 0.96^(t momentum_decay) / 2)     p_t = p_{t-1} mu_t
    m = beta1 m + (1 - beta1) g                        v = beta2 v + (1 - beta2) g^2
    D = sqrt(v / (1 - beta2^t)) + eps
    theta' = theta - lr (1 - mu_t) / (1 - p_t) * g / D - lr mu_{t+1} / (1 - p_t mu_{t+1}) * m / D

Frozen: D, of v, and the schedule of mu. Linear in the gradients: m.
"""

import torch
from torch import Tensor

from ..kernels.recurrence import Coefficients
from .numbers import choice, flag, number, several
from .rule import Options, Rule, State, always, averaged, decays


def _freeze(o: Options, state: State, gradient: Tensor, theta: Tensor) -> tuple[Coefficients, State]:
    sign, coupled, decoupled, g = decays(o, gradient, theta)
    lr, (beta1, beta2), t = o["lr"], o["betas"], o["age"] + 1
    mu, following = (beta1 * (1.0 - 0.5 * (0.96 ** (n * o["momentum_decay"]))) for n in (t, t + 1))
    product = float(torch.as_tensor(o["mu_product"] * mu))  # in the type of torch's state
    variance = (state["exp_avg_sq"] * beta2).addcmul_(g, g, value=1 - beta2)
    denominator = variance.div(1 - beta2**t).sqrt_().add_(o["eps"])
    direct = float(lr * (1.0 - mu) / (1.0 - product)) / denominator
    averaging = float((lr * following) / (1.0 - product * following)) / denominator
    frozen = averaged(sign, averaging, direct, beta1, theta.dtype, coupled=coupled, decoupled=decoupled)
    return frozen, {"exp_avg_sq": variance}


NADAM = Rule(
    name="NAdam",
    momentum="exp_avg",
    accumulators={"exp_avg": always, "exp_avg_sq": always},
    clock="step",
    scalars={"mu_product": (number("mu_product"), lambda options: torch.ones((), dtype=torch.get_default_dtype()))},
    numbers=(
        number("lr"),
        several("betas", "beta1", "beta2"),
        *map(number, ("eps", "weight_decay", "momentum_decay")),
        *map(flag, ("decoupled_weight_decay", "maximize")),
        choice("foreach"),
    ),
    freeze=_freeze,
)
