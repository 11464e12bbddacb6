"""A training in progress. Each step calls the hooks of the interventions, and knows none of their kinds.

    l  = loss(model, *inputs)                           (B,)
    l' = the hooks `loss` applied to l, one by one      (B,)
    w  = d sum(l') / d l                                (B,), ones where none is active

The gradient of the mean or the sum of l' is that of w * l: so w * l is trained on and recorded, with w the last tensor of
the batch. Exact for gradients, whatever differentiable function the hooks are; the loss that is logged is that of w * l.
Penalties are added to the reduced loss.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ..autocast import switched_off, under
from ..batch import Batch
from ..errors import ReplayError
from ..functional import buffers_kept
from ..generators import generators, random_state
from ..optim import set_options
from ..run import Run
from .base import Intervention
from .during import NONE_LEFT, weighted
from .schedule import Schedule, ScheduledPass

log = logging.getLogger("attrib")

Backward = Callable[[Tensor, nn.Module], Any]
ReplayedPass = tuple[np.ndarray, tuple[Any, ...], Tensor | None]  # ids, what the loss takes, the generators' state
Reduced = Callable[
    [Tensor, nn.Module, Sequence[int]], Any
]  # the same, knowing how many examples each pass of the step has


class Stepper(Protocol):
    """What makes the steps: a recorder, or an optimizer by itself."""

    def zero_grad(self) -> None: ...

    def batch(self, index: Any, *batch: Any) -> None: ...

    def step(self, index: Any = None, *batch: Any) -> None: ...


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
    backward: Reduced
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
        return {
            "run": str(self.run.reader.target),
            "start": self.steps.start,
            "origin": int(self.run.replayed.get("origin", 0)) + self.steps.start,
            "interventions": described,
            "weighted": self.has_weights,
        }

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
        set_options(self.optimizer, self.run.rules, scheduled.hyper)
        for change in self.interventions:
            change.options(self.run, step, self.optimizer)
        batches = [batch for each in scheduled.passes if len((batch := self._batch(step, each))[0])]
        if not batches:
            raise ReplayError(NONE_LEFT.format(step=step))
        with switched_off():
            stepper.zero_grad()
            if len(batches) == 1:
                self._penalise(step)
                random = self._made_of_one(step, batches[0], random, stepper)
            else:
                random = self._accumulated(step, batches, random, stepper)
        if not self.interventions and step in (self.steps.start, self.steps.stop - 1) and step < self.run.steps:
            self._compare_buffers(step + 1)
        return random

    def _compare_buffers(self, state: int) -> None:
        """Say so where nothing was changed, and what training writes to is not what it was."""
        own = dict(self.model.named_buffers())
        for name, value in self.run.buffers(state).items():
            if not torch.equal(own[name].cpu(), value):
                log.warning(
                    "the replay has other buffers than the run, first at %r, state %d: the loop wrote to them between its "
                    "passes too (another forward pass in train mode?), of which the record holds what came of it alone",
                    *(name, state),
                )
                return

    def _penalise(self, step: int) -> None:
        """First, so that a backward that clips sees it."""
        if (penalty := self.penalty(step, self.model)).requires_grad:
            penalty.backward()

    def _made_of_one(self, step: int, replayed: ReplayedPass, random: Tensor | None, stepper: Stepper) -> Tensor | None:
        ids, inputs, drawn = replayed
        before = random if drawn is None else drawn
        with random_state(before):
            weights = self._differentiate(step, ids, inputs, [len(ids)])
            self._changed(step)
            stepper.step(ids, *inputs, *weights)
            return None if before is None else generators()

    def _accumulated(
        self, step: int, batches: Sequence[ReplayedPass], random: Tensor | None, stepper: Stepper
    ) -> Tensor | None:
        sizes = [len(ids) for ids, _, _ in batches]
        for n, (ids, inputs, drawn) in enumerate(batches):
            before = random if drawn is None else drawn
            with random_state(before):
                self._announce(step, ids, inputs, stepper)
                if n == 0:
                    self._penalise(step)
                self._differentiate(step, ids, inputs, sizes)
                random = None if before is None else generators()
        self._changed(step)
        stepper.step()
        return random

    def _announce(self, step: int, ids: np.ndarray, inputs: tuple[Any, ...], stepper: Stepper) -> None:
        """With the weights, where there are some, that the pass is going to have."""
        weights: list[Tensor] = []
        if self.has_weights:
            with random_state(generators()), buffers_kept(self.model):
                weights = [self._weights(step, self._losses(ids, inputs), ids)]
        stepper.batch(ids, *inputs, *weights)

    def _batch(self, step: int, scheduled: ScheduledPass) -> ReplayedPass:
        ids, inputs = scheduled.ids, scheduled.batch.said
        for change in self.interventions:
            ids, inputs = change.batch(step, (ids, inputs))
        return ids, inputs, scheduled.random

    def _differentiate(self, step: int, ids: np.ndarray, inputs: tuple[Any, ...], sizes: Sequence[int]) -> list[Tensor]:
        """Add to p.grad; returns the weights of the examples, one tensor or none. sizes: of all passes."""
        losses = self._losses(ids, inputs)
        weights = [self._weights(step, losses, ids)] if self.has_weights else []
        self.backward(weights[0] * losses if weights else losses, self.model, sizes)
        return weights

    def _losses(self, ids: np.ndarray, inputs: tuple[Any, ...]) -> Tensor:
        torch.clear_autocast_cache()  # within a caller's autocast it would hold the weights as they were a step before
        with under(self.run.autocast, self.model):
            return self.loss(self.model, *Batch.of(inputs, len(ids)).args)

    def _changed(self, step: int) -> None:
        """The gradients, after all backward passes."""
        for change in self.interventions:
            change.gradient(self.run, step, self.model)
        if all(p.grad is None for p in self.model.parameters()):
            raise ReplayError(f"nothing would train: got all parameters frozen, expected some to move, at step {step}.")

    def _weights(self, step: int, losses: Tensor, ids: np.ndarray) -> Tensor:
        """w (B,): see above."""
        if losses.dim() == 0:
            raise ReplayError(
                f"an objective has no losses to be changed: got a number, expected one per example (B,), at step {step}. "
                f"Replay without a hook `loss`, such as Reweight; Drop takes examples out of the batch."
            )
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
