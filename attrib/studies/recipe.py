"""What the recipes share: a recorded training loop and a loss per example."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..recorder import record


def cross_entropy(model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    """(B,) cross-entropy of each example, in nats; over positions (B, T) their mean."""
    losses = F.cross_entropy(model(x).movedim(-1, 1), y, reduction="none")
    return losses.reshape(len(x), -1).mean(1)


def train_recorded(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss: Callable[..., Tensor],
    batches: Iterable[tuple[Tensor, ...]],
    store: Any,
    scheduler: Callable[[Any], Any] | None = None,
    after_step: Callable[[int], bool] | None = None,
    **options: Any,
) -> None:
    """Train on `batches` of (index, *tensors), recording every step.

    scheduler: from the recorder to a torch scheduler. after_step: called with the number of steps made; True stops.
    """
    with record(optimizer, model, loss, store, **options) as recorder:
        schedule = scheduler(recorder) if scheduler else None
        for step, (index, *batch) in enumerate(batches, start=1):
            recorder.zero_grad()
            loss(model, *batch).mean().backward()
            recorder.step(index, *batch)
            if schedule is not None:
                schedule.step()
            if after_step is not None and after_step(step):
                break
