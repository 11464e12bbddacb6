"""One of the runs of a pair, step by step: what its update was made of, and which example had which factor in it.

G_s = clip_s (sum_i c_i d loss_i / d theta + penalty)          c_i = s_i w_i: the reduction, and the weight that i had
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from .batch import Batch
from .budget import slice_bytes
from .clipped import Clipping
from .optim import End
from .penalised import Penalised, Penalising
from .run import Run
from .shares import Shares
from .steps import Blocks, RecordedStep, Steps


class Unweighted:
    """The loss of a replay that was recorded with `intervention.weighted`: without the last tensor of the batch."""

    def __init__(self, loss: Callable[..., Tensor]) -> None:
        self.loss = loss

    def __call__(self, model: nn.Module, *batch: Any) -> Tensor:
        return self.loss(model, *batch[:-1])


class Unrecorded(NamedTuple):
    """What the record does not have of a loop, as its author says. clip: the norm that gradients were clipped to, inf for
    none; None where it is to be found. penalty: the function, model -> scalar; None where it is not asked for."""

    clip: float | None = None
    penalty: Penalising | None = None


NOTHING = Unrecorded()


class Made(NamedTuple):
    """A step of one of the runs. end, hyper (K, H + 1): what its update was made of. slots (B,): its examples among those
    of the pair; scales, weights (B,): s and w. penalty (P,): what of its gradient was one; None for none."""

    recorded: RecordedStep
    end: End
    hyper: np.ndarray
    slots: np.ndarray
    scales: np.ndarray
    weights: np.ndarray
    penalty: Tensor | None
    clip: float

    @property
    def factors(self) -> np.ndarray:
        """(B,): c."""
        return self.scales * self.weights

    @property
    def pass_scales(self) -> np.ndarray:
        """Of each pass its s."""
        return np.array([self.scales[p.slots.start] for p in self.recorded.passes])

    @property
    def examples(self) -> Tensor:
        """(P,) float64: what of the gradient was the examples', before it was clipped."""
        return self.unclipped if self.penalty is None else self.unclipped - self.penalty

    @property
    def unclipped(self) -> Tensor:
        """(P,) float64: the gradient before it was clipped."""
        return self.end.gradient.double() / self.clip

    def at(self, theta: Tensor) -> RecordedStep:
        """The same batch at other parameters, (P,)."""
        return self.recorded._replace(theta=theta)


