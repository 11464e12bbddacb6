"""The batch and the split identity of a step, held against passes of the recorder's own."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import log2
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..checks import ShareBound, batch_identity, fit_scale, split_bound, split_gaps
from ..errors import BatchIdentityError, SplitIdentityError
from ..generators import generators, random_state
from ..gradients import ExampleGradients, random_weights
from .listen import Heard
from .records import Factors, Settled, Step

TRIES = 5


@dataclass(frozen=True)
class Trial:
    """A step on trial. shares: at its active parameters, of `factor` times the loss; examples, penalty (P,): the parts of
    its gradient."""

    step: Step
    heard: Heard
    shares: ExampleGradients
    examples: Tensor
    penalty: Tensor | None
    factor: float = 1.0

    @property
    def size(self) -> int:
        return len(self.step.batch[0])


class Fit(NamedTuple):
    """The scale of the shares, and what the check that it comes from has shown."""

    scale: float
    log: dict[str, float]
    settled: Settled


def of_the_loop(trial: Trial) -> Trial:
    """The trial with the multiple of the loss that the loop differentiates: where a pass rounds to few bits, that of another
    multiple rounds otherwise. It is the mean, the sum, either times the power of two that a GradScaler scales losses by, or
    what p.grad says, which comes out nearer with each pass."""
    step, size = trial.step, trial.size
    for _ in range(TRIES):
        with random_state(trial.heard.start):
            total = trial.shares.total(step.theta, step.batch)[1]
        scale = fit_scale(trial.examples, total)
        near = 1.0 if scale is None else scale / trial.heard.clip
        if abs(near - 1) <= torch.finfo(total.dtype).eps ** 0.75:
            break
        wanted = near * trial.factor
        factor = next((m for m in _multiples(wanted, size) if abs(wanted / m - 1) < 0.01), wanted)
        trial = replace(trial, shares=trial.shares.at(step.active, factor), factor=factor)
    return trial


def _multiples(near: float, size: int) -> list[float]:
    """Of the mean and the sum those by the power of two that is nearest to `near`."""
    return [known * 2.0 ** round(log2(near / known)) for known in (1 / size, 1.0)] if near > 0 else []


def fitted(trial: Trial) -> Fit:
    """The sum of the shares with the loss as it was given; the scale between it and p.grad.

    Raises:
        BatchIdentityError: naming the parameter, and what in the loop may be the reason.
    """
    step, heard, examples = trial.step, trial.heard, trial.examples
    with random_state(heard.start):
        losses, total = (found / trial.factor for found in trial.shares.total(step.theta, step.batch))
        draws = step.settled.draws.settled(step.number, heard.start, generators())
    settled = replace(step.settled, draws=draws)

    def gross() -> float:
        return heard.clip * _gross(trial, settled)

    bound = ShareBound(examples, gross, trial.penalty)
    scale, reduction = settled.reduction.fit(examples, total, len(losses), heard.clip, bound)
    if trial.shares.coarse:
        bound = ShareBound(examples, gross, trial.penalty, trial.shares.precision)
    try:
        gap = batch_identity(trial.shares.layout, examples, scale * total, step.number, bound)
    except BatchIdentityError as error:
        raise BatchIdentityError(f"{error}{_hint(trial, draws.stochastic, losses)}") from None
    log = {"loss": float(losses.double().mean()), "batch_identity": gap}
    return Fit(scale, log, replace(settled, reduction=reduction))


def check_sum(trial: Trial, found: Factors, scale: float) -> None:
    """What is stored must sum to p.grad as well.

    Raises:
        BatchIdentityError: naming the parameter.
    """
    layout, examples = trial.shares.layout, trial.examples
    sums = examples.new_zeros(layout.size)
    for name, part in layout.slices():
        for factor in found[name]:
            sums[part] += factor.total()

    def gross() -> float:
        return scale * sum(float(f.rows().double().norm(dim=1).sum()) for s in found.values() for f in s)

    bound = ShareBound(examples, gross, trial.penalty, trial.shares.precision)
    batch_identity(layout, examples, scale * sums, trial.step.number, bound)


def check_split(trial: Trial, found: Factors, scale: float, whole: float) -> float:
    """And each be its own example's: for random weights they sum to the gradient of the losses so weighted. `whole`: the
    factor between the gradient of a loss and its share, of which `scale` is left to be multiplied.

    Raises:
        SplitIdentityError: naming the parameter and the example.
    """
    step, names = trial.step, trial.shares.layout.names
    weights, whole = random_weights(trial.size, step.number, step.theta, trial.shares.coarse), whole / trial.factor
    with random_state(trial.heard.start):
        truth = trial.shares.vector.gradient(step.theta, step.batch, weights)[1]
    sums = {n: sum((f.weighted(weights).total() for f in found[n]), 0.0) for n in names}
    off = np.array([float((scale * sums[n] - whole * truth[n].flatten()).double().norm()) for n in names])
    sizes = np.array([abs(whole) * float(truth[n].double().norm()) for n in names])
    precision = trial.shares.precision
    gaps, bound = split_gaps(off, sizes, precision), split_bound(precision)
    worst = int(gaps.argmax())
    if not gaps[worst] <= bound:
        stored = scale * torch.stack([factor.rows() for factor in found[names[worst]]]).sum(0)
        raise SplitIdentityError(
            f"the shares to be stored are other examples': got a gap of {gaps[worst]:.3g} of their size, expected at "
            f"most {bound:.1g}, at parameter {names[worst]!r}, slot {_worst_slot(trial, stored, whole, names[worst])} of "
            f'the batch, step {step.number}. Record with capture="replay". The step was refused.'
        )
    return float(gaps[worst])


def _worst_slot(trial: Trial, stored: Tensor, whole: float, name: str) -> int:
    """Whose stored share of a parameter, (B, p), is furthest from the gradient of its loss."""
    with random_state(trial.heard.start):
        rows = trial.shares.vector.rows(trial.step.theta, trial.step.batch, [name])
        truth = torch.stack([row[name].flatten() for row in rows])
    return int((stored - whole * truth).norm(dim=1).argmax())


def _hint(trial: Trial, stochastic: bool, losses: Tensor) -> str:
    """What in the loop may be why shares and p.grad differ."""
    passes = trial.heard.passes
    if stochastic and passes == 0:
        return (
            " The loss draws random numbers (dropout), and no forward pass of the model was heard, so that they cannot be "
            "drawn again: pass attrib.record the model that the loop calls, the compiled one where that is."
        )
    if stochastic and trial.heard.compiled:
        return (
            " The loss draws random numbers (dropout), and torch.compile's default backend draws other ones than the model "
            "itself: set torch._inductor.config.fallback_random = True before the first call."
        )
    if stochastic and passes > 1:
        return (
            f" The step made {passes} forward passes and the loss draws random numbers (dropout), which are drawn again "
            f"as for one: make one forward pass a step, or put dropout into eval mode."
        )
    if trial.step.number and trial.heard.surrounded:
        return (
            " Autocast is on at the step: entered once around the whole loop it keeps the weights as they were rounded when "
            "it was entered. Enter it at every step, around the forward pass."
        )
    with random_state(trial.heard.start):
        again = trial.shares.vector.values(trial.step.theta, trial.step.batch)
    if torch.equal(losses, again):
        return ""
    return (
        f" The loss gives other values when it is computed again (up to {float((losses - again).abs().max()):.2g} "
        f"apart): it draws random numbers from a generator of its own. Draw them with torch's, Python's or numpy's "
        f"global one."
    )


def _gross(trial: Trial, settled: Settled) -> float:
    """sum_i |g_i|, times the reduction: no larger than what the optimizer's gradient may have cancelled from."""
    norms = [float(rows.double().norm(dim=1).sum()) for rows in _share_rows(trial, settled.draws.stochastic)]
    return sum(norms) / trial.factor / (trial.size if settled.reduction.kind != "sum" else 1)


def _share_rows(trial: Trial, stochastic: bool) -> Iterator[Tensor]:
    """The gradients of the examples in slices (b, P); where a slice would draw other numbers, or have other losses, all at
    once."""
    step, size = trial.step, trial.size
    at_once = size if stochastic or trial.shares.coupled else trial.shares.rows_at_once()
    for lo in range(0, size, at_once):
        with random_state(trial.heard.start):
            yield trial.shares.rows(step.theta, tuple(b[lo : lo + at_once] for b in step.batch))
