"""Adam (Kingma and Ba 2015), AMSGrad (Reddi et al. 2018) and AdamW (Loshchilov and Hutter 2019), as in torch.

    g = sign * gradient                    (+ weight_decay * theta for Adam)
    m = beta1 m + (1 - beta1) g            v = beta2 v + (1 - beta2) g^2
    theta' = theta - lr / (1 - beta1^t) * m / (sqrt(v / (1 - beta2^t)) + eps)      (- lr weight_decay theta for AdamW)

Frozen: the preconditioner made of v. Linear in the gradients: m.
"""

from collections.abc import Mapping
from math import sqrt
from typing import Any

import torch
from torch import Tensor

from ..kernels.recurrence import Coefficients
from .rule import Hyper, Rule, State

HYPER = ("lr", "beta1", "beta2", "eps", "weight_decay", "amsgrad", "maximize", "decoupled", "age")


def _read(group: Mapping[str, Any], state: Mapping[str, Any]) -> tuple[float, ...]:
    beta1, beta2 = group["betas"]
    values = (group["lr"], beta1, beta2, group["eps"], group["weight_decay"], group["amsgrad"])
    last = (group["maximize"], group.get("decoupled_weight_decay", False), state.get("step", 0.0))
    return tuple(float(v) for v in (*values, *last))


def _freeze(h: Hyper, state: State, gradient: Tensor, theta: Tensor) -> tuple[Coefficients, State]:
    sign = -1.0 if h["maximize"] else 1.0
    lr, beta1, beta2, t = h["lr"], h["beta1"], h["beta2"], h["age"] + 1
    coupled = 0.0 if h["decoupled"] else sign * h["weight_decay"]
    g = torch.add(gradient, theta, alpha=coupled) if coupled else gradient
    second = (state["exp_avg_sq"] * beta2).addcmul_(g, g, value=1 - beta2)
    after = {"exp_avg_sq": second}
    if h["amsgrad"]:
        second = after["max_exp_avg_sq"] = torch.maximum(state["max_exp_avg_sq"], second)
    denominator = second.sqrt().div_(sqrt(1 - beta2**t)).add_(h["eps"])
    rate = (lr / (1 - beta1**t)) / denominator
    feed = (1 - beta1) * sign
    decoupled = lr * h["weight_decay"] if h["decoupled"] else 0.0
    return Coefficients(beta1, feed, rate * beta1, rate * feed, coupled, decoupled), after


# torch.optim.AdamW is Adam with `decoupled_weight_decay` set, which `_read` sees.
ADAM = Rule("Adam", "exp_avg", ("exp_avg_sq", "max_exp_avg_sq"), HYPER, _read, _freeze)
