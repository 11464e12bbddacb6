"""Adam (Kingma and Ba 2015), AMSGrad (Reddi et al. 2018) and AdamW (Loshchilov and Hutter 2019), as in torch.

    g = sign * gradient                    (+ weight_decay * theta for Adam)
    m = beta1 m + (1 - beta1) g            v = beta2 v + (1 - beta2) g^2
    theta' = theta - lr / (1 - beta1^t) * m / (sqrt(v / (1 - beta2^t)) + eps)      (- lr weight_decay theta for AdamW)

Frozen: the preconditioner made of v. Linear in the gradients: m.
"""

from collections.abc import Callable
from functools import partial
from math import sqrt

import torch
from torch import Tensor

from ..kernels.recurrence import Coefficients
from .numbers import choice, flag, number, several
from .rule import Hyper, Rule, State, realised


def _freeze(h: Hyper, state: State, gradient: Tensor, theta: Tensor) -> tuple[Coefficients, State]:
    sign = -1.0 if h["maximize"] else 1.0
    t = h["age"] + 1
    rounded = partial(realised, dtype=theta.dtype)
    coupled = 0.0 if h["decoupled"] else sign * rounded(h["weight_decay"])
    g = torch.add(gradient, theta, alpha=coupled) if coupled else gradient
    second = (state["exp_avg_sq"] * h["beta2"]).addcmul_(g, g, value=1 - h["beta2"])
    after = {"exp_avg_sq": second}
    if h["amsgrad"]:
        second = after["max_exp_avg_sq"] = torch.maximum(state["max_exp_avg_sq"], second)
    denominator = second.sqrt().div_(sqrt(1 - h["beta2"] ** t)).add_(h["eps"])
    rate = (h["lr"] / (1 - h["beta1"] ** t)) / denominator
    feed = rounded(1 - h["beta1"])  # torch: m + feed (g - m)
    keep = 1 - feed
    frozen = Coefficients(
        keep=keep,
        feed=feed * sign,
        apply_old=rate * keep,
        apply_new=rate * (feed * sign),
        coupled=coupled,
        decoupled=_decoupled(h, rounded),
    )
    return frozen, after


def _decoupled(h: Hyper, rounded: Callable[[float], float]) -> float:
    """The share of theta that AdamW takes off: the fused kernel subtracts it, the others multiply by what is left."""
    if not h["decoupled"]:
        return 0.0
    product = h["lr"] * h["weight_decay"]
    return rounded(product) if h["fused"] > 0 else 1 - rounded(1 - product)


ADAM = Rule(
    name="Adam",
    momentum="exp_avg",
    moments={"exp_avg_sq": None, "max_exp_avg_sq": "amsgrad"},
    clock="step",
    numbers=(
        number("lr"),
        several("betas", "beta1", "beta2"),
        *map(number, ("eps", "weight_decay")),
        *map(flag, ("amsgrad", "maximize")),
        flag("decoupled_weight_decay", "decoupled"),  # torch.optim.AdamW is Adam with this set
        *map(choice, ("foreach", "fused")),
    ),
    freeze=_freeze,
)
