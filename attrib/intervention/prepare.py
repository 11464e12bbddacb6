"""What stands before the first step of a replay: everything is checked, copied and changed."""

import logging
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from operator import index as as_int
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..checks import REDUCTIONS, check_options, weights_of
from ..errors import ReplayError
from ..matching import check_model
from ..run import Run
from ..store import same_place
from .base import Intervention
from .course import Backward, Course, Reduced
from .schedule import Batches, Schedule

log = logging.getLogger("attrib")

Interventions = Intervention | Sequence[Intervention]


@dataclass(frozen=True)
class Loop:
    """What a record does not say of the loop, as given to `replay`."""

    model: nn.Module
    loss: Callable[..., Tensor]
    until: int | None
    backward: Backward | None
    batches: Batches | None


def prepare(run: Run, start: int, interventions: Interventions, loop: Loop) -> Course:
    """Everything checked and set up; a copy of the model at the changed state."""
    if run.rules.read_off:
        raise ReplayError(
            f'the optimizer cannot be run again: got a run of {run.rules} with rule="frozen", whose state is not recorded, '
            f"only what it did, at {run.reader.target}. Train again with the loop itself."
        )
    steps = _steps(run, start, loop.until)
    changes = _checked(run, steps, interventions)
    check_model(run, loop.model, values=False)
    schedule = Schedule(run, next(loop.model.parameters()).device, loop.batches)
    schedule.check(steps.stop)
    first, last = min(steps.start, run.steps - 1), min(steps.stop, run.steps)
    backward = _as_said(loop.backward) if loop.backward else partial(_reduced, reduction_of(run, first, last))
    model = deepcopy(loop.model)
    run.load(model, steps.start)
    optimizer = run.optimizer(model, steps.start)
    for change in changes:
        change.begin(run, model, optimizer)
    course = Course(run, steps, changes, model, optimizer, loop.loss, backward, schedule)
    course.set_modes()
    _warn(course)
    return course


def check_record(course: Course, store: Any, capture: str) -> None:
    """That the record goes to a place of its own, and can hold what happens."""
    for source in (course.run, *(run for change in course.interventions for run in change.sources())):
        if same_place(store, source.reader.target):
            raise ReplayError(
                f"a run cannot be replayed into itself: got {store}, expected another place than that of a run that it is "
                f"made from. Choose another path for the replay."
            )
    check_options(capture)
    for change in course.interventions:
        if capture not in change.captures():
            raise ReplayError(
                f"the change cannot be captured so: got capture={capture!r}, expected "
                f"{' or '.join(map(repr, change.captures()))}, with {type(change).__name__}."
            )


def _steps(run: Run, start: int, until: int | None) -> range:
    start, until = as_int(start), run.steps if until is None else as_int(until)
    if not 0 <= start <= run.steps or not start < until:
        raise ReplayError(
            f"the steps are not in the run: got {start} to {until}, expected 0 <= start <= {run.steps} and start < until, "
            f"at {run.reader.target}. Without until= a replay ends where the run does."
        )
    return range(start, until)


def _checked(run: Run, steps: range, interventions: Interventions) -> tuple[Intervention, ...]:
    changes = (interventions,) if isinstance(interventions, Intervention) else tuple(interventions)
    for change in changes:
        if not isinstance(change, Intervention):
            raise ReplayError(f"that is no intervention: got {change!r}, expected one of attrib.intervention.")
        change.check(run, steps.start, steps.stop)
    return changes


def reduction_of(run: Run, start: int, until: int) -> str:
    """ "mean" over the passes, "pooled" over the examples, or "sum": whichever the recorded scales of every step are.

    Raises:
        ReplayError: they are none of these.
    """
    if run.declares_remainder:
        raise ReplayError(
            "the loop did more than take the mean or the sum: got a run with a remainder, of which no function is recorded. "
            "Pass backward=, a function (losses, model) that does what the loop did to the gradients, and "
            'remainder="account" where the replay is recorded.'
        )
    passes = run.reader.passes(slice(start, until))
    scales, sizes = passes.numbers("scale"), passes.numbers("size")
    there = sizes > 0
    for kind in REDUCTIONS:
        expected = np.zeros_like(scales)
        for n, here in enumerate(there):
            expected[n, here] = weights_of(kind, sizes[n, here].tolist())
        if (scales == expected)[there].all():
            return kind
    n = int(((scales != expected) & there).any(1).argmax()) if kind == "sum" else 0
    mean = weights_of("mean", sizes[n, there[n]].tolist())
    off = int((scales[n, there[n]] != mean).argmax())
    raise ReplayError(
        f"the loop did more than take the mean or the sum: got a scale of {scales[n, off]:.6g} for {int(sizes[n, off])} "
        f"examples, expected {mean[off]:.6g}, at step {start + n}. Pass backward=, a function (losses, model) that does "
        f"what the loop did, such as clipping."
    )


def _reduced(kind: str, losses: Tensor, model: nn.Module, sizes: Sequence[int]) -> None:
    if kind == "mean":
        (losses.mean() / len(sizes)).backward()
    else:
        (losses.sum() / (sum(sizes) if kind == "pooled" else 1)).backward()


def _as_said(backward: Backward) -> Reduced:
    return lambda losses, model, sizes: backward(losses, model)


def _warn(course: Course) -> None:
    run = course.run
    recorded = run.header["versions"]["torch"]
    if recorded != torch.__version__:
        log.warning(
            "the run was recorded with torch %s, this is torch %s: the replay may differ in the last bits",
            *(recorded, torch.__version__),
        )
    if "penalty" in run.reader and not course.has_penalty:
        log.warning("the run was recorded with a penalty in the loss: without a Penalty, this replay has none")
