"""The batch and the split identity of a step, held against passes of the recorder's own."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import log2
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..batch import Batch
from ..checks import Backward, ShareBound, Totals, batch_identity, split_bound, split_gaps, unscaling
from ..errors import BatchIdentityError, SplitIdentityError
from ..functional import draws_otherwise
from ..generators import generators, random_state
from ..gradients import Gradients, random_weights
from .listen import Heard
from .records import Factors, Settled, Step

TRIES = 5


@dataclass(frozen=True)
class PassTrial:
    """One pass of a step on trial. start: the generators' state before it. run: the gradients of the run, of which `shares`
    are those at the active parameters and the buffers of the step, of `factor` times the loss."""

    batch: Batch
    start: Tensor
    run: Gradients
    active: frozenset[str]
    buffers: Mapping[str, Tensor]
    factor: float = 1.0

    @cached_property
    def shares(self) -> Gradients:
        return self.run.at(self.active, self.factor, self.buffers)  # where nothing is computed nobody asks

    def total(self, theta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Losses (b,), the gradient of their sum (P,), both divided by the factor, and the generators' state behind them."""
        with random_state(self.start):
            losses, total = self.shares.total(theta, self.batch)
            behind = generators()
        return losses / self.factor, total / self.factor, behind


@dataclass(frozen=True)
class Trial:
    """A step on trial. passes: that its gradient was made of; examples, penalty (P,): the parts of its gradient."""

    step: Step
    heard: Heard
    passes: tuple[PassTrial, ...]
    examples: Tensor
    penalty: Tensor | None

    @property
    def shares(self) -> Gradients:
        """Of any pass, for what is the same of all."""
        return self.passes[0].shares

    def totals(self) -> Totals:
        return Totals.of(self.step.sizes, lambda: (p.total(self.step.theta)[1] for p in self.passes))


class Fit(NamedTuple):
    """The scales (M,) of the shares, what the check that they come from has shown, and what the shares sum to, (P,); None
    where that was not checked."""

    scales: np.ndarray
    log: dict[str, float]
    settled: Settled
    shares: Tensor | None = None


def of_the_loop(trial: Trial) -> Trial:
    """The trial with the multiple of the loss that the loop differentiates: where a pass rounds to few bits, that of another
    multiple rounds otherwise. It is the mean, the sum, either times the power of two that a GradScaler scales losses by, or
    what p.grad says, which comes out nearer with each pass."""
    for _ in range(TRIES):
        scales = trial.step.settled.reduction.refit(trial.examples, trial.totals())
        if scales is None:
            break
        near = scales / trial.heard.clip / [p.factor for p in trial.passes]
        if (np.abs(near - 1) <= torch.finfo(trial.examples.dtype).eps ** 0.75).all():
            break
        each = zip(trial.passes, near.tolist(), strict=True)
        trial = replace(trial, passes=tuple(_nearer(p, n, trial.step.sizes) for p, n in each))
    return trial


def _nearer(each: PassTrial, near: float, sizes: Sequence[int]) -> PassTrial:
    wanted = near * each.factor
    multiples = _multiples(wanted, (1 / each.batch.size / len(sizes), 1 / sum(sizes), 1.0))
    factor = next((m for m in multiples if abs(wanted / m - 1) < 0.01), wanted)
    return replace(each, factor=factor)


def _multiples(near: float, known: Sequence[float]) -> list[float]:
    """Of the reductions those by the power of two that is nearest to `near`."""
    return [factor * 2.0 ** round(log2(near / factor)) for factor in known] if near > 0 else []


def fitted(trial: Trial) -> Fit:
    """The sum of the shares with the loss as it was given; the scales between it and p.grad.

    Raises:
        BatchIdentityError: naming the parameter, and what in the loop may be the reason.
    """
    step, heard, examples = trial.step, trial.heard, trial.examples
    losses: list[Tensor] = []
    draws = step.settled.draws

    def totals() -> Iterator[Tensor]:
        nonlocal draws
        for each in trial.passes:
            found, total, behind = each.total(step.theta)
            draws = draws.settled(step.number, each.start, behind)
            if len(losses) < len(trial.passes):
                losses.append(found)
            yield total

    known = Totals.of(step.sizes, totals)
    settled = replace(step.settled, draws=draws)
    if heard.norms is not None:
        return _accounted(trial, losses, known, settled)

    def gross() -> float:
        return heard.clip * _gross(trial, settled)

    precision = trial.shares.precision
    bound = ShareBound(examples, gross, trial.penalty, None if trial.shares.coarse else precision)
    scales, reduction = settled.reduction.fit(examples, known, heard.clip, bound)
    if trial.shares.coarse:  # which is told by the loop's own multiple
        bound = ShareBound(examples, gross, trial.penalty, precision)
    try:
        gap = batch_identity(trial.shares.layout, examples, known.weighted(scales), step.number, bound)
    except BatchIdentityError as error:
        raise BatchIdentityError(f"{error}{_hint(trial, draws.stochastic, losses)}") from None
    log = {"loss": float(torch.cat(losses).double().mean()), "batch_identity": gap}
    return Fit(scales, log, replace(settled, reduction=reduction), examples)


