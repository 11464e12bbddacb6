"""Adafactor (Shazeer and Stern 2018), as torch.optim.Adafactor computes it, a tensor at a time.

    b_t = 1 - t^beta2_decay                rho_t = min(lr, 1 / sqrt(t))        a_t = max(eps2, rms(theta)) rho_t
    R = b_t R + (1 - b_t) mean of g^2 over columns,  C over rows;  V = R C / max(mean of R over rows, eps1)
    (of vectors and numbers: V = b_t V + (1 - b_t) g^2)
    u = g / max(sqrt(V), eps1)             theta' = theta - lr weight_decay theta - a_t u / max(1, rms(u) / d)

Frozen: all that stands before g: V, the size of theta and the clipping of u. Linear in the gradients: the update itself;
there is no momentum. Where V is tiny beside its tensor the gradients are zero but for rounding, since eps1 is so small: that
update is no example's, and has a row of its own.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..kernels.recurrence import Coefficients
from .numbers import Numbers, choice, flag, number
from .rule import Options, Rule, Shape, State, quotient_by, taken_off


def _freeze(o: Options, state: State, gradient: Tensor, theta: Tensor) -> tuple[Coefficients, State]:
    sign, t = -1.0 if o["maximize"] else 1.0, o["age"] + 1
    least, smallest = o["eps"]
    least = torch.finfo(o.get("low") or theta.dtype).eps if least is None else least
    variance, after = _variance(state, sign * gradient, t ** o["beta2_decay"], least)
    root = variance.clamp(min=least * least).sqrt_()
    size = max(smallest, theta.norm(2).item() / theta.numel() ** 0.5) * min(o["lr"], 1 / t**0.5)
    clipped = max(1.0, (gradient / root).norm(2).item() / (theta.numel() ** 0.5 * o["d"]))
    frozen = Coefficients(
        keep=1.0,
        feed=0.0,
        apply_old=0.0,
        apply_new=(sign * float(size / clipped) * quotient_by(root)).reshape(-1),
        decoupled=taken_off(o["lr"] * o["weight_decay"], theta.dtype),
    )
    return frozen, after


def _variance(state: State, g: Tensor, fresh: float, least: float) -> tuple[Tensor, State]:
    if g.dim() < 2:
        variance = state["variance"].lerp(g * g, fresh)
        return variance, {"variance": variance}
    rows = state["row_var"].lerp(torch.norm(g, dim=-1, keepdim=True).square_().div_(g.size(-1)), fresh)
    columns = state["col_var"].lerp(torch.norm(g, dim=-2, keepdim=True).square_().div_(g.size(-2)), fresh)
    variance = (rows @ columns).div_(rows.mean(dim=-2, keepdim=True).clamp_(min=least))
    return variance, {"row_var": rows, "col_var": columns}


def _rows(options: Options, shape: Shape) -> Shape | None:
    return (*shape[:-1], 1) if len(shape) > 1 else None


def _columns(options: Options, shape: Shape) -> Shape | None:
    return (*shape[:-2], 1, shape[-1]) if len(shape) > 1 else None


def _vector(options: Options, shape: Shape) -> Shape | None:
    return shape if len(shape) < 2 else None


def _write(value: Any) -> tuple[float, ...]:
    least, smallest = value
    return (-1.0 if least is None else least, smallest)


def _read(numbers: Sequence[float]) -> tuple[float | None, float]:
    return (None if numbers[0] < 0 else numbers[0], numbers[1])


ADAFACTOR = Rule(
    name="Adafactor",
    accumulators={"row_var": _rows, "col_var": _columns, "variance": _vector},
    clock="step",
    numbers=(
        *map(number, ("lr", "beta2_decay", "d", "weight_decay")),
        Numbers("eps", ("eps1", "eps2"), _write, _read),
        flag("maximize"),
        choice("foreach"),
    ),
    freeze=_freeze,
    whole=True,
    unmodelled=True,
)
