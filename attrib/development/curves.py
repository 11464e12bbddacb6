"""The whole trajectory: a measurement at every state of a run, and along the line between any two states of any runs.

accuracy = attrib.evaluate(run, model, measurement)                     # (state, query)
line = attrib.interpolate(run, 100, other, other.steps, model, losses)  # (position, query)
attrib.barrier(line), attrib.convexity_gap(line)                        # (query,)
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn

from ..errors import ModelMismatchError
from ..functional import uncompiled
from ..kernels import lines
from ..matching import check_model
from ..query import measured_of
from ..run import Run


def evaluate(
    run: Run, model: nn.Module, measurement: Any, states: Sequence[int] | None = None, dtype: torch.dtype | None = None
) -> xr.DataArray:
    """A measurement at states of a run.

    Args:
        run: from `attrib.open_run`.
        model: of the recorded architecture, in its mode; left as it is.
        measurement: `model -> (Q,)`, or one of `attrib.measure`.
        states: 0 .. T; None for all.
        dtype: compute type; None for the recorded one.

    Returns:
        (state, query) in the measurement's units.

    Raises:
        ModelMismatchError, MeasurementError. IndexError: no such state.

    Example:
        >>> attrib.evaluate(run, model, measurement, states=[0, 6, 12]).shape
        (3, 2)
    """
    chosen = list(range(run.steps + 1)) if states is None else [int(s) for s in states]
    if not chosen or min(chosen) < 0 or max(chosen) > run.steps:
        raise IndexError(f"there are no such states: got {chosen}, expected some of 0 to {run.steps}, at evaluate.")
    values = values_of(run, model, measurement, dtype)
    ascending, places = np.unique(chosen, return_inverse=True)
    found = [values(theta).double().cpu().numpy() for theta in run.trajectory.each(ascending.tolist())]
    return labelled(np.stack(found)[places], {"state": np.array(chosen)}, measurement)


def interpolate(
    run: Run,
    state: int,
    other: Run,
    other_state: int,
    model: nn.Module,
    measurement: Any,
    points: int = 21,
    dtype: torch.dtype | None = None,
) -> xr.DataArray:
    """A measurement along the straight line from a state of a run to a state of this or another, buffers that training
    changes (running statistics) along it too.

    Args:
        run, state: where the line begins; states are 0 .. T.
        other, other_state: where it ends.
        model, measurement, dtype: as for `attrib.evaluate`.
        points: evenly spaced, both ends among them; at least 3.

    Returns:
        (position, query) in the measurement's units, position 0 at the first state and 1 at the second.

    Raises:
        ModelMismatchError: the runs are not of one architecture, or not of the model's. ValueError: fewer than 3 points.
        MeasurementError. IndexError: no such state.

    Example:
        >>> line = attrib.interpolate(run, 0, changed, 12, model, measurement)
        >>> line.dims, float(line["position"][-1])
        (('position', 'query'), 1.0)
    """
    if points < 3:
        raise ValueError(f"there is no line: got {points} points, expected at least 3, at interpolate.")
    check_same(run, other)
    values = values_of(run, model, measurement, dtype)
    start, end = run.whole(state), other.whole(other_state)
    at = np.linspace(0, 1, points)
    found = [values(torch.lerp(start.double(), end.double(), float(t)).to(run.compute)).double() for t in at]
    return labelled(torch.stack(found).cpu().numpy(), {"position": at}, measurement)


def barrier(line: xr.DataArray) -> xr.DataArray:
    """(query,): how far a loss along a line (position, query) rises above the straight line between its ends; 0 at least
    (Frankle et al. 2020).

    In the line's units; a ValueError where it is none, as `attrib.interpolate` gives it.

    Example:
        >>> import xarray as xr
        >>> line = xr.DataArray([[1.0], [4.0], [3.0]], dims=("position", "query"))
        >>> attrib.barrier(line).values
        array([2.])
    """
    return _along(line, lines.barriers)


def convexity_gap(line: xr.DataArray) -> xr.DataArray:
    """(query,): the largest barrier on any part of a line (position, query); 0 where the loss is convex along it
    (Juneja et al. 2023).

    In the line's units; a ValueError where it is none, as `attrib.interpolate` gives it.

    Example:
        >>> import xarray as xr
        >>> line = xr.DataArray([[3.0], [0.0], [2.0], [0.0], [3.0]], dims=("position", "query"))
        >>> attrib.convexity_gap(line).values, attrib.barrier(line).values
        (array([2.]), array([0.]))
    """
    return _along(line, lines.convexity_gaps)


def values_of(run: Run, model: nn.Module, measurement: Any, dtype: torch.dtype | None) -> Callable[[Tensor], Tensor]:
    """A state (P + E,), as `run.whole` gives it -> the measurement (Q,)."""
    model = uncompiled(model)
    check_model(run, model)
    device = next(model.parameters()).device
    query = measured_of(run, model, measurement, dtype or run.compute, run.whole(0).to(device))
    return lambda theta: query.values(theta.to(device))


def labelled(values: np.ndarray, axes: Mapping[str, Any], measurement: Any) -> xr.DataArray:
    """(*axes, Q) with the measurement's names and units."""
    names = list(getattr(measurement, "names", ())) or list(range(values.shape[-1]))
    said = getattr(measurement, "name", getattr(measurement, "__name__", "measurement"))
    return xr.DataArray(values, {**axes, "query": names}, name=said, attrs={"units": getattr(measurement, "units", "")})


def check_same(run: Run, other: Run) -> None:
    """Raise ModelMismatchError where two runs are not of one architecture, or differ in what training does not move."""
    if other.layout != run.layout:
        raise ModelMismatchError(
            f"the runs are not of one architecture: got {other.layout.names} of shapes {other.layout.shapes}, expected "
            f"{run.layout.names} of {run.layout.shapes}, at {other.reader.target}."
        )
    for name, known in run.digests.items():
        if other.digests.get(name) != known and name not in run.header.get("buffers", ()):
            raise ModelMismatchError(
                f"the runs differ in a buffer or frozen parameter, so that no line of parameters joins them: got another "
                f"value, at {name!r} of {other.reader.target}."
            )


def _along(line: xr.DataArray, function: Callable[[np.ndarray], np.ndarray]) -> xr.DataArray:
    if "position" not in line.dims or line.sizes["position"] < 3:
        raise ValueError(
            f"that is no line: got dimensions {line.dims} of sizes {line.shape}, expected 'position' of at least 3, as "
            f"attrib.interpolate gives it."
        )
    moved = line.transpose(..., "position")
    return xr.DataArray(function(moved.values), {d: line[d] for d in moved.dims[:-1]}, name=line.name, attrs=line.attrs)