def _accounted(trial: Trial, losses: Sequence[Tensor], totals: Totals, settled: Settled) -> Fit:
    """What p.grad holds beyond the sum of the shares is the remainder."""
    heard, root = trial.heard, split_bound(trial.shares.precision)
    assert heard.norms is not None
    rest = None if trial.penalty is None else trial.penalty / heard.clip
    backward = Backward(heard.norms, rest, trial.shares.layout)
    scales, reduction = settled.reduction.of_backward(backward, totals, root)
    clip = heard.clip if heard.clip != 1.0 else unscaling(scales, trial.step.sizes, heard.change)
    shares = totals.weighted(clip * scales)
    norm = float(trial.step.gradient.double().norm()) or 1.0
    remainder = float((trial.examples - shares).double().norm()) / norm
    log = {"loss": float(torch.cat(list(losses)).double().mean()), "remainder": remainder}
    return Fit(clip * scales, log, replace(settled, reduction=reduction), shares)


def check_sum(trial: Trial, found: Sequence[Factors], scales: np.ndarray, expected: Tensor) -> None:
    """What is stored must sum to what the shares do, (P,): p.grad, but for a remainder.

    Raises:
        BatchIdentityError: naming the parameter.
    """
    layout = trial.shares.layout
    sums = expected.new_zeros(layout.size)
    for factors, scale in zip(found, scales.tolist(), strict=True):
        for name, part in layout.slices():
            for factor in factors[name]:
                sums[part] += scale * factor.total()

    def gross() -> float:
        each = zip(found, scales.tolist(), strict=True)
        return sum(
            abs(scale) * float(f.rows().double().norm(dim=1).sum())
            for factors, scale in each
            for s in factors.values()
            for f in s
        )

    bound = ShareBound(expected, gross, trial.penalty, trial.shares.precision)
    batch_identity(layout, expected, sums, trial.step.number, bound)


def check_split(trial: Trial, found: Sequence[Factors], scales: np.ndarray, whole: np.ndarray) -> float:
    """And each be its own example's: for random weights they sum to the gradient of the losses so weighted. `whole` (M,):
    the factors between the gradient of a loss and its share, of which `scales` are left to be multiplied.

    Raises:
        SplitIdentityError: naming the parameter and the example.
    """
    return max(
        _check_split(trial, n, factors, float(scales[n]), float(whole[n]) / trial.passes[n].factor)
        for n, factors in enumerate(found)
    )


def _check_split(trial: Trial, number: int, found: Factors, scale: float, whole: float) -> float:
    step, each = trial.step, trial.passes[number]
    names, coarse = each.shares.layout.names, each.shares.coarse
    weights = random_weights(each.batch.size, step.number + number, step.theta, coarse)
    with random_state(each.start):
        truth = each.shares.vector.gradient(step.theta, each.batch, weights)[1]
    sums = {n: sum((f.weighted(weights).total() for f in found[n]), 0.0) for n in names}
    off = np.array([float((scale * sums[n] - whole * truth[n].flatten()).double().norm()) for n in names])
    sizes = np.array([abs(whole) * float(truth[n].double().norm()) for n in names])
    precision = each.shares.precision
    gaps, bound = split_gaps(off, sizes, precision), split_bound(precision)
    worst = int(gaps.argmax())
    if not gaps[worst] <= bound:
        stored = scale * torch.stack([factor.rows() for factor in found[names[worst]]]).sum(0)
        slot = _worst_slot(step.theta, each, stored, whole, names[worst]) + sum(step.sizes[:number])
        raise SplitIdentityError(
            f"the shares to be stored are other examples': got a gap of {gaps[worst]:.3g} of their size, expected at "
            f"most {bound:.1g}, at parameter {names[worst]!r}, slot {slot} of the batch, step {step.number}. Record with "
            f'capture="replay". The step was refused.'
        )
    return float(gaps[worst])


