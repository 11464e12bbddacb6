"""Adam (Kingma and Ba 2015), AMSGrad (Reddi et al. 2018) and AdamW (Loshchilov and Hutter 2019), as in torch.

    g = sign * gradient                    (+ weight_decay * theta for Adam)
    m = beta1 m + (1 - beta1) g            v = beta2 v + (1 - beta2) g^2
    theta' = theta - lr / (1 - beta1^t) * m / (sqrt(v / (1 - beta2^t)) + eps)      (- lr weight_decay theta for AdamW)

Frozen: the preconditioner made of v. Linear in the gradients: m.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..kernels.recurrence import Coefficients
from .numbers import choice, flag, number, several
from .rule import Options, Rule, State, always, realised, taken_off, where


def _freeze(o: Options, state: State, gradient: Tensor, theta: Tensor) -> tuple[Coefficients, State]:
    sign, fused = -1.0 if o["maximize"] else 1.0, bool(o["fused"])
    lr, decay, (beta1, beta2) = o["lr"], o["weight_decay"], o["betas"]
    if fused:  # whose kernels take numbers
        lr, decay, beta1, beta2 = map(float, (lr, decay, beta1, beta2))
    t, rounded = o["age"] + 1, partial(realised, dtype=theta.dtype)
    coupled = 0.0 if o["decoupled_weight_decay"] else sign * rounded(decay)
    g = torch.add(gradient, theta, alpha=coupled) if coupled else gradient
    second = (state["exp_avg_sq"] * beta2).addcmul_(g, g, value=float(1 - beta2))
    after = {"exp_avg_sq": second}
    if o["amsgrad"]:
        second = after["max_exp_avg_sq"] = torch.maximum(state["max_exp_avg_sq"], second)
    denominator = second.sqrt().div_((1 - beta2**t) ** 0.5).add_(o["eps"])
    rate = float(lr / (1 - beta1**t)) / denominator
    feed = rounded(1 - (beta1.to(theta) if isinstance(beta1, Tensor) else beta1))  # torch: m + feed (g - m)
    keep = 1 - feed
    frozen = Coefficients(
        keep=keep,
        feed=feed * sign,
        apply_old=rate * keep,
        apply_new=rate * (feed * sign),
        coupled=coupled,
        decoupled=_decoupled(lr * decay, fused, theta.dtype) if o["decoupled_weight_decay"] else 0.0,
    )
    return frozen, after


def _decoupled(product: Any, fused: bool, dtype: torch.dtype) -> float:
    """The share of theta that AdamW takes off: the fused kernel subtracts it, the others multiply by what is left."""
    return realised(product, dtype) if fused else taken_off(product, dtype)


ADAM = Rule(
    name="Adam",
    momentum="exp_avg",
    accumulators={"exp_avg": always, "exp_avg_sq": always, "max_exp_avg_sq": where("amsgrad")},
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
    # decay into g, g into m; v twice, and g squared in it twice, halved by the root; the root, its quotient, eps; the rate
    # and the correction of m by its age, as tensors
    roundings=9,
)
