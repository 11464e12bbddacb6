"""A run trained again with some examples left out or weighted, and measured at its end: what a worker does.

Each retraining begins at the first step whose batch holds one of its examples: until then it is the run itself, bit for bit.
"""

import itertools
import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from ..errors import ReplayError
from ..functional import Functional, training_modes
from ..intervention import Drop, Intervention, Penalty, Reweight, retrain
from ..intervention.prepare import reduction_of
from ..intervention.schedule import Schedule, Scheduled
from ..path import Measured
from ..query import state_of
from ..run import Run
from .together import Stack, Weighing, obstacle

log = logging.getLogger("attrib")

_PENALTY = "It was recorded with a penalty in the loss: pass it as penalty=."
TOGETHER_BYTES = 256 << 20  # that retrainings side by side hold at once
MOST = 64  # of them: beyond it nothing is gained


@dataclass(frozen=True)
class Changes:
    """Retrainings. changed: (R, N) bool over the run's examples; weight: (R,), of these, NaN leaves them out."""

    changed: np.ndarray
    weight: np.ndarray

    def __len__(self) -> int:
        return len(self.weight)

    def __iter__(self) -> Iterator[tuple[np.ndarray, float]]:
        return zip(self.changed, self.weight.tolist(), strict=True)

    def at(self, chosen: Sequence[int]) -> "Changes":
        return Changes(self.changed[chosen], self.weight[chosen])


def intervention(run: Run, changed: np.ndarray, weight: float) -> Intervention:
    """What makes one of them. changed: (N,)."""
    ids = run.examples[changed].tolist()
    return Drop(ids) if np.isnan(weight) else Reweight(dict.fromkeys(ids, weight))


@dataclass(frozen=True)
class Retraining:
    """model: a copy is trained. measured: at the end of it. backward, penalty: as for `retrain_subsets`. Pickles."""

    run: Run
    model: nn.Module
    loss: Callable[..., Tensor]
    measured: Measured
    backward: Callable[..., Any] | None
    penalty: Callable[[nn.Module], Tensor] | None

    def __reduce__(self) -> tuple[Any, ...]:
        return Retraining, tuple(getattr(self, field.name) for field in fields(self))  # not what was cached

    def outcomes(self, changes: Changes, together: bool) -> np.ndarray:
        """(R, Q). together: side by side."""
        states = self._together(changes) if together else itertools.starmap(self._alone, changes)
        return np.stack([self.measured.values(state).double().cpu().numpy() for state in states])

    # one at a time

    def _alone(self, changed: np.ndarray, weight: float) -> Tensor:
        states = self._retrain(self._first(changed), [intervention(self.run, changed, weight)])
        ((_, trained),) = deque(states, maxlen=1)
        return state_of(self.run, trained)

    def _retrain(self, start: int, changes: Sequence[Intervention]) -> Iterator[tuple[int, nn.Module]]:
        every = [*changes, *([] if self.penalty is None else [Penalty(self.penalty)])]
        return retrain(self.run, start, every, model=self.model, loss=self.loss, backward=self.backward)

    def _gradient(self, start: int, changes: Sequence[Intervention]) -> Tensor:
        """(P,) on the CPU: p.grad of the first step of a retraining."""
        states = self._retrain(start, changes)
        next(states)
        own = dict(next(states)[1].named_parameters())
        each = ((own[name], own[name].grad) for name in self.run.groups)
        return self.run.layout.flatten(torch.zeros_like(p) if g is None else g for p, g in each).cpu()

    def check(self) -> None:
        """Raise ReplayError where the first step of the run, made again as it was, has another gradient than was recorded:
        every outcome would be that of another training."""
        gap = distance(self._gradient(0, []), self.run.reader.tensor("gradient", 0))
        if not gap <= self.bound:
            missing = self.penalty is None and "penalty" in self.run.reader
            hint = _PENALTY if missing else "Pass model, loss and backward= as they were when recording."
            raise ReplayError(
                f"the run cannot be trained again so: got a gradient that is off by {gap:.2g} of the recorded one, expected "
                f"at most {self.bound:.2g}, at step 0 of {self.run.reader.target}. {hint}"
            )

    @property
    def bound(self) -> float:
        """On the difference of two gradients of one step, relative to their size."""
        return float(torch.finfo(self.run.precision).eps ** 0.5)

    @cached_property
    def _index(self) -> np.ndarray:
        return self.run.reader.read("index", slice(0, self.run.steps))

    def _first(self, changed: np.ndarray) -> int:
        """The first step whose batch holds a changed example."""
        return int(np.isin(self._index, self.run.numbers[changed]).any(1).argmax())

    # side by side

    def obstacle(self) -> str | None:
        """Why they are not trained side by side; None where they may be."""
        if self.backward is not None or self.penalty is not None:
            return "the loop did more than take the mean or the sum"
        return obstacle(self.run)

    def together_at_most(self, changes: Changes) -> int:
        """How many fit into memory side by side; 1 where they do not map, or a gradient is not the one that it is alone."""
        two, start = changes.at([0, 0]), self._first(changes.changed[0])
        held = [0]

        def note(t: Tensor) -> Tensor:
            held[0] += t.numel() * t.element_size()
            return t

        try:
            with self._stack(two, start) as (stack, made_of), saved_tensors_hooks(note, lambda t: t):
                stack.backward(*made_of(start))
        except (RuntimeError, ValueError) as error:
            log.info("retrainings are made one at a time: they do not map, %s", error)
            return 1
        alone = self._gradient(start, [intervention(self.run, *next(iter(two)))])
        gap = distance(stack.gradients()[0].cpu(), alone)
        if not gap <= self.bound:
            log.info("retrainings are made one at a time: side by side a gradient is off by %.2g", gap)
            return 1
        vectors = (3 + len(self.run.rules.state)) * alone.numel() * alone.element_size()
        return min(MOST, max(1, TOGETHER_BYTES // (held[0] // 2 + vectors)))

    def _together(self, changes: Changes) -> Tensor:
        """(R, P)."""
        start = min(map(self._first, changes.changed))
        with self._stack(changes, start) as (stack, made_of):
            for step in range(start, self.run.steps):
                stack.step(*made_of(step))
        return stack.vectors()

    @contextmanager
    def _stack(self, changes: Changes, start: int) -> Iterator[tuple[Stack, Callable[[int], tuple[Scheduled, Tensor]]]]:
        """Before a step, the model in the recorded modes; and step -> what it is made of, the examples' factors (R, B)."""
        model, run = self._copy, self.run
        like = next(model.parameters())
        weighing = Weighing(run, reduction_of(run, 0, run.steps), changes.changed, changes.weight)
        schedule = Schedule(run, like.device, None)

        def made_of(step: int) -> tuple[Scheduled, Tensor]:
            scheduled = schedule.step(step)
            factors = weighing.factors(self._index[step], [len(p.ids) for p in scheduled.passes])
            return scheduled, torch.from_numpy(factors).to(like)

        loss = Functional(model, self.loss, run.layout, run.compute)
        with training_modes(model, run.header["training"]):
            yield Stack(run, loss, start, len(changes), like.device), made_of

    @cached_property
    def _copy(self) -> nn.Module:
        """The model with all that the run holds."""
        model = deepcopy(self.model)
        self.run.load(model, 0)
        return model


def distance(found: Tensor, expected: Tensor) -> float:
    """Of two vectors, relative to the second's size."""
    size = float(expected.norm())
    return float((found - expected).norm()) / (size or 1.0)
