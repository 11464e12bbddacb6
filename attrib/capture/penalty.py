"""The gradient of what the loop adds to the reduced loss that is no example's."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..errors import LossError
from ..functional import buffers_kept


def penalty_gradients(
    penalty: Callable[[nn.Module], Tensor], model: nn.Module, parameters: Sequence[Tensor]
) -> list[Tensor]:
    """Of each parameter, not clipped; zeros where p.grad is None.

    Raises:
        LossError: it is not a finite scalar.
    """
    with buffers_kept(model):
        value = penalty(model)
    if not isinstance(value, Tensor) or value.numel() != 1 or not bool(torch.isfinite(value).all()):
        raise LossError(f"the penalty is not a number: got {value!r}, expected a finite scalar tensor.")
    moved = [p for p in parameters if p.grad is not None]
    empty: list[Tensor | None] = [None] * len(moved)
    pulled = torch.autograd.grad(value, moved, allow_unused=True) if value.requires_grad and moved else empty
    found = dict(zip(map(id, moved), pulled, strict=True))
    return [torch.zeros_like(p) if (g := found.get(id(p))) is None else g for p in parameters]
