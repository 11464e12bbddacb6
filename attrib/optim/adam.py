"""Adam (Kingma and Ba 2015), AMSGrad (Reddi et al. 2018) and AdamW (Loshchilov and Hutter 2019), as in torch.

    g = sign * gradient                    (+ weight_decay * theta for Adam)
    m = beta1 m + (1 - beta1) g            v = beta2 v + (1 - beta2) g^2
    theta' = theta - lr / (1 - beta1^t) * m / (sqrt(v / (1 - beta2^t)) + eps)      (- lr weight_decay theta for AdamW)

Frozen: the preconditioner made of v. Linear in the gradients: m.

Two ends of a step, bars for means over them, differences d, r = sqrt(v / (1 - beta2^t)), D = r + eps, u = m / D:

    d u = (d m - ubar d D) / Dbar        d r = d v / (1 - beta2^t) / (r + r')        d g^2 = (g + g') d g

all exact, and derivatives where the ends meet; the maximum of AMSGrad goes to whichever wins, in shares where that changes.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..kernels.discrete import winner_share
from ..kernels.recurrence import Coefficients
from .numbers import choice, flag, number, several
from .rule import MOMENTUM, Adjoint, End, Options, Rule, State, always, mean, realised, taken_off, where


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


def _adjoint(o: Options, a: End, b: End, theta: Tensor, state: State) -> Adjoint:
    ends = (a,) if a is b else (a, b)
    frozen, rest = zip(*(_freeze(o, *end) for end in ends), strict=True)
    keep, feed, coupled = frozen[0].keep, frozen[0].feed, frozen[0].coupled
    correction, eps = 1 - o["betas"][1] ** (o["age"] + 1), float(o["eps"])
    rate = float(o["lr"] / (1 - o["betas"][0] ** (o["age"] + 1)))
    gradients = [torch.add(end.gradient.double(), end.theta.double(), alpha=coupled) for end in ends]
    roots = [
        (after["max_exp_avg_sq" if o["amsgrad"] else "exp_avg_sq"].double() / correction).sqrt_() for after in rest
    ]
    moved = [
        (keep * end.state[MOMENTUM].double()).add_(g, alpha=feed).div_(root + eps)
        for end, g, root in zip(ends, gradients, roots, strict=True)
    ]
    ratio, root, gradient = mean(moved), mean(roots), mean(gradients)
    rates = rate / (root + eps)
    second = theta * (rates * ratio).div_(root).mul_(1 / (2 * correction)).masked_fill_(root == 0, 0.0)
    before = {}  # where v is 0 at both ends, it does not move
    if o["amsgrad"]:
        second = second + state["max_exp_avg_sq"]
        share = _share_of_second(
            [end.state["max_exp_avg_sq"] for end in (a, b)], [rest[n]["exp_avg_sq"] for n in (0, -1)]
        )
        before["max_exp_avg_sq"], second = (1 - share) * second, share * second
    second = second + state["exp_avg_sq"]
    before["exp_avg_sq"] = float(o["betas"][1]) * second
    coefficients = replace(frozen[0], apply_old=rates * keep, apply_new=rates * feed)
    return Adjoint(coefficients, 2 * float(1 - o["betas"][1]) * gradient * second, before)


def _share_of_second(maxima: list[Tensor], seconds: list[Tensor]) -> Tensor:
    """(P,): how much of a change of max(maximum, second) is the second's."""
    (x0, x1), (v0, v1) = ([t.double() for t in pair] for pair in (maxima, seconds))
    wins0, wins1 = v0 >= x0, v1 >= x1
    first = winner_share(
        torch.maximum(x0, v0), torch.maximum(x1, v1), torch.minimum(x0, v0), torch.minimum(x1, v1)
    )  # of the winner at the first end, where they change places
    return torch.where(wins0 == wins1, wins0.double(), torch.where(wins0, first, 1 - first))


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
    adjoint=_adjoint,
    # decay into g, g into m; v twice, and g squared in it twice, halved by the root; the root, its quotient, eps; the rate
    # and the correction of m by its age, as tensors
    roundings=9,
)
