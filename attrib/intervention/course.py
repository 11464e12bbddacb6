"""A training in progress. Each step calls the hooks of the interventions, and knows none of their kinds.

    l  = loss(model, *inputs)                           (B,)
    l' = the hooks `loss` applied to l, one by one      (B,)
    w  = d sum(l') / d l                                (B,), ones where none is active

The gradient of the mean or the sum of l' is that of w * l: so w * l is trained on and recorded, with w the last tensor of
the batch. Exact for gradients, whatever differentiable function the hooks are; the loss that is logged is that of w * l.
Penalties are added to the reduced loss.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ..autocast import switched_off, under
from ..errors import ReplayError
from ..generators import generators, random_state
from ..optim import set_options
from ..run import Run
from .base import Intervention
from .during import weighted
from .schedule import Schedule

Backward = Callable[[Tensor, nn.Module], Any]


class Stepper(Protocol):
    """What makes the steps: a recorder, or an optimizer by itself."""

    def zero_grad(self) -> None: ...

    def step(self, index: Any, *batch: Tensor) -> None: ...


@dataclass(frozen=True)
class Course:
    """What was recorded, what is changed, the copies that are trained; set up by `prepare`.

    loss: of each example, as given; backward: what is done with the losses (B,).
    """

    run: Run
    steps: range
    interventions: tuple[Intervention, ...]
    model: nn.Module
    optimizer: torch.optim.Optimizer
    loss: Callable[..., Tensor]
    backward: Backward
    schedule: Schedule

    @property
    def has_penalty(self) -> bool:
        return any(change.penalty is not None for change in self.interventions)

    @property
    def has_weights(self) -> bool:
        return any(change.loss is not None for change in self.interventions)

    @property
    def recorded_loss(self) -> Callable[..., Tensor]:
        """The loss of the batches that are recorded."""
        return weighted(self.loss) if self.has_weights else self.loss

    @property
    def random(self) -> Tensor | None:
        """The generators' state to begin with where the record has none: beyond its end, that before its last step."""
        beyond = self.steps.start == self.run.steps
        return self.run.random_state(self.steps.start - 1) if beyond else None

    def describe(self) -> dict[str, Any]:
        """For the header of the replay, JSON."""
        described = [change.describe() for change in self.interventions]
        return {"run": str(self.run.reader.target), "start": self.steps.start, "interventions": described}

    def set_modes(self) -> None:
        """Train and eval modes as recorded."""
        modes = set(self.run.header["training"])
        for name, module in self.model.named_modules():
            module.training = name in modes

    def penalty(self, step: int, model: nn.Module) -> Tensor:
        """The sum of all penalties of a step; a constant where there is none."""
        hooks = [change.penalty for change in self.interventions if change.penalty is not None]
        penalties = [p for hook in hooks if (p := hook(step, model)) is not None]
        for p in penalties:
            if p.numel() != 1:
                raise ReplayError(f"a penalty is not a number: got shape {tuple(p.shape)}, expected a scalar tensor.")
        return sum(penalties, torch.zeros((), dtype=self.run.dtype))

    def step(self, step: int, random: Tensor | None, stepper: Stepper) -> Tensor | None:
        """Make a step; random: the generators' state after the last one, where it is kept. Returns that after this one."""
        scheduled = self.schedule.step(step)
        set_options(self.optimizer, self.run.rule, scheduled.hyper)
        for change in self.interventions:
            change.options(self.run, step, self.optimizer)
        ids, inputs = scheduled.ids, scheduled.batch
        for change in self.interventions:
            ids, inputs = change.batch(step, (ids, inputs))
        before = random if scheduled.random is None else scheduled.random
        with random_state(before), switched_off():
            stepper.zero_grad()
            batch = self._differentiate(step, ids, inputs)
            stepper.step(ids, *batch)
            return None if before is None else generators()

    def _differentiate(self, step: int, ids: np.ndarray, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Fill p.grad; returns the batch as it is recorded."""
        if (penalty := self.penalty(step, self.model)).requires_grad:
            penalty.backward()  # first, so that a backward that clips sees it
        torch.clear_autocast_cache()  # within a caller's autocast it would hold the weights as they were a step before
        with under(self.run.autocast, self.model):
            batch, losses = inputs, self.loss(self.model, *inputs)
        if self.has_weights:
            weights = self._weights(step, losses, ids)
            batch, losses = (*inputs, weights), weights * losses
        self.backward(losses, self.model)
        for change in self.interventions:
            change.gradient(self.run, step, self.model)
        if all(p.grad is None for p in self.model.parameters()):
            raise ReplayError(f"nothing would train: got all parameters frozen, expected some to move, at step {step}.")
        return batch

    def _weights(self, step: int, losses: Tensor, ids: np.ndarray) -> Tensor:
        """w (B,): see above."""
        free = losses.detach().to(self.run.dtype).requires_grad_()
        changed = free
        for change in self.interventions:
            changed = changed if change.loss is None else change.loss(step, changed, ids)
        if changed.shape != free.shape:
            raise ReplayError(
                f"the changed losses are not one per example: got shape {tuple(changed.shape)}, expected "
                f"{tuple(free.shape)}, at step {step}. Return the losses (B,) from the hook `loss`."
            )
        return torch.autograd.grad(changed.sum(), free)[0].contiguous()
