"""The rule of an optimizer of which nothing is known but what it did: rule="frozen".

    Delta = -D g + rest        D = -Delta / g,  0 where |g| is tiny beside the tensor's gradient

Frozen: D, entry by entry, read off the update that was made. Linear in the gradients: the update, as far as D explains it.
There is no momentum: what an earlier gradient still does counts for the gradient of the step, as does weight decay; so the
contributions are no double sum over steps, and the next state cannot be had from the one before. What D cannot explain is
the rest, as where g is 0.
Tiny: see `rule.known_entries`.
"""

import torch
from torch import Tensor

from ..kernels.recurrence import Coefficients
from .rule import Options, Rule, State, known_entries


def read_off(gradient: Tensor, delta: Tensor) -> Coefficients:
    """Of one tensor, (P,) each: its gradient and the update that was made."""
    known = known_entries(gradient)
    quotient = torch.where(known, -delta / torch.where(known, gradient, 1.0), 0.0)
    return Coefficients(keep=1.0, feed=0.0, apply_old=0.0, apply_new=quotient)


def _freeze(o: Options, state: State, gradient: Tensor, theta: Tensor) -> tuple[Coefficients, State]:
    raise NotImplementedError("what was done to a tensor is read off, not foreseen")


FROZEN = Rule(name="frozen", numbers=(), freeze=_freeze, whole=True, unmodelled=True, read_off=True)
