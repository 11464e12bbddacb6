"""What stands before the first step of a replay: everything is checked, copied and changed."""

import logging
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from operator import index as as_int
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import check_options
from ..errors import ReplayError
from ..run import Run, check_model
from ..store import same_place
from .base import Intervention
from .course import Backward, Course
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
    backward = loop.backward or _reduction(run, min(steps.start, run.steps - 1), min(steps.stop, run.steps))
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


def _reduction(run: Run, start: int, until: int) -> Backward:
    """The mean or the sum, whichever the recorded scale of every step is."""
    scales = run.reader.fact("scale", slice(start, until))
    sizes = (run.reader.read("index", slice(start, until)) >= 0).sum(1)
    if (scales == 1 / sizes).all():
        return lambda losses, model: losses.mean().backward()
    if (scales == 1).all():
        return lambda losses, model: losses.sum().backward()
    n = int((scales != 1 / sizes).argmax())
    raise ReplayError(
        f"the loop did more than take the mean or the sum: got a scale of {scales[n]:.6g} for {sizes[n]} examples, expected "
        f"{1 / sizes[n]:.6g}, at step {start + n}. Pass backward=, a function (losses, model) that does what the loop did, "
        f"such as clipping."
    )


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