@dataclass(frozen=True)
class Side:
    """One of the two runs. first: its step that the pair begins with. shares: of its losses, without the weights that
    a replay gave them. places: the number of an example in the run -> among the pair's. unrecorded: of its
    loop."""

    run: Run
    shares: Shares
    first: int
    places: dict[int, int]
    unrecorded: Unrecorded = NOTHING

    def __reduce__(self) -> tuple[Any, ...]:
        return Side, (self.run, self.shares, self.first, self.places, self.unrecorded)

    @cached_property
    def _blocks(self) -> Blocks:
        return Blocks(self.run.trajectory, self.run.steps)

    def within(self, slices: int) -> "Side":
        """The same by passes over slices of so many bytes."""
        return replace(self, shares=self.shares.within(slices))

    def begin(self) -> End:
        """The state that the pair begins with."""
        steps = self._blocks.at(range(self.first, self.first + 1))
        return End(steps.state_before(0), steps.gradient[0], steps.theta[0])

    def active(self, number: int) -> frozenset[str]:
        """The parameters that moved at a step of the pair."""
        return self._step(number)[0].active

    def made(self, number: int, active: frozenset[str]) -> Made:
        """The step `number` of the pair. active: the parameters that moved in either run; where they did not in this one,
        the gradient is what it would have been."""
        steps = self._step(number)
        step, gradient = steps[0]._replace(active=active), steps.gradient[0]
        scales = self._scales(steps[0])
        clip = self.clipping.factor(steps[0], scales, gradient)
        if stood := active - steps[0].active:
            gradient = self._completed(step, gradient, scales * self._weights(step), stood)
        return Made(
            recorded=step,
            end=End(steps.state_before(0), gradient, step.theta),
            hyper=steps.block.hyper[step.number - steps.block.first],
            slots=np.array([self.places[n] for n in step.ids.tolist()]),
            scales=scales / clip,
            weights=self._weights(step),
            penalty=None if steps.penalty is None else steps.penalty[0].double() / clip,
            clip=clip,
        )

    def _step(self, number: int) -> Steps:
        number = self.first + number
        return self._blocks.at(range(number, number + 1))

    def _completed(self, step: RecordedStep, gradient: Tensor, factors: np.ndarray, stood: frozenset[str]) -> Tensor:
        """With that of the losses where parameters stood still."""
        whole, found = self.shares.gradient(step, factors).to(gradient), gradient.clone()
        for name, part in self.run.layout.slices():
            if name in stood:
                found[part] = whole[part]
        return found

    @cached_property
    def clipping(self) -> Clipping:
        return Clipping(self.run, self._blocks, self._scales, self.unrecorded.clip)

    def _scales(self, step: RecordedStep) -> np.ndarray:
        """(B,): s, times the clipping."""
        return self.shares.weights(step, self._weights(step) if weighted(self.run) else None)

    def penalised(self, made: Made, directions: Tensor) -> Tensor | None:
        """H V (Q, P) of the penalty that was in a step's gradient, directions V (Q, P); None for none."""
        if made.penalty is None or self._penalised is None:
            return None
        bound = float(torch.finfo(self.run.compute).eps ** 0.5)
        return self._penalised.hvp(made.recorded.number, made.recorded.theta, made.penalty, directions, bound)

    @cached_property
    def _penalised(self) -> Penalised | None:
        penalty = self.unrecorded.penalty
        return None if penalty is None else Penalised(self.run, self.shares.model, penalty)

    def _weights(self, step: RecordedStep) -> np.ndarray:
        if not weighted(self.run):
            return np.ones(len(step.ids))
        return np.concatenate([self.run.inputs(p).args[-1].double().numpy() for p in step.passes])

    def batch_gap(self, made: Made) -> float:
        """How far the examples' gradients are from summing to what was recorded of them, relative to its norm."""
        found, want = self.shares.gradient(made.recorded, made.factors), made.examples
        moved = torch.cat(
            [torch.full((p.stop - p.start,), n in made.recorded.active) for n, p in self.run.layout.slices()]
        )
        return float((found - want)[moved].norm() / want.norm().clamp(min=torch.finfo(want.dtype).tiny))

    def split_gap(self, made: Made, sensitivity: Tensor) -> float:
        """How far the products of each example are from its own: summed with random weights, against one backward pass."""
        weights = np.random.default_rng(made.recorded.number).standard_normal(len(made.slots)) * made.factors
        mine = np.einsum("qbk,b->qk", self.shares.products(made.recorded, sensitivity), weights)
        direct = self.shares.gradient(made.recorded, weights)
        want = np.stack([(sensitivity[:, p] @ direct[p]).numpy() for _, p in self.run.layout.slices()], 1)
        size = np.stack([(sensitivity[:, p].abs() @ direct[p].abs()).numpy() for _, p in self.run.layout.slices()], 1)
        return float((np.abs(mine - want).sum(1) / np.maximum(size.sum(1), np.finfo(float).tiny)).max())

    def inputs(self, step: RecordedStep) -> list[Batch]:
        """Of each pass, without the weights."""
        found = [self.run.inputs(p) for p in step.passes]
        return [Batch.of(b.said[:-1], b.size) for b in found] if weighted(self.run) else found


def shares_of(run: Run, model: nn.Module, loss: Callable[..., Tensor], member: np.ndarray) -> Shares:
    its = Unweighted(loss) if weighted(run) else loss
    slices = slice_bytes(run.layout.size, run.dtype.itemsize)
    return Shares(run, model, its, run.compute, slices, member)


def weighted(run: Run) -> bool:
    """Whether it is a replay that gave weights to the losses, which are the last tensor of its batches."""
    return bool(run.replayed.get("weighted"))
