"""Interventions beside the untouched run: what a group is needed for, at the end and on the way.

These are counterfactuals, not contributions: they train again, or take a part out.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn
from tqdm import tqdm

from ..errors import ReplayError
from ..intervention import Intervention, retrain
from ..intervention.base import Window
from ..layout import match_names
from ..query import state_of
from ..run import Run
from .curves import evaluate, labelled, values_of

Change = Intervention | Sequence[Intervention]


def what_if(
    run: Run,
    changes: Mapping[str, Change],
    measurement: Any,
    *,
    model: nn.Module,
    loss: Callable[..., Tensor],
    states: Sequence[int] | None = None,
    start: int = 0,
    dtype: torch.dtype | None = None,
    progress: bool = True,
    **options: Any,
) -> xr.DataArray:
    """Train the run again with each of some changes, and measure it on the way and at the end.

    Args:
        run: from `attrib.open_run`.
        changes: name -> interventions (`attrib.intervention`), one or several.
        measurement: `model -> (Q,)`, or one of `attrib.measure`.
        model, loss: as recorded.
        states: at which to measure, 0 .. T and beyond; None for the last.
        start: where changes of state are made; those that act in a window of steps alone begin there.
        options: of `attrib.retrain`: backward, batches.

    Returns:
        (change, state, query), the first change being "untouched"; what a change does is the difference to that.

    Raises:
        ReplayError, ModelMismatchError, MeasurementError. ValueError: no changes, or one of the name "untouched".

    Example:
        >>> changes = {"frozen from 6": attrib.intervention.Freeze("hidden.*", slice(6, None))}
        >>> found = attrib.what_if(run, changes, measurement, model=model, loss=loss)
        >>> (found - found.sel(change="untouched")).shape
        (2, 1, 2)
    """
    if not changes or "untouched" in changes:
        raise ValueError(
            f"there is nothing to compare: got changes {list(changes)}, expected some, none of them called 'untouched', at "
            f"what_if."
        )
    at = [run.steps] if states is None else sorted({int(s) for s in states})
    if not at or at[0] < 0:
        raise ReplayError(f"there are no such states: got {at}, expected some, 0 or more, at what_if.")
    recorded = [s for s in at if s <= run.steps]
    values = values_of(run, model, measurement, dtype)
    known = dict(zip(recorded, evaluate(run, model, measurement, recorded, dtype).values, strict=True))
    cases = {name: _begun(run, change, start) for name, change in changes.items()}
    if at[-1] > run.steps:
        cases["untouched"] = (run.steps, [])
    found = {"untouched": known}
    for name, (first, change) in tqdm(cases.items(), desc="what if", unit="run", delay=2, disable=not progress):
        until = max([at[-1], first + 1, *(start + 1 for start in _starts(change))])
        states_of = retrain(run, first, change, model=model, loss=loss, until=until, **options)
        found[name] = {s: known[s] for s in recorded if s < first} | _measured(run, states_of, values, at)
    rows = np.stack([[found[name][s] for s in at] for name in found])
    return labelled(rows, {"change": list(found), "state": at}, measurement)


def _measured(
    run: Run, states: Iterator[tuple[int, nn.Module]], values: Callable[[Tensor], Tensor], at: Sequence[int]
) -> dict[int, np.ndarray]:
    """state -> (Q,), at those of the states that are asked for; ends at the last of them."""
    found = {}
    for state, trained in states:
        if state in at:
            found[state] = values(state_of(run, trained)).double().cpu().numpy()
        if state >= at[-1]:
            break
    return found


def _begun(run: Run, change: Change, start: int) -> tuple[int, list[Intervention]]:
    """The state to train from, and the interventions: before it nothing is changed."""
    given = [change] if isinstance(change, Intervention) else list(change)
    windows = _starts(given)
    first = min(windows) if len(windows) == len(given) and windows else start
    return max(start, min(first, run.steps)), given


def _starts(change: Sequence[Intervention]) -> list[int]:
    """First steps of those that act in a window of steps."""
    return [c.steps.start or 0 for c in change if isinstance(c, Window) and c.steps is not None]


def ablate(
    run: Run,
    model: nn.Module,
    measurement: Any,
    groups: Mapping[str, Sequence[str]] | None = None,
    state: int | None = None,
    to: int | None = None,
    dtype: torch.dtype | None = None,
) -> xr.DataArray:
    """What a measurement would be without what a group of parameters has become.

    Args:
        run, model, measurement: as for `attrib.evaluate`.
        groups: {name: [parameter names or patterns]}; None makes each tensor a group.
        state: that is ablated; None for the last.
        to: the state whose values the group is put back to; None puts zeros.

    Returns:
        (group, query): the measurement with that group alone ablated, minus the measurement as it is.

    Raises:
        ModelMismatchError, MeasurementError; ValueError: a pattern that names no parameter; IndexError: no such state.

    Example:
        >>> attrib.ablate(run, model, measurement, {"hidden": ["hidden.*"], "output": ["output.*"]}).shape
        (2, 2)
    """
    values = values_of(run, model, measurement, dtype)
    theta = run.whole(run.steps if state is None else state)
    other = torch.zeros_like(theta) if to is None else run.whole(to)
    named = {name: [name] for name in run.layout.names} if groups is None else groups
    slices, rows = dict(run.layout.slices()), []
    for name, patterns in named.items():
        changed = theta.clone()
        for tensor in match_names(run.layout.names, patterns, f"group {name!r}"):
            changed[slices[tensor]] = other[slices[tensor]]
        rows.append((values(changed) - values(theta)).double().cpu().numpy())
    return labelled(np.stack(rows), {"group": list(named)}, measurement)
