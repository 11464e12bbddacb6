"""Two runs over the same batches, step by step: which example had which factor in what either trained on.

    G_s = sum_i c_i d loss_i / d theta            c_i = s_i w_i: the reduction, and the weight that the example had

A run and itself is a pair, too. What cannot be compared is refused by its first step.
"""

from collections.abc import Callable
from dataclasses import dataclass
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
from .optim import End, check_adjoints
from .run import Run
from .shares import Shares
from .steps import Blocks, RecordedStep, Steps


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

    def begin(self) -> End:
        """The state that the pair begins with."""
        steps = self._blocks.at(range(self.first, self.first + 1))
        return End(steps.state_before(0), steps.gradient[0], steps.theta[0])

    def active(self, number: int) -> frozenset[str]:
        """The parameters that moved at a step of the pair."""
        return self._step(number)[0].active

    def made(self, number: int, active: frozenset[str]) -> Made:
        """The step `number` of the pair. active: the parameters that moved in either run; where they did not in this one, the
        gradient is what it would have been."""
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
                f"the gradients are multiplied by a factor that changes, and is not that of clipping by norm: got {clip:.4g} "
                f"at step {step.number}, which leaves a norm of {norm:.4g}, expected {self._threshold:.4g} as at other steps "
                f"that were clipped. Its derivative is not known: clip with torch.nn.utils.clip_grad_norm_ over all "
                f"parameters, or let weights of the losses do what the factor does."
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
        if not self.run.weighted:
            return np.ones(len(step.ids))
        return np.concatenate([self.run.inputs(p).args[-1].double().numpy() for p in step.passes])

    def inputs(self, step: RecordedStep) -> list[Batch]:
        """Of each pass, without the weights."""
        found = [self.run.inputs(p) for p in step.passes]
        return [Batch.of(b.said[:-1], b.size) for b in found] if self.run.weighted else found


class Aligned(NamedTuple):
    """The examples of a step of both runs, each once for every time that a batch held it. examples (U,): among those of the
    pair. at: of either run, where each stands in its batch, -1 where it is not. alike: whether the batches are one and the
    same, in order, drawn from the same random numbers."""

    examples: np.ndarray
    at: tuple[np.ndarray, np.ndarray]
    alike: bool

    def of(self, side: int, values: np.ndarray) -> np.ndarray:
        """(B,) of either run -> (U,), 0 where it has none."""
        at = self.at[side]
        return np.where(at >= 0, values[np.maximum(at, 0)], 0.0)

    def spread(self, side: int, values: np.ndarray) -> np.ndarray:
        """(Q, B, K) of either run -> (Q, U, K)."""
        at = self.at[side]
        return values[:, np.maximum(at, 0)] * (at >= 0)[:, None]

    @property
    def wider(self) -> int | None:
        """The run whose batch holds all of them; None for neither."""
        return next((n for n, at in enumerate(self.at) if (at >= 0).all()), None)


@dataclass(frozen=True)
class Pair:
    """base, changed: the runs. labels (E,): ids of all examples of either. steps: how many they share."""

    base: Side
    changed: Side
    labels: np.ndarray
    steps: int

    @property
    def sides(self) -> tuple[Side, Side]:
        return self.base, self.changed

    @property
    def itself(self) -> bool:
        """Whether it is one run."""
        return self.base is self.changed

    def aligned(self, made: tuple[Made, Made]) -> Aligned:
        """Raises ReplayError where the batches are not those of the same training."""
        a, b = made
        if self.itself:
            each = np.arange(len(a.slots))
            return Aligned(a.slots, (each, each), True)
        keys = [_keys(m.slots) for m in made]
        together = np.union1d(*keys)
        at = tuple(_found(together, k) for k in keys)
        examples = together // max(1, _TIMES)
        found = Aligned(examples, at, self._alike(a, b))  # type: ignore[arg-type]
        common = int(((at[0] >= 0) & (at[1] >= 0)).sum())
        if found.wider is None and 2 * common < min(len(a.slots), len(b.slots)):
            raise ReplayError(
                f"the runs were not trained on the same batches: got {common} common examples of {len(a.slots)} and "
                f"{len(b.slots)}, expected one batch to hold the other, at step {a.recorded.number} of the base and "
                f"{b.recorded.number} of the changed run. Train both in the same order, with the same ids."
            )
        self._check_inputs(made, found)
        return found

    def _alike(self, a: Made, b: Made) -> bool:
        passes = list(zip(a.recorded.passes, b.recorded.passes, strict=False))
        return (
            len(a.recorded.passes) == len(b.recorded.passes)
            and np.array_equal(a.slots, b.slots)
            and all(p.size == q.size and _same(p.random, q.random) for p, q in passes)
        )

    def _check_inputs(self, made: tuple[Made, Made], aligned: Aligned) -> None:
        """The same id, the same inputs."""
        both = (aligned.at[0] >= 0) & (aligned.at[1] >= 0)
        rows = []
        for side, m, at in zip(self.sides, made, aligned.at, strict=True):
            batches = side.inputs(m.recorded)
            leaves = [[b.data[n] for b in batches] for n in range(len(batches[0].data))]
            try:
                whole = [torch.cat(parts)[torch.from_numpy(at[both])] for parts in leaves]
            except RuntimeError:  # passes padded to lengths of their own
                return
            rows.append(whole)
        for x, y in zip(*rows, strict=False):
            if x.shape == y.shape and not torch.equal(x, y):
                differs = (x != y).reshape(len(x), -1).any(1)
                example = self.labels[aligned.examples[both][int(differs.nonzero()[0])]]
                raise ReplayError(
                    f"the runs were not trained on the same inputs: got other ones for example {example!r}, expected those "
                    f"of the base, at step {made[0].recorded.number}. Augment with the same random numbers, or give what "
                    f"is another input an id of its own."
                )


