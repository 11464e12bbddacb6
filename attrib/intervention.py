"""Go back to a step of a recorded run and train on from there.

Parameters, optimizer state, hyper-parameters, batches and the generator's state of every step are the recorded ones; the
gradients are computed anew. Unchanged, the replay reproduces the recorded states bit for bit, on the same kind of machine
with the same version of torch.
"""

import logging
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .errors import ReplayError
from .functional import random_state, training_modes
from .recorder import Recorder, record
from .run import Run, check_model, open_run

log = logging.getLogger("attrib")


def replay(
    run: Run,
    start: int = 0,
    *,
    model: nn.Module,
    loss: Callable[..., Tensor],
    store: Any,
    until: int | None = None,
    backward: Callable[[Tensor], Any] | None = None,
    progress: bool = True,
    **options: Any,
) -> Run:
    """Train again from a recorded step on, recorded.

    Args:
        run: from `attrib.open_run`.
        start: the step to begin with, 0 .. T - 1.
        model: of the recorded architecture; a copy is trained.
        loss: as given to `attrib.record`.
        store: path or zarr Store for the new run; its step 0 is `start`.
        until: the step to end before; None for the last recorded one.
        backward: what the loop did with the losses (B,) of a batch before the step, if it was not
            `losses.mean().backward()` or `losses.sum().backward()`, such as clipping.
        options: of `attrib.record`: capture, overwrite, ...

    Returns:
        The new run. Its header says under "replay" of which run and from which step it is.

    Raises:
        ReplayError: a step outside the run, or a reduction that is neither the mean nor the sum and no `backward`.
        ModelMismatchError: another model. What `attrib.record` raises. In all cases before anything is written.

    Example:
        >>> again = attrib.replay(run, 500, model=model, loss=loss, store="again.zarr")  # doctest: +SKIP
    """
    until = run.steps if until is None else until
    if not 0 <= start < until <= run.steps:
        raise ReplayError(
            f"the steps are not in the run: got {start} to {until}, expected 0 <= start < until <= {run.steps}, at "
            f"{run.reader.target}."
        )
    if str(store) == str(run.reader.target):
        raise ReplayError(
            f"a run cannot be replayed into itself: got {store} for both. Choose another path for the replay."
        )
    check_model(run, model, values=False)
    backward = backward or _reduction(run, start, until)
    _warn_of_versions(run)
    trained = deepcopy(model)
    run.load(trained, start)
    steps = tqdm(range(start, until), desc="replay", unit="step", delay=2, disable=not progress)
    with (
        random_state(torch.get_rng_state()),
        training_modes(trained, run.header["training"]),
        record(run.optimizer(trained, start), trained, loss, store, **options) as recorder,
    ):
        recorder.describe(replay={"run": str(run.reader.target), "start": start})
        for step in steps:
            _step(run, step, recorder, trained, loss, backward)
    return open_run(store)


def _step(
    run: Run,
    step: int,
    recorder: Recorder,
    model: nn.Module,
    loss: Callable[..., Tensor],
    backward: Callable[[Tensor], Any],
) -> None:
    """A recorded step, made again."""
    run.set_options(recorder.optimizer, step)
    batch = tuple(b.to(next(model.parameters()).device) for b in run.batch(step))
    if (drawn := run.random_state(step)) is not None:
        torch.set_rng_state(drawn)
    recorder.zero_grad()
    backward(loss(model, *batch))
    recorder.step(run.index(step), *batch)


def _reduction(run: Run, start: int, until: int) -> Callable[[Tensor], Any]:
    """The mean or the sum, whichever the recorded scale of every step is."""
    scales = [(step, run.scale(step), len(run.index(step))) for step in range(start, until)]
    if all(scale == 1 / size for _, scale, size in scales):
        return lambda losses: losses.mean().backward()
    if all(scale == 1 for _, scale, _ in scales):
        return lambda losses: losses.sum().backward()
    step, scale, size = next(s for s in scales if s[1] != 1 / s[2])
    raise ReplayError(
        f"the loop did more than take the mean or the sum: got a scale of {scale:.6g} for {size} examples, expected "
        f"{1 / size:.6g}, at step {step}. Pass backward=, what it did with the losses of a batch, such as clipping."
    )


def _warn_of_versions(run: Run) -> None:
    recorded = run.header["versions"]["torch"]
    if recorded != torch.__version__:
        log.warning(
            "the run was recorded with torch %s, this is torch %s: the replay may differ in the last bits",
            *(recorded, torch.__version__),
        )
