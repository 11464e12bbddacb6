"""Schedule-free SGD and AdamW (Defazio et al. 2024), as the package schedulefree computes them, in train mode.

The parameters are y; z are those that plain steps would move, and d = z - y:

    g = gradient + weight_decay * y        AdamW: gradient / D + weight_decay * y,  D = sqrt(v / (1 - beta2^t)) + eps
    y' = y + c (z - y) + r (beta (1 - c) - 1) g,  z' = z - r g                  c, r: of the schedule of averaging
    so  Delta = c d + r (beta (1 - c) - 1) g,     d' = (1 - c) d - r beta (1 - c) g,     d = 0 at the start

Frozen: D, of v, and the schedule. Linear in the gradients: d. AdamW's decay is beside D: in the gradient it is weight_decay
times D, entry by entry. What is recorded and measured is y; evaluate a copy of the model, since `optimizer.eval()` moves the
parameters and `train()` brings them back to other bits.
"""

from typing import NamedTuple

from torch import Tensor

from ..kernels.recurrence import Coefficients
from .numbers import Numbers, choice, count, flag, number, several
from .rule import Options, Rule, State, always


class Averaging(NamedTuple):
    """Of a step: its rate and the weight of z."""

    rate: float
    weight: float


def _averaging(o: Options) -> Averaging:
    k, warmup = o["k"], o["warmup_steps"]
    rate = o["lr"] * ((k + 1) / warmup if k < warmup else 1.0)
    weight = ((k + 1) ** o["r"]) * (max(rate, o["lr_max"]) ** o["weight_lr_power"])
    total = o["weight_sum"] + weight
    return Averaging(float(rate), float(weight / total) if total else 0.0)


def _moved(o: Options, inverse: float | Tensor, beta: float) -> Coefficients:
    """inverse: 1 / D."""
    rate, weight = _averaging(o)
    kept = beta * (1 - weight)
    return Coefficients(
        keep=1 - weight,
        feed=-rate * kept * inverse,
        apply_old=-weight,
        apply_new=rate * (1 - kept) * inverse,
        coupled=o["weight_decay"] / inverse if o["weight_decay"] else 0.0,
    )


def _after(o: Options, state: State, theta: Tensor, g: Tensor) -> Tensor:
    return (state["z"] if o["age"] else theta) - _averaging(o).rate * g


def _freeze_sgd(o: Options, state: State, gradient: Tensor, theta: Tensor) -> tuple[Coefficients, State]:
    decay = o["weight_decay"]
    frozen = _moved(o, 1.0, o["momentum"])
    return frozen, {"z": _after(o, state, theta, gradient.add(theta, alpha=decay) if decay else gradient)}


def _freeze_adamw(o: Options, state: State, gradient: Tensor, theta: Tensor) -> tuple[Coefficients, State]:
    beta1, beta2 = o["betas"]
    variance = (state["exp_avg_sq"] * beta2).addcmul_(gradient, gradient, value=1 - beta2)
    inverse = variance.div(1 - beta2 ** (o["k"] + 1)).sqrt_().add_(o["eps"]).reciprocal_()
    frozen = _moved(o, inverse, beta1)
    z = _after(o, state, theta, (gradient * inverse).add_(theta, alpha=o["weight_decay"]))
    return frozen, {"z": z, "exp_avg_sq": variance}


_COUNTS = ("k", "weight_sum", "lr_max", "scheduled_lr", "train_mode")  # what the optimizer keeps in its groups
_SHARED: tuple[Numbers, ...] = (
    *map(number, ("lr", "r", "weight_sum", "lr_max", "scheduled_lr", "weight_lr_power", "weight_decay")),
    *map(count, ("k", "warmup_steps")),
    flag("train_mode"),
    choice("foreach"),
)

SGD_SCHEDULE_FREE = Rule(
    name="SGDScheduleFree",
    momentum="z",
    from_parameters=True,
    accumulators={"z": always},
    numbers=(*_SHARED, number("momentum")),
    counts=_COUNTS,
    freeze=_freeze_sgd,
)

ADAMW_SCHEDULE_FREE = Rule(
    name="AdamWScheduleFree",
    momentum="z",
    from_parameters=True,
    accumulators={"z": always, "exp_avg_sq": always},
    numbers=(*_SHARED, several("betas", "beta1", "beta2"), number("eps")),
    counts=_COUNTS,
    freeze=_freeze_adamw,
)