CLIPPED = 1e-5  # how much less than 1 a factor is that clips
THRESHOLD = 1e-3  # how far, relatively, the norms that clipping leaves may be apart


def _factor(kind: str | None, sizes: list[int], scales: np.ndarray) -> float:
    """What the examples' gradients were multiplied with beside the reduction. scales: (B,)."""
    return 1.0 if kind is None else float((scales / np.repeat(weights_of(kind, sizes), sizes)).mean())


_TIMES = 1 << 20  # that one example may stand in a batch, more than any


def _keys(slots: np.ndarray) -> np.ndarray:
    """(B,): the example and how many times it came before in the batch, as one number."""
    order = np.argsort(slots, kind="stable")
    ranked = slots[order]
    first = np.searchsorted(ranked, ranked)
    keys = np.empty(len(slots), np.int64)
    keys[order] = ranked * _TIMES + np.arange(len(slots)) - first
    return keys


def _found(together: np.ndarray, keys: np.ndarray) -> np.ndarray:
    at = np.full(len(together), -1)
    at[np.searchsorted(together, keys)] = np.arange(len(keys))
    return at


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and torch.equal(a, b))


def check_pair(base: Run, changed: Run) -> None:
    """Raise ReplayError where two runs cannot be compared."""
    for what, one, other in (
        ("parameters", base.layout, changed.layout),
        ("type", base.dtype, changed.dtype),
        ("optimizer", base.rules.described(), changed.rules.described()),
        ("definition of a share", base.definition, changed.definition),
    ):
        if one != other:
            raise ReplayError(
                f"the runs cannot be compared: got another {what}, {_short(other)}, expected that of the base, "
                f"{_short(one)}, at {changed.reader.target}. Train the changed run as the base was."
            )


def _short(value: Any) -> str:
    text = value["optimizer"] if isinstance(value, dict) else str(value)
    return text if len(text) < 80 else text[:77] + "..."


def paired(runs: tuple[Run, Run], model: nn.Module, loss: Callable[..., Tensor], member: np.ndarray) -> Pair:
    """Of the steps that both have.

    Raises:
        ReplayError: they cannot be compared. LossError: there is no loss.
    """
    base, changed = runs
    check_adjoints(base.rules)
    check_pair(base, changed)
    labels, places = labels_of(base, changed)
    firsts = max(0, changed.origin - base.origin), max(0, base.origin - changed.origin)
    sides = []
    for run, first, at in zip(runs, firsts, places, strict=True):
        its = Unweighted(loss) if run.weighted else loss
        shares = Shares(run, model, its, run.compute, slice_bytes(run.layout.size, run.dtype.itemsize), member)
        sides.append(Side(run, shares, first, at))
    steps = min(run.steps - first for run, first in zip(runs, firsts, strict=True))
    if steps < 1:
        raise ReplayError(
            f"the runs have no steps in common: got {base.steps} and {changed.steps} steps, which begin {firsts[0]} steps "
            f"apart, expected some. Compare a replay with the run that it was made of."
        )
    return Pair(sides[0], sides[1], labels, steps)


def alone(run: Run, model: nn.Module, loss: Callable[..., Tensor], member: np.ndarray) -> Pair:
    """A run and itself."""
    check_adjoints(run.rules)
    its = Unweighted(loss) if run.weighted else loss
    shares = Shares(run, model, its, run.compute, slice_bytes(run.layout.size, run.dtype.itemsize), member)
    side = Side(run, shares, 0, {int(number): n for n, number in enumerate(run.numbers)})
    return Pair(side, side, run.examples, run.steps)


def labels_of(base: Run, changed: Run) -> tuple[np.ndarray, list[dict[int, int]]]:
    """The ids of both, those that are numbers in order, and of either run where its numbers stand among them."""
    if base.examples.dtype != object and changed.examples.dtype != object:
        labels = np.union1d(base.examples, changed.examples)
    else:
        labels = np.array(list(dict.fromkeys([*base.examples.tolist(), *changed.examples.tolist()])), dtype=object)
    at = {label: n for n, label in enumerate(labels.tolist())}
    places = [
        {int(number): at[label] for number, label in zip(run.numbers, run.examples.tolist(), strict=True)}
        for run in (base, changed)
    ]
    return labels, places