def _worst_slot(theta: Tensor, each: PassTrial, stored: Tensor, whole: float, name: str) -> int:
    """Whose stored share of a parameter, (B, p), is furthest from the gradient of its loss."""
    with random_state(each.start):
        rows = each.shares.vector.rows(theta, each.batch, [name])
        truth = torch.stack([row[name].flatten() for row in rows])
    return int((stored - whole * truth).norm(dim=1).argmax())


def _hint(trial: Trial, stochastic: bool, losses: Sequence[Tensor]) -> str:
    """What in the loop may be why shares and p.grad differ."""
    heard = trial.heard
    if stochastic and heard.passes == 0 and not heard.forwards:
        return (
            " The loss draws random numbers (dropout), and no forward pass of the model was heard, so that they cannot be "
            "drawn again: pass attrib.record the model that the loop calls, the compiled one where that is; or announce "
            "the batch before its forward pass, with recorder.batch(index, *batch), where what is compiled hides it."
        )
    if stochastic and draws_otherwise():
        return (
            " The loss draws random numbers (dropout), and torch.compile's default backend draws other ones than the model "
            "itself: set torch._inductor.config.fallback_random = True before the first call."
        )
    if stochastic and heard.passes > 1 and not heard.forwards:
        return (
            f" The step made {heard.passes} forward passes and the loss draws random numbers (dropout), which are drawn "
            f"again as for one: announce the batch of each before it, with recorder.batch(index, *batch), and call "
            f"recorder.step() without a batch; or put dropout into eval mode."
        )
    if stochastic and heard.forwards and heard.passes > sum(heard.forwards):
        return (
            " The loss draws random numbers (dropout), and a forward pass came before its batch was announced: announce "
            "each with recorder.batch(index, *batch) before its forward pass."
        )
    if trial.step.number and trial.heard.surrounded:
        return (
            " Autocast is on at the step: entered once around the whole loop it keeps the weights as they were rounded when "
            "it was entered. Enter it at every step, around the forward pass."
        )
    if len(trial.passes) > 1 and _reads_buffers(trial):
        return (
            " The loss reads buffers that training writes to, each batch of a step what the one before it wrote, and the "
            "record holds what stood there when the step began: make a step of one batch."
        )
    for n, each in enumerate(trial.passes):
        with random_state(each.start):
            again = each.shares.vector.values(trial.step.theta, each.batch) / each.factor
        if not torch.equal(losses[n], again):
            apart = float((losses[n] - again).abs().max())
            return (
                f" The loss gives other values when it is computed again (up to {apart:.2g} apart): it draws random numbers "
                f"from a generator of its own. Draw them with torch's, Python's or numpy's global one."
            )
    return ""


def _reads_buffers(trial: Trial) -> bool:
    """Whether the losses of the last pass are others where the buffers that training changes hold other numbers."""
    each, values = trial.passes[-1], []
    others = {name: t + 1 if t.is_floating_point() else t for name, t in trial.step.buffers.items()}
    for buffers in (trial.step.buffers, others) if others else ():
        with random_state(each.start):
            shares = each.shares.at(trial.step.active, each.factor, buffers)
            values.append(shares.vector.values(trial.step.theta, each.batch))
    return bool(values) and not torch.equal(*values)


def _gross(trial: Trial, settled: Settled) -> float:
    """sum_i |g_i|, times the reduction: no larger than what the optimizer's gradient may have cancelled from."""
    total = 0.0
    for each in trial.passes:
        norms = [float(rows.double().norm(dim=1).sum()) for rows in _share_rows(trial, each, settled.draws.stochastic)]
        total += sum(norms) / each.factor / (each.batch.size if settled.reduction.kinds != ("sum",) else 1)
    return total / (len(trial.passes) if settled.reduction.kinds != ("sum",) else 1)


def _share_rows(trial: Trial, each: PassTrial, stochastic: bool) -> Iterator[Tensor]:
    """The gradients of the examples in slices (b, P); where a slice would draw other numbers, or have other losses, all at
    once."""
    size = each.batch.size
    at_once = size if stochastic or each.shares.coupled else each.shares.rows_at_once()
    for lo in range(0, size, at_once):
        with random_state(each.start):
            yield each.shares.rows(trial.step.theta, each.batch.take(slice(lo, lo + at_once)))
