"""Phases of a training run, found and not eyeballed: change points of what its layer groups did, and the onset rule.

    r_b,g = mean over the steps t of bin b of timeline_t,g      B bins
    x_b,g = asinh(r_b,g / median_b |r_b,g|)                     phases differ by orders of magnitude

The means of x change at the points that `kernels.changes` accepts: each with the p value of a permutation test and an
interval of where it is. The sums of the phases over groups add up to the change of the measurement in the window, exactly.

Exactness: sums exact; the level of the test and what it cannot tell (a slow drift is reported as steps) stand in
`kernels/changes.py`, with the sources. Every test is at `level` by itself: of many changes some may be false.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import xarray as xr

from .kernels import changes as kernel
from .result import Result

FEWEST = 8  # bins
SHOWN = 12  # groups printed


class Change(NamedTuple):
    """step: the first of the new phase. low, high: 90 % interval of it, as steps. p_value: of the permutation test.
    explained: share of the variance of the two phases beside it that is between them; 0 to 1, over all groups."""

    step: int
    low: int
    high: int
    p_value: float
    explained: float


@dataclass(frozen=True)
class Phases:
    """What `phases` found; printed, or shown in a notebook, as a table.

    Args:
        changes: in order, K of them: step, low, high, p_value, explained; their steps are borders of bins.
        bounds: K + 2 steps: the first of every phase, then the last of all.
        sums: (K + 1, G) table in the measurement's units, a row per phase, indexed by (first, last) step: what each group's
            updates changed in it.
        refused: the smallest p value of a split that was not accepted; nan where no segment was long enough for one.
        level: that p values were held against.
        width: steps of a bin.
        units: of the measurement.

    Example:
        >>> found = attrib.phases(result)
        >>> len(found.bounds) - len(found.changes)
        2
        >>> found.sums.columns.tolist()
        ['hidden.weight', 'hidden.bias', 'output.weight', 'output.bias']
    """

    changes: tuple[Change, ...]
    bounds: tuple[int, ...]
    sums: pd.DataFrame
    refused: float
    level: float
    width: int
    units: str = ""

    def __str__(self) -> str:
        tested = f"at level {self.level:g}, in bins of {self.width} step{'s' if self.width > 1 else ''}"
        if self.changes:
            rows = [(c.step, f"{c.low} to {c.high}", f"{c.p_value:.4f}", f"{c.explained:.1%}") for c in self.changes]
            table = pd.DataFrame(rows, columns=["change at step", "90 % interval", "p", "explained"])
            lines = [table.to_string(index=False), f"each tested {tested}"]
        else:
            lines = [f"No change was found {tested}: {_smallest(self.refused)}."]
        units = f" ({self.units})" if self.units else ""
        return "\n".join([*lines, "", f"change per phase, from step to step{units}", self._by_group()])

    def _repr_html_(self) -> str:
        return f"<pre>{escape(str(self))}</pre>"

    def _by_group(self) -> str:
        table = self.sums.T
        table.columns = pd.Index([f"{first} to {last}" for first, last in self.sums.index])
        largest = table.abs().sum(axis=1).sort_values(ascending=False, kind="stable").index
        shown = table.loc[[g for g in table.index if g in set(largest[:SHOWN])]]
        if len(table) > SHOWN:
            shown.loc[f"other {len(table) - SHOWN} groups"] = table.loc[largest[SHOWN:]].sum()
        shown.loc["total"] = table.sum()
        return str(shown.rename_axis(None).to_string(float_format="{:+.4f}".format))


def phases(
    result: Result | xr.DataArray,
    query: int = 0,
    *,
    bins: int = 100,
    permutations: int = 999,
    level: float = 0.01,
    seed: int = 0,
) -> Phases:
    """Where the training run changed what it does to a measurement, by group of parameters: binary segmentation of means
    (Scott and Knott 1974), each change tested against permutations (Matteson and James 2014).

    Args:
        result: an `attrib.Result`, whose `timeline()` is taken, or an array with dimensions "group" and one of steps, in
            any order, and possibly "query"; units of the measurement. Entries along steps follow each other in order.
        query: which one, by its position; unused without such a dimension.
        bins: steps are put into at most so many bins of equal width; more bins date changes more sharply, fewer see
            weaker ones.
        permutations: shuffles per test; p values are multiples of 1 / (1 + permutations).
        level: a change is accepted at p <= level.
        seed: the same seed gives the same answer.

    Raises:
        IndexError: no such query.
        ValueError: fewer than 8 bins, other dimensions, values that are not finite, or options out of range.

    Example:
        >>> print(attrib.phases(result))
         change at step 90 % interval      p explained
                      ...
        each tested at level 0.01, in bins of 1 step
        ...
    """
    timeline = _timeline(result, query)
    values, steps = timeline.values.astype(float), timeline[str(timeline.dims[0])].values
    _check(timeline, bins)
    width = -(-len(values) // bins)
    edges = np.append(np.arange(0, len(values), width), len(values))
    if len(edges) - 1 < FEWEST:
        raise ValueError(
            f"too few bins to find changes: got {len(edges) - 1}, of {len(values)} steps with bins={bins}, expected at "
            f"least {FEWEST}. Attribute a longer window, or pass more bins."
        )
    rates = np.add.reduceat(values, edges[:-1], axis=0) / np.diff(edges)[:, None]  # the last bin may be shorter
    smallest = max(2, len(rates) // 33)
    found = kernel.find_changes(_even(rates), permutations=permutations, level=level, smallest=smallest, seed=seed)
    first = steps[edges[:-1]]
    changes = tuple(
        Change(_label(first[c.row]), _label(first[c.low]), _label(first[c.high]), c.p_value, c.explained)
        for c in found.changes
    )
    starts = np.array([0, *(edges[c.row] for c in found.changes)])
    sums = np.add.reduceat(values, starts, axis=0)
    lasts = steps[np.append(starts[1:], len(values)) - 1]
    spans = pd.MultiIndex.from_arrays([steps[starts], lasts], names=["first", "last"])
    table = pd.DataFrame(sums, index=spans, columns=pd.Index(timeline["group"].values, name="group"))
    bounds = tuple(_label(v) for v in (*steps[starts], steps[-1]))
    units = result.units if isinstance(result, Result) else ""
    return Phases(changes, bounds, table, found.refused, level, width, units)


def onset(curve: xr.DataArray | np.ndarray, width: int | None = None, *, steps: Sequence[int] | None = None) -> int:
    """The step at which a curve breaks: where it rises the most more in the next `width` entries than in the last.

    The rule: the first t that maximises [f(t + D) - f(t)] - [f(t) - f(t - D)]. For a fall, pass the negative curve. It
    always names a step, whether or not there is a break: see `phases` for a test.

    Args:
        curve: (T,), in any unit, such as `result.curve[0]`.
        width: D, in entries; by default T // 20, at least 1.
        steps: (T,) labels of the entries; by default the array's coordinate, or 0 to T - 1.

    Returns:
        The label of the entry.

    Raises:
        ValueError: not one dimension, steps of another length, T < 2 D + 1, or values that are not finite.

    Example:
        >>> attrib.onset(np.array([0.0, 0.0, 0.0, 0.0, 1.0, 2.0, 3.0]), 2)
        3
    """
    values = np.asarray(curve, float)
    if values.ndim != 1 or (steps is not None and len(steps) != len(values)):
        raise ValueError(
            f"the curve and its steps do not fit: got shape {values.shape} and "
            f"{'no' if steps is None else len(steps)} steps, expected (T,) and T. Select one query, as in curve[0]."
        )
    if steps is None:
        labels = curve[curve.dims[0]].values if isinstance(curve, xr.DataArray) else np.arange(len(values))
    else:
        labels = np.asarray(steps)
    return _label(labels[kernel.onset(values, max(1, len(values) // 20) if width is None else width)])


def _timeline(result: Result | xr.DataArray, query: int) -> xr.DataArray:
    """(steps, group)"""
    array = result.timeline() if isinstance(result, Result) else result
    if "query" in array.dims:
        count = array.sizes["query"]
        if not -count <= query < count:
            raise IndexError(f"no such query: got {query}, expected 0 to {count - 1}. Choose one by its position.")
        array = array.isel(query=query)
    if "group" not in array.dims or array.ndim != 2:
        raise ValueError(
            f"the dimensions are no timeline's: got {', '.join(map(str, array.dims))}, expected one of steps, and group. "
            f"Pass a result, or the like of result.timeline()[0]."
        )
    return array.transpose(..., "group")


def _check(timeline: xr.DataArray, bins: int) -> None:
    if bins < FEWEST:
        raise ValueError(f"too few bins: got {bins}, expected at least {FEWEST}. Pass more bins.")
    if not np.isfinite(timeline.values).all():
        row, column = np.argwhere(~np.isfinite(timeline.values))[0]
        step, group = timeline[str(timeline.dims[0])].values[row], timeline["group"].values[column]
        raise ValueError(
            f"the timeline is not finite: got {timeline.values[row, column]}, expected numbers, at step {step}, group "
            f"{group}. Choose a window of the run without it."
        )


def _even(rates: np.ndarray) -> np.ndarray:
    """asinh(rate / median |rate|): phases differ by orders of magnitude, and the loudest would hide all others."""
    usual = np.median(np.abs(rates), axis=0)
    return np.arcsinh(rates / np.where(usual > 0, usual, np.abs(rates).max(0) + (rates == 0).all(0)))


def _smallest(p_value: float) -> str:
    return "no segment was long enough" if np.isnan(p_value) else f"the smallest p was {p_value:.4f}"


def _label(value: Any) -> int:
    """A step as a plain number."""
    plain: int = value.item() if hasattr(value, "item") else value
    return plain
