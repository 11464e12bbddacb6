"""What a loss must be."""

from math import isfinite
from typing import Any

import torch
from torch import Tensor

from .batch import Batch
from .errors import LossError


def first_line(error: Exception) -> str:
    """What an error says, in one line."""
    return f"{type(error).__name__}: {str(error).splitlines()[0]}" if str(error) else type(error).__name__


def check_graph(error: RuntimeError) -> None:
    """Raise LossError where it says that a checkpoint of the loss cannot be gone through again."""
    if "checkpoint" in str(error):
        raise LossError(
            f"the loss cannot be differentiated again: got {first_line(error)} Pass use_reentrant=False to "
            f"torch.utils.checkpoint.checkpoint."
        ) from error


def check_losses(losses: Any, batch: Batch) -> Tensor:
    """Return the losses if they are (B,) and finite, else raise LossError."""
    return check_finite(check_shape(losses, batch))


def check_shape(losses: Any, batch: Batch) -> Tensor:
    """Return the losses if they are (B,), else raise LossError."""
    size = batch.size
    if not isinstance(losses, Tensor) or losses.dim() != 1 or len(losses) != size:
        got = f"shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else type(losses).__name__
        raise LossError(
            f"the loss is not one number per example: got {got}, expected shape ({size},). "
            f'Return per-example losses (reduction="none"); reduce them in the training loop.'
        )
    return losses


def check_finite(losses: Tensor) -> Tensor:
    """Return losses (B,), or an objective (1,), if they are finite, else raise LossError."""
    if not isfinite(float(losses.detach().sum())) and not torch.isfinite(losses).all():  # a finite sum says it for all
        bad = int((~torch.isfinite(losses)).nonzero()[0, 0])
        raise LossError(
            f"the loss is not finite: got {float(losses[bad].detach())}, expected a finite number, at slot {bad} of the "
            f"batch. The step was refused; parameters and store are as they were."
        )
    return losses


def check_objective(values: Any, batch: Batch) -> Tensor:
    """Return losses (B,), or a scalar as (1,), if they are finite, else raise LossError."""
    if isinstance(values, Tensor) and values.dim() == 0:
        return check_finite(values[None])
    return check_losses(values, batch)
