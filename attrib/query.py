"""A measurement of the states of a run: a function of (theta, b), the parameters and the buffers that training changes.

b are those that are floating-point numbers; what moves and is none (counts) is held as it is at the last of the states.
"""

import logging
from typing import Any

import torch
from torch import Tensor, nn

from .buffers import with_buffers
from .errors import MeasurementError
from .path import Measured
from .run import Run

log = logging.getLogger("attrib")


def measured_of(
    run: Run, model: nn.Module, measurement: Any, dtype: torch.dtype, whole: Tensor, states: range | None = None
) -> Measured:
    """whole (P + E,): a state, as `run.whole` gives it. states: the first and the last that it is asked for.

    Raises:
        MeasurementError: it is none, or depends on what is held.
    """
    floating, ends = run.trajectory.buffers.floating, states or range(run.steps)
    before, held = (
        {name: t.to(whole.device) for name, t in run.buffers(state).items() if name not in floating.names}
        for state in (ends.start, ends.stop)
    )
    found = Measured(model, measurement, run.layout, dtype, whole, floating, held)
    if held:
        found.check_held(before)
    return found


def query_of(
    run: Run, model: nn.Module, measurement: Any, dtype: torch.dtype | None, whole: Tensor, states: range
) -> Measured:
    """In float64 unless asked otherwise; in the run's type where a callable's own tensors leave no choice."""
    try:
        return measured_of(run, model, measurement, dtype or torch.float64, whole, states)
    except MeasurementError as error:
        if dtype is not None or run.dtype == torch.float64:
            raise
        try:
            found = measured_of(run, model, measurement, run.compute, whole, states)
        except MeasurementError:
            raise error from None
        log.info("the measurement is computed in %s, the type of its own tensors", run.compute)
        return found


def state_of(run: Run, model: nn.Module) -> Tensor:
    """(P + E,): the state that a model of the run's architecture holds, as `run.whole` gives those of the run."""
    own, buffers = dict([*model.named_parameters(), *model.named_buffers()]), run.trajectory.buffers.floating
    theta = run.layout.flatten(own[name] for name in run.groups)
    return with_buffers(theta, buffers.flatten(own[name] for name in buffers.names)) if buffers.names else theta
