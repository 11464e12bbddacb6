"""Lion (Chen et al. 2023), as the package lion-pytorch computes it.

    u = beta1 m + (1 - beta1) g            theta' = theta - lr weight_decay theta - lr sign(u)
    m = beta2 m + (1 - beta2) g            sign(u) = u / |u|

Frozen: 1 / |u|, 0 where u is 0. Linear in the gradients: m, and u, of which only the sign is left: the examples share lr as
they share |u|. Where |u| is tiny, and its sign that of rounding, the update is no example's: it is left to a row of its own.
"""

from torch import Tensor

from ..kernels.recurrence import Coefficients
from .numbers import number, several
from .rule import MOMENTUM, Options, Rule, State, always, inverse_size, realised, taken_off


def _freeze(o: Options, state: State, gradient: Tensor, theta: Tensor) -> tuple[Coefficients, State]:
    lr, (beta1, beta2) = o["lr"], o["betas"]
    u = (state[MOMENTUM] * beta1).add_(gradient, alpha=1 - beta1)
    size = (realised(lr, theta.dtype) * inverse_size(u)).reshape(-1)
    frozen = Coefficients(
        keep=realised(beta2, theta.dtype),
        feed=realised(1 - beta2, theta.dtype),
        apply_old=size * beta1,
        apply_new=size * (1 - beta1),
        decoupled=taken_off(lr * o["weight_decay"], theta.dtype),
    )
    return frozen, {
        MOMENTUM: (state[MOMENTUM] * beta2).add_(gradient, alpha=1 - beta2)
    }  # to the bit: a sign hangs on it


LION = Rule(
    name="Lion",
    momentum="exp_avg",
    accumulators={"exp_avg": always},
    numbers=(number("lr"), several("betas", "beta1", "beta2"), number("weight_decay")),
    freeze=_freeze,
    whole=True,
    unmodelled=True,
)
