"""What a loss and a model must be for their gradient to split over examples."""

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CoupledExamplesError, LossError


def refuse_coupling(model: nn.Module) -> None:
    """Raise CoupledExamplesError for a module that uses the statistics of its batch."""
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or module.running_mean is None):
            raise CoupledExamplesError(
                f"a module couples the examples of a batch: got {type(module).__name__} in train mode, expected eval "
                f"mode, at {name!r}. Call model.get_submodule({name!r}).eval() before training, or use GroupNorm."
            )


def check_losses(losses: Any, batch: tuple[Any, ...]) -> Tensor:
    """Return the losses if they are (B,) and finite, else raise LossError."""
    size = next((len(a) for a in batch if isinstance(a, Tensor) and a.dim()), None)
    if not isinstance(losses, Tensor) or losses.dim() != 1 or (size is not None and len(losses) != size):
        got = f"shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else type(losses).__name__
        raise LossError(
            f"the loss is not one number per example: got {got}, expected shape ({size},). "
            f'Return per-example losses (reduction="none"); reduce them in the training loop.'
        )
    if not torch.isfinite(losses).all():
        bad = int((~torch.isfinite(losses)).nonzero()[0, 0])
        raise LossError(
            f"the loss is not finite: got {float(losses[bad].detach())}, expected a finite number, at slot {bad} of the "
            f"batch. The step was refused; parameters and store are as they were."
        )
    return losses
