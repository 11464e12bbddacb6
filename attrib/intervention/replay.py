"""Train again from a recorded step on, as it was or changed.

Parameters, optimizer state, hyper-parameters, batches and the generator's state of every step are the recorded ones; the
gradients are computed anew. Unchanged, the replay reproduces the recorded states bit for bit, on the same kind of machine
with the same version of torch.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, fields
from operator import index as as_int
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..errors import ReplayError
from ..generators import generators, random_state
from ..optim import set_options
from ..recorder import Recorder, record
from ..run import Run, check_model, open_run
from .base import Intervention
from .during import Freeze, Reweight, weighted
from .schedule import Batches, Schedule

log = logging.getLogger("attrib")

Interventions = Intervention | Sequence[Intervention]
Backward = Callable[[Tensor, nn.Module], Any]


def replay(
    run: Run,
    start: int = 0,
    interventions: Interventions = (),
    *,
    model: nn.Module,
    loss: Callable[..., Tensor],
    store: Any,
    until: int | None = None,
    backward: Backward | None = None,
    batches: Batches | None = None,
    progress: bool = True,
    **options: Any,
) -> Run:
    """Train again from a recorded step on, recorded.

    Args:
        run: from `attrib.open_run`.
        start: the state to begin with, 0 .. T.
        interventions: what is changed (`attrib.intervention`), one or several, in this order.
        model: of the recorded architecture; a copy is trained.
        loss: as given to `attrib.record`.
        store: path or zarr Store for the new run; its step 0 is `start`.
        until: the step to end before; None for the last recorded one. Beyond it, the options are those of the last step.
        backward: `backward(losses, model)`, what the loop did with the losses (B,) of a batch before the step, if it was not
            `losses.mean().backward()` or `losses.sum().backward()`, such as clipping.
        batches: of the steps beyond the record: step -> (index, *inputs). Not needed where every batch was all examples, by
            their ids; the last one then comes again.
        options: of `attrib.record`: capture, overwrite, ...

    Returns:
        The new run, complete by itself. Its header says under "replay" of which run and from which step it is, and what was
        changed.

    Raises:
        ReplayError: steps outside the run, an intervention that does not fit it, or a loop that did more than the mean or
            the sum and no `backward`. ModelMismatchError: another model. What `attrib.record` raises. In all cases before
            anything is written, but for what is wrong with a batch of `batches`.

    Example:
        >>> grown = attrib.intervention.Transplant("hidden.*", run, 1400)  # doctest: +SKIP
        >>> again = attrib.replay(run, 500, grown, model=model, loss=loss, store="again.zarr")  # doctest: +SKIP
    """
    course = _course(run, start, interventions, model, loss, until, backward, batches)
    _check_record(course, store, options)
    steps = tqdm(course.steps, desc="replay", unit="step", delay=2, disable=not progress)
    with (
        random_state(generators()),
        record(course.optimizer, course.model, course.loss, store, penalty=course.penalty, **options) as recorder,
    ):
        described = [change.describe() for change in course.interventions]
        recorder.describe(
            replay={"run": str(run.reader.target), "start": course.steps.start, "interventions": described}
        )
        for step in steps:
            course.step(step, recorder)
    return open_run(store)


def retrain(
    run: Run,
    start: int = 0,
    interventions: Interventions = (),
    *,
    model: nn.Module,
    loss: Callable[..., Tensor],
    until: int | None = None,
    backward: Backward | None = None,
    batches: Batches | None = None,
) -> Iterator[tuple[int, nn.Module]]:
    """The same without a record, to be looked at on the way: yields (state, model) at `start` and after every step.

    The model is the copy that is trained, in the recorded modes: look at it, do not change its parameters. Arguments and
    errors are those of `replay`.

    Example:
        >>> for step, trained in attrib.retrain(run, 500, change, model=model, loss=loss):  # doctest: +SKIP
        ...     if accuracy(trained) > 0.99:
        ...         break
    """
    course = _course(run, start, interventions, model, loss, until, backward, batches)

    def states() -> Iterator[tuple[int, nn.Module]]:
        yield course.steps.start, course.model
        for step in course.steps:
            course.set_modes()  # whoever looks may have called eval()
            course.step(step, course.optimizer)
            yield step + 1, course.model

    return states()


@dataclass
class Course:
    """A training in progress: what was recorded, what is changed, the copies that it is done with."""

    run: Run
    steps: range
    interventions: list[Intervention]
    model: nn.Module
    optimizer: torch.optim.Optimizer
    loss: Callable[..., Tensor]
    backward: Backward
    schedule: Schedule
    now: int = field(init=False, default=0)
    random: Tensor | None = field(init=False, default=None)  # the generator's state after the last step

    @property
    def sources(self) -> list[Run]:
        """The runs that this is made from."""
        values = (getattr(change, f.name) for change in self.interventions for f in fields(change))
        return [self.run, *(value for value in values if isinstance(value, Run))]

    def set_modes(self) -> None:
        """Train and eval modes as recorded."""
        modes = set(self.run.header["training"])
        for name, module in self.model.named_modules():
            module.training = name in modes

    @property
    def penalty(self) -> Callable[[nn.Module], Tensor] | None:
        """The sum of all penalties in the step that is being made; None where no step has any."""
        if all(type(change).penalty is Intervention.penalty for change in self.interventions):
            return None

        def total(model: nn.Module) -> Tensor:
            found = [p for change in self.interventions if (p := change.penalty(self.now, model)) is not None]
            for p in found:
                if p.numel() != 1:
                    raise ReplayError(
                        f"a penalty is not a number: got shape {tuple(p.shape)}, expected a scalar tensor."
                    )
            return sum(found, torch.zeros((), dtype=self.run.dtype))

        return total

    def step(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        self.now, given = step, self.schedule.step(step)
        set_options(optimizer, self.run.rule, given.hyper)
        for change in self.interventions:
            change.options(self.run, step, optimizer)
        index, batch = self._batch(step, given.ids, given.batch)
        with random_state(self.random if given.random is None else given.random):
            optimizer.zero_grad()
            if self.penalty is not None and (penalty := self.penalty(self.model)).requires_grad:
                penalty.backward()  # first, so that a backward that clips sees it
            self.backward(self.loss(self.model, *batch), self.model)
            for change in self.interventions:
                change.gradient(self.run, step, self.model)
            if all(p.grad is None for p in self.model.parameters()):
                raise ReplayError(
                    f"nothing would train: got all parameters frozen, expected some to move, at step {step}."
                )
            if isinstance(optimizer, Recorder):
                optimizer.step(index, *batch)
            else:
                optimizer.step()
            if given.random is not None or self.random is not None:
                self.random = generators()

    def _batch(self, step: int, index: np.ndarray, batch: tuple[Tensor, ...]) -> tuple[np.ndarray, tuple[Tensor, ...]]:
        for change in self.interventions:
            index, batch = change.batch(step, (index, batch))
        reweighting = [change for change in self.interventions if isinstance(change, Reweight)]
        if reweighting:
            weights = torch.ones(len(index), dtype=self.run.dtype, device=batch[0].device)
            for change in reweighting:
                weights = change.apply(step, index, weights)
            batch = (*batch, weights)
        return index, batch


def _course(
    run: Run,
    start: int,
    interventions: Interventions,
    model: nn.Module,
    loss: Callable[..., Tensor],
    until: int | None,
    backward: Backward | None,
    batches: Batches | None,
) -> Course:
    """Everything checked and set up."""
    start, until = as_int(start), run.steps if until is None else as_int(until)
    if not 0 <= start <= run.steps or not start < until:
        raise ReplayError(
            f"the steps are not in the run: got {start} to {until}, expected 0 <= start <= {run.steps} and start < until, "
            f"at {run.reader.target}. Without until= a replay ends where the run does."
        )
    changes = [interventions] if isinstance(interventions, Intervention) else list(interventions)
    for change in changes:
        if not isinstance(change, Intervention):
            raise ReplayError(f"that is no intervention: got {change!r}, expected one of attrib.intervention.")
        change.check(run, start, until)
    check_model(run, model, values=False)
    schedule = Schedule(run, next(model.parameters()).device, batches)
    schedule.check(until)
    backward = backward or _reduction(run, min(start, run.steps - 1), min(until, run.steps))
    trained = deepcopy(model)
    run.load(trained, start)
    optimizer = run.optimizer(trained, start)
    for change in changes:
        change.begin(run, trained, optimizer)
    loss = weighted(loss) if any(isinstance(change, Reweight) for change in changes) else loss
    course = Course(run, range(start, until), changes, trained, optimizer, loss, backward, schedule)
    course.set_modes()
    _warn(course)
    if start == run.steps:  # random numbers go on from those of the last step
        course.random = run.random_state(start - 1)
    return course


def _check_record(course: Course, store: Any, options: dict[str, Any]) -> None:
    """That the record goes to a place of its own, and can hold what happens."""
    for source in course.sources:
        if _place(store) == _place(source.reader.target):
            raise ReplayError(
                f"a run cannot be replayed into itself: got {store}, expected another place than that of a run that it is "
                f"made from. Choose another path for the replay."
            )
    if options.get("capture", "replay") != "replay" and any(isinstance(c, Freeze) for c in course.interventions):
        raise ReplayError(
            f'frozen parameters cannot be captured so: got capture={options["capture"]!r}, expected "replay", with Freeze.'
        )


def _place(store: Any) -> Any:
    return Path(store).resolve() if isinstance(store, str | Path) and "://" not in str(store) else str(store)


def _reduction(run: Run, start: int, until: int) -> Backward:
    """The mean or the sum, whichever the recorded scale of every step is."""
    scales = run.reader.read("scale", slice(start, until))
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
    if "penalty" in run.reader and course.penalty is None:
        log.warning("the run was recorded with a penalty in the loss: without a Penalty, this replay has none")
