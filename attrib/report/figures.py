"""Figures from the labelled data of a result; each draws on the Axes it is given and returns it (extra `plot`)."""

from collections.abc import Callable
from typing import Any

import numpy as np

from ..result import Result

# Okabe and Ito 2008, distinguishable with any colour vision
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#999999")
BINS = 120


def timeline(result: Result, query: int, ax: Any) -> Any:
    """Stacked signed change per group in bins of update steps, with the measurement itself over it."""
    changes = result.timeline().isel(query=query)
    steps = changes["update_step"].values
    parts = np.array_split(np.arange(len(steps)), min(BINS, len(steps)))
    edges = np.array([steps[p[0]] for p in parts] + [steps[-1] + 1])
    sums = np.array([changes.values[p].sum(0) for p in parts])  # (bins, G)
    above, below = np.zeros(len(parts)), np.zeros(len(parts))
    for g, name in enumerate(changes["group"].values):
        values = sums[:, g]
        base = np.where(values >= 0, above, below)
        ax.bar(edges[:-1], values, np.diff(edges), base, align="edge", color=COLOURS[g % len(COLOURS)], label=str(name))
        above, below = above + np.maximum(values, 0), below + np.minimum(values, 0)
    units = result.dataset.attrs.get("units") or "its own units"
    width = -(-len(steps) // len(parts))
    ax.set(xlabel="step", ylabel=f"change per {width} steps ({units})", xlim=(edges[0], edges[-1]))
    ax.axhline(0, color="black", linewidth=0.6)
    curve = result.curve.isel(query=query)
    other = ax.twinx()
    other.plot(curve["state"].values, curve.values, color="black", linewidth=1.4, label="measurement")
    other.set_ylabel(f"{result.dataset.attrs.get('measurement', 'measurement')} ({units})")
    handles = [*ax.get_legend_handles_labels()[0], *other.get_legend_handles_labels()[0]]
    ax.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, 1.14), ncols=5, frameon=False, fontsize=8)
    return ax


def cumulative(result: Result, query: int, n: int, describe: Callable[[int], str], ax: Any) -> Any:
    """Running sums, over the steps, of the n examples whose contributions end up largest in size, of all others together,
    and of weight decay: all that the measurement is made of.

    Raises:
        KeptAxesError: the result was not kept along step and example.
    """
    values = result.by("step", "example").isel(query=query)
    final = values.sum("step").values
    order = np.argsort(-np.abs(final), kind="stable")
    decay = result.decay.isel(query=query).sum("group").values
    for label, style, per_step in (
        (f"all {len(order) - n} other examples", ":", values.values[:, order[n:]].sum(1)),
        ("weight decay", "--", decay),
    ):
        running = np.cumsum(per_step)
        ax.plot(
            values["step"].values, running, style, color="black", linewidth=1.4, label=f"{label}  ({running[-1]:+.2f})"
        )
    for k, e in enumerate(order[:n]):
        running = np.cumsum(values.values[:, e])
        label = f"{describe(int(values['example'].values[e]))}  ({final[e]:+.2f})"
        style = "-" if k < len(COLOURS) else "--"
        ax.plot(values["step"].values, running, style, color=COLOURS[k % len(COLOURS)], linewidth=1.2, label=label)
    ax.axhline(0, color="black", linewidth=0.6)
    units = result.dataset.attrs.get("units") or "its own units"
    ax.set(xlabel="step", ylabel=f"contribution so far ({units})", xlim=(values["step"].values[[0, -1]]))
    ax.legend(frameon=False, fontsize=8, loc="best")
    return ax


def overview(result: Result, query: int, title: str, describe: Callable[[int], str], path: Any) -> None:
    """Timeline above, cumulative contributions below, saved to a file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 8), layout="constrained")
    top, bottom = figure.subplots(2, 1, height_ratios=(1.2, 1))
    timeline(result, query, top)
    cumulative(result, query, 8, describe, bottom)
    figure.suptitle(title)
    figure.savefig(path, dpi=130)
