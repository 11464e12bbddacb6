"""Train again from a recorded step on, as it was or changed.

Parameters, optimizer state, hyper-parameters, batches and the generator's state of every step are the recorded ones; the
gradients are computed anew. Unchanged, the replay reproduces the recorded states bit for bit, on the same kind of machine
with the same version of torch.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..functional import uncompiled
from ..generators import generators, random_state
from ..recorder import record
from ..run import Run, open_run
from .course import Backward
from .prepare import Interventions, Loop, check_record, prepare
from .schedule import Batches


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
        batches: of the steps beyond the record: step -> (index, *inputs); by default the last, where it was all examples.
        options: of `attrib.record`: capture, overwrite, ...

    Returns:
        The new run, complete by itself; its header says under "replay" of which run and step it is, and what was changed.

    Raises:
        ReplayError: steps outside the run, an intervention that does not fit it, or a loop that did more than the mean or
            the sum and no `backward`. ModelMismatchError: another model. What `attrib.record` raises. In all cases before
            anything is written, but for what is wrong with a batch of `batches`.

    Example:
        >>> grown = attrib.intervention.Transplant("hidden.*", run, 12)
        >>> again = attrib.replay(run, 4, grown, model=model, loss=loss, store="again.zarr")
        >>> again.steps, again.replayed["start"]
        (8, 4)
    """
    course = prepare(run, start, interventions, Loop(uncompiled(model), loss, until, backward, batches))
    options = {**_recorded(run), **options}
    check_record(course, store, options.get("capture", "replay"))

    def penalty(model: nn.Module) -> Tensor:
        return course.penalty(step, model)  # the step that the loop below is at

    declared = penalty if course.has_penalty else None
    with (
        random_state(generators()),
        record(course.optimizer, course.model, course.recorded_loss, store, penalty=declared, **options) as recorder,
    ):
        recorder.describe(replay=course.describe())
        random = course.random
        for step in tqdm(course.steps, desc="replay", unit="step", delay=2, disable=not progress):
            random = course.step(step, random, recorder)
    return open_run(store)


def _recorded(run: Run) -> dict[str, Any]:
    """The options that a replay is recorded with unless other ones are passed."""
    return {"constants": "values" if run.constants() else "digest", "shares": run.definition}


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
        >>> change = attrib.intervention.Drop([3, 14])
        >>> for state, trained in attrib.retrain(run, 10, change, model=model, loss=loss):
        ...     print(state, measurement(trained).shape)
        10 torch.Size([2])
        11 torch.Size([2])
        12 torch.Size([2])
    """
    course = prepare(run, start, interventions, Loop(uncompiled(model), loss, until, backward, batches))

    def states() -> Iterator[tuple[int, nn.Module]]:
        random, stepper = course.random, Unrecorded(course.optimizer)
        yield course.steps.start, course.model
        for step in course.steps:
            course.set_modes()  # whoever looks may have called eval()
            random = course.step(step, random, stepper)
            yield step + 1, course.model

    return states()


class Unrecorded(NamedTuple):
    """An optimizer stepped as a recorder is."""

    optimizer: torch.optim.Optimizer

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()

    def batch(self, index: Any, *batch: Any) -> None:
        pass

    def step(self, index: Any = None, *batch: Any) -> None:
        self.optimizer.step()
