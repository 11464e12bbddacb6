"""Adam (Kingma and Ba 2015), AMSGrad (Reddi et al. 2018) and AdamW (Loshchilov and Hutter 2019), as in torch.

    g = sign * gradient                    (+ weight_decay * theta for Adam)
    m = beta1 m + (1 - beta1) g            v = beta2 v + (1 - beta2) g^2
    theta' = theta - lr / (1 - beta1^t) * m / (sqrt(v / (1 - beta2^t)) + eps)      (- lr weight_decay theta for AdamW)

Frozen: the preconditioner made of v. Linear in the gradients: m.
"""

from collections.abc import Callable, Mapping
from functools import partial
from math import sqrt
from typing import Any

import torch
from torch import Tensor

from ..kernels.recurrence import Coefficients
from .rule import Hyper, Rule, State, kernels, read_kernels, realised

HYPER = ("lr", "beta1", "beta2", "eps", "weight_decay", "amsgrad", "maximize", "decoupled", "foreach", "fused", "age")


def _read(group: Mapping[str, Any], state: Mapping[str, Any]) -> tuple[float, ...]:
    beta1, beta2 = group["betas"]
    values = (group["lr"], beta1, beta2, group["eps"], group["weight_decay"], group["amsgrad"])
    kind = (group["maximize"], group.get("decoupled_weight_decay", False), *read_kernels(group))
    return tuple(float(v) for v in (*values, *kind, state.get("step", 0.0)))


def _options(h: Hyper) -> dict[str, Any]:
    flags = {"amsgrad": "amsgrad", "maximize": "maximize", "decoupled_weight_decay": "decoupled"}
    values = {key: h[key] for key in ("lr", "eps", "weight_decay")} | {"betas": (h["beta1"], h["beta2"])}
    return values | {key: bool(h[name]) for key, name in flags.items()} | kernels(h)


def _resume(h: Hyper, state: State) -> dict[str, Tensor]:
    if not h["age"]:
        return {}
    kept = {key: value for key, value in state.items() if h["amsgrad"] or key != "max_exp_avg_sq"}
    return {"step": torch.tensor(h["age"], dtype=torch.get_default_dtype()), **kept}


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
    return Coefficients(keep, feed * sign, rate * keep, rate * (feed * sign), coupled, _decoupled(h, rounded)), after


def _decoupled(h: Hyper, rounded: Callable[[float], float]) -> float:
    """The share of theta that AdamW takes off: the fused kernel subtracts it, the others multiply by what is left."""
    if not h["decoupled"]:
        return 0.0
    product = h["lr"] * h["weight_decay"]
    return rounded(product) if h["fused"] > 0 else 1 - rounded(1 - product)


# torch.optim.AdamW is Adam with `decoupled_weight_decay` set, which `_read` sees.
ADAM = Rule("Adam", "exp_avg", ("exp_avg_sq", "max_exp_avg_sq"), HYPER, _read, _freeze, _options, _resume)
