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
from .checks import weights_of
from .errors import ReplayError
from .kernels.clipping import EPS
from .optim import End
from .run import Run
from .shares import Shares
from .steps import Blocks, RecordedStep, Steps

CLIPPED = 1e-5  # how much less than 1 a factor is that clips
THRESHOLD = 1e-3  # how far, relatively, the norms that clipping leaves may be apart


class Unweighted:
    """The loss of a replay that was recorded with `intervention.weighted`: without the last tensor of the batch."""

    def __init__(self, loss: Callable[..., Tensor]) -> None:
        self.loss = loss

    def __call__(self, model: nn.Module, *batch: Any) -> Tensor:
        return self.loss(model, *batch[:-1])


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
    a replay gave them. places: the number of an example in the run -> among the pair's."""

    run: Run
    shares: Shares
    first: int
    places: dict[int, int]

    def __reduce__(self) -> tuple[Any, ...]:
        return Side, (self.run, self.shares, self.first, self.places)

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
        scales = self.shares.weights(steps[0])
        clip = self._clip(steps[0], scales, gradient)
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

    def _clip(self, step: RecordedStep, scales: np.ndarray, gradient: Tensor) -> float:
        """How much less clipping by norm made the gradient.

        Raises:
            ReplayError: another factor changes from step to step.
        """
        clip = _factor(self._kind, [p.size for p in step.passes], scales) / self._usual
        if clip > 1 - CLIPPED:
            return 1.0
        norm = float(gradient.double().norm())
        whole = len(step.active) == len(self.run.groups)  # what stood still was clipped with the others
        if whole and abs(norm + clip * EPS - self._threshold) > THRESHOLD * self._threshold:
            raise ReplayError(
                f"the gradients are multiplied by a factor that changes, and is not that of clipping by norm: got "
                f"{clip:.4g} at step {step.number}, which leaves a norm of {norm:.4g}, expected {self._threshold:.4g} "
                f"as at other steps that were clipped. Its derivative is not known: clip with "
                f"torch.nn.utils.clip_grad_norm_ over all parameters, or let weights of the losses do what the factor does."
            )
        return clip

    @cached_property
    def _kind(self) -> str | None:
        """Of the reduction; None where passes have weights of their own."""
        return next(iter(self.run.header["settled"]["reduction"][0]), None)

    @cached_property
    def _usual(self) -> float:
        """The factor that gradients have beside the reduction where they are not clipped."""
        return max(self._factors.values(), default=1.0) if self.run.header["settled"]["reduction"][1] else 1.0

    @cached_property
    def _factors(self) -> dict[int, float]:
        """By step, those that were recorded."""
        passes = self.run.reader.passes(slice(0, self.run.steps))
        found = {}
        for step in range(self.run.steps):
            each = list(passes.of_step(step))
            sizes = [p.slots.stop - p.slots.start for p in each]
            factor = _factor(self._kind, sizes, np.repeat([p.scale for p in each], sizes))
            if not np.isnan(factor):
                found[step] = factor
        return found

    @cached_property
    def _threshold(self) -> float:
        """The norm that clipping leaves, at the first step that was clipped and moved most of the tensors."""
        moved = self.run.reader.read("hyper", slice(0, self.run.steps))[..., -1].sum(1)
        clipped = [step for step, factor in self._factors.items() if factor / self._usual <= 1 - CLIPPED]
        step = max(clipped, key=lambda step: (moved[step], -step))
        gradient = self._blocks.at(range(step, step + 1)).gradient[0]
        return float(gradient.double().norm()) + self._factors[step] / self._usual * EPS

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


def _factor(kind: str | None, sizes: list[int], scales: np.ndarray) -> float:
    """What the examples' gradients were multiplied with beside the reduction. scales: (B,)."""
    return 1.0 if kind is None else float((scales / np.repeat(weights_of(kind, sizes), sizes)).mean())


def shares_of(run: Run, model: nn.Module, loss: Callable[..., Tensor], member: np.ndarray) -> Shares:
    its = Unweighted(loss) if weighted(run) else loss
    slices = slice_bytes(run.layout.size, run.dtype.itemsize)
    return Shares(run, model, its, run.compute, slices, member)


def weighted(run: Run) -> bool:
    """Whether it is a replay that gave weights to the losses, which are the last tensor of its batches."""
    return bool(run.replayed.get("weighted"))
