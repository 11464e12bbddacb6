"""Which states of which runs lie in one basin: barriers between all of them, clusters, and when a run settles in its own.

points = {f"seed {s} at {t}": (run, t) for s, run in enumerate(runs) for t in range(0, run.steps + 1, 50)}
found = attrib.connectivity(points, model, mean_loss)              # barrier, gap: (point, other, query)
labels = attrib.clusters(found["barrier"][..., 0], height=0.05)    # (point,)
attrib.settled(labels[:n])                                         # the first point from which on all are in one cluster

Source: Frankle et al. 2020, arXiv 1912.05671 (linear mode connectivity); Juneja et al. 2023, arXiv 2205.12411 (convexity
gap, clusters of runs).
"""

from collections.abc import Mapping
from itertools import combinations
from typing import Any

import numpy as np
import torch
import xarray as xr
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform
from torch import nn
from tqdm import tqdm

from ..kernels import lines
from ..run import Run
from .curves import check_same, labelled, values_of


def connectivity(
    points: Mapping[str, tuple[Run, int]],
    model: nn.Module,
    measurement: Any,
    positions: int = 11,
    dtype: torch.dtype | None = None,
    progress: bool = True,
) -> xr.Dataset:
    """A loss on the straight lines between all pairs of states: linear mode connectivity (Frankle et al. 2020).

    Args:
        points: name -> (run, state); at least two, of one architecture.
        model: of that architecture, in its mode; left as it is.
        measurement: `model -> (Q,)`, losses: higher is worse.
        positions: evenly spaced on each line, both ends among them; at least 3.
        dtype: compute type; None for the recorded one.

    Returns:
        `barrier`, how far the loss rises above the chord, and `gap`, the largest barrier on any part of the line, (point,
        other, query), symmetric, in the measurement's units; `loss` (point, query).

    Raises:
        ValueError: fewer than 2 points or 3 positions. ModelMismatchError, MeasurementError. IndexError: no such state.

    Example:
        >>> losses = attrib.measure.loss(x, y)
        >>> found = attrib.connectivity({"as it was": (run, 12), "changed": (changed, 12)}, model, losses)
        >>> found["barrier"].sel(point="as it was", other="changed").shape
        (24,)
    """
    if len(points) < 2 or positions < 3:
        raise ValueError(
            f"there are no lines: got {len(points)} points and {positions} positions, expected at least 2 and 3, at "
            f"connectivity."
        )
    runs = [run for run, _ in points.values()]
    for run in runs[1:]:
        check_same(runs[0], run)
    values = values_of(runs[0], model, measurement, dtype)
    at = np.linspace(0, 1, positions)
    vectors = [run.whole(state).double() for run, state in points.values()]

    def loss(theta: torch.Tensor) -> np.ndarray:
        return values(theta.to(runs[0].compute)).double().cpu().numpy()

    ends = np.stack([loss(v) for v in vectors])
    found = np.zeros((2, len(points), len(points), ends.shape[1]))
    for i, j in tqdm(list(combinations(range(len(points)), 2)), desc="lines", delay=2, disable=not progress):
        inner = [loss(torch.lerp(vectors[i], vectors[j], float(t))) for t in at[1:-1]]
        line = np.stack([ends[i], *inner, ends[j]], -1)
        found[:, i, j] = found[:, j, i] = lines.barriers(line), lines.convexity_gaps(line)
    axes = {"point": list(points), "other": list(points)}
    both = {name: labelled(v, axes, measurement) for name, v in zip(("barrier", "gap"), found, strict=True)}
    return xr.Dataset({**both, "loss": labelled(ends, {"point": list(points)}, measurement)})


def clusters(barriers: xr.DataArray, height: float) -> xr.DataArray:
    """States that lie in one basin: no barrier within a cluster is higher than `height`.

    Args:
        barriers: (point, other), symmetric, as `connectivity` gives them for one query.
        height: in the measurement's units.

    Returns:
        (point,) int, numbered in the order of the points. Complete linkage: the largest barrier between two clusters counts.

    Raises:
        ValueError: not a symmetric matrix, or a height below 0.

    Example:
        >>> import xarray as xr
        >>> barriers = xr.DataArray([[0.0, 0.1, 2.0], [0.1, 0.0, 3.0], [2.0, 3.0, 0.0]], dims=("point", "other"))
        >>> attrib.clusters(barriers, height=0.5).values
        array([0, 0, 1])
    """
    values = np.asarray(barriers.values, float)
    if values.ndim != 2 or values.shape[0] != values.shape[1] or not np.array_equal(values, values.T) or height < 0:
        raise ValueError(
            f"these are no barriers between points: got shape {values.shape} and height {height}, expected a symmetric "
            f"matrix and a height of 0 or more, at clusters. Select one query: found['barrier'][..., 0]."
        )
    tree = linkage(squareform(values, checks=False), "complete")
    _, labels = np.unique(fcluster(tree, height, "distance"), return_inverse=True)
    order = {label: n for n, label in enumerate(dict.fromkeys(labels.tolist()))}
    dim = str(barriers.dims[0])
    return xr.DataArray([order[v] for v in labels.tolist()], {dim: barriers[dim].values}, name="cluster")


def settled(labels: xr.DataArray) -> Any:
    """The first of a run's states, in order, from which on all are in the cluster of the last one.

    Args:
        labels: (point,) clusters of states of one run.

    Returns:
        Its label on that dimension.

    Example:
        >>> import xarray as xr
        >>> labels = xr.DataArray([0, 0, 1, 1], {"point": [0, 100, 200, 300]}, "point")
        >>> int(attrib.settled(labels))
        200
    """
    other = np.flatnonzero(labels.values != labels.values[-1])
    found = labels[str(labels.dims[0])].values[int(other[-1]) + 1 if len(other) else 0]
    return found.item() if hasattr(found, "item") else found
