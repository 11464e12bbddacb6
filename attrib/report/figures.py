"""Figures from the labelled data of a result (extra `plot`).

Each is a function of a result and the position of a query that draws on `ax`, or on new axes, and returns it. What is too
much to draw is binned or folded (`thin`), and the labels say so.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from ..ledger import said as said_term
from ..ledger import terms_of
from ..result import Influence, Labelled, Result
from .extras import need
from .files import check_file, replacing
from .shown import Describe, said, tagged
from .thin import bin_steps, by_tag, fold_groups

# Okabe and Ito 2008, distinguishable with any colour vision
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#999999")
DOWN, UP, WHOLE = "#D55E00", "#0072B2", "#555555"
BINS = 120
BARS = 24  # groups in a bar chart
LETTERS = 40  # of a label


def timeline(result: Labelled, query: int = 0, ax: Any = None) -> Any:
    """What each group's updates changed, stacked and signed, in bins of update steps; the measurement itself over it. Of a
    difference or an influence what stands at each step, and the sensitivity to the parameters.

    Groups beyond eight are folded into one.

    Raises:
        KeptAxesError: it was not kept along steps and groups.

    Example:
        >>> attrib.report.figures.timeline(result, query=1).get_ylabel()
        'change per step (nats)'
    """
    ax = _axes(ax)
    other = stacked(ax, result.timeline().isel(query=query), result.trace.isel(query=query))
    what = "influence" if isinstance(result, Influence) else "change"
    ax.set_ylabel(f"{ax.get_ylabel().replace('change', what)}{_units(result)}")
    if isinstance(result, Result):
        other.set_ylabel(f"{_measured(result)}{_units(result)}")
    else:
        other.set_ylabel("sensitivity, times that at the end")
        other.set_yscale("log")
    handles = [*ax.get_legend_handles_labels()[0], *other.get_legend_handles_labels()[0]]
    ax.legend(handles=handles, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=5, frameon=False, fontsize=8)
    return ax


def cumulative(result: Result, query: int = 0, n: int = 8, describe: Describe | None = None, ax: Any = None) -> Any:
    """Running sums, over the steps, of the n examples whose contributions end up largest in size, of all others together,
    of weight decay, and of a remainder and of buffers that training changes where there are.

    Raises:
        KeptAxesError: the result was not kept along step and example.

    Example:
        >>> ax = attrib.report.figures.cumulative(result, n=3, describe=lambda i: f"example {i}")
        >>> ax.get_ylabel()
        'contribution so far (nats)'
    """
    values = result.select([query]).by("step", "example")[0]
    ax = _axes(ax)
    final = values.values.sum(0)
    order = np.argsort(-np.abs(final), kind="stable")
    steps, ids = values["step"].values, values["example"].values.tolist()
    rest = values.values[:, order[n:]].sum(1)
    rows = result.decay, result.remainder, result.buffers
    decay, remainder, buffers = (v.isel(query=query).sum("group").values for v in rows)
    for label, style, per_step in (
        (f"all {max(0, len(order) - n)} other examples", ":", rest),
        ("weight decay", "--", decay),
        *((("remainder", "-.", remainder),) if remainder.any() else ()),
        *((("buffers", (0, (1, 3)), buffers),) if buffers.any() else ()),
    ):
        running = np.cumsum(per_step)
        ax.plot(steps, running, linestyle=style, color="black", linewidth=1.4, label=f"{label}  ({running[-1]:+.2f})")
    for k, e in enumerate(order[:n]):
        running = np.cumsum(values.values[:, e])
        label = f"{shortened(said(describe, ids[e]))}  ({final[e]:+.2f})"
        style = "-" if k < len(COLOURS) else "--"
        ax.plot(steps, running, style, color=COLOURS[k % len(COLOURS)], linewidth=1.2, label=label)
    ax.axhline(0, color="black", linewidth=0.6)
    ax.set(xlabel="step", ylabel=f"contribution so far{_units(result)}", xlim=(steps[0], max(steps[-1], steps[0] + 1)))
    ax.legend(frameon=False, fontsize=8, loc="best")
    return ax


def heat_map(result: Result, query: int = 0, n: int = 30, describe: Describe | None = None, ax: Any = None) -> Any:
    """Contributions of the n examples that count most, (example, bin of steps), blue where they raised the measurement.

    Raises:
        KeptAxesError: the result was not kept along step and example.

    Example:
        >>> attrib.report.figures.heat_map(result, n=10).get_ylabel()
        '10 of 24 train examples'
    """
    values = result.select([query]).by("step", "example")[0]
    ax = _axes(ax)
    total = values.values.sum(0)
    chosen = np.argsort(-np.abs(total), kind="stable")[:n]
    chosen = chosen[np.argsort(-total[chosen], kind="stable")]
    bins = bin_steps(values.sizes["step"], BINS)
    sums = bins.sum(values.values[:, chosen], 0).T  # (n, B)
    steps = np.append(values["step"].values, values["step"].values[-1] + 1)
    largest = np.abs(sums).max(initial=0.0) or 1.0
    edges = np.arange(len(chosen) + 1) - 0.5
    mesh = ax.pcolormesh(steps[bins.edges], edges, sums, cmap=diverging(), vmin=-largest, vmax=largest)
    labels = [shortened(said(describe, e)) for e in values["example"].values[chosen].tolist()]
    ax.set_yticks(range(len(chosen)), labels, fontsize=7)
    ax.invert_yaxis()
    ax.set(xlabel="step", ylabel=f"{len(chosen)} of {len(total)} train examples")
    ax.figure.colorbar(mesh, ax=ax, label=f"contribution {per(bins.width)}{_units(result)}")
    return ax


def gross_net(result: Result, query: int = 0, ax: Any = None) -> Any:
    """Per group, what its updates changed in all (net) and the sum of the sizes of the changes of each step (gross).

    A group whose net is far below its gross worked without lasting effect on this measurement.

    Example:
        >>> ax = attrib.report.figures.gross_net(result)
        >>> [label.get_text() for label in ax.get_yticklabels()]
        ['hidden.weight', 'hidden.bias', 'output.weight', 'output.bias']
    """
    ax = _axes(ax)
    changes = result.timeline().isel(query=query)
    size = np.abs(changes.values).sum(0)
    gross = fold_groups(abs(changes).sum("update_step"), BARS, size)
    net = fold_groups(changes.sum("update_step"), BARS, size)
    places = np.arange(gross.sizes["group"])
    ax.barh(places, gross.values, color="#cccccc", label="gross: sum of |change| of each step")
    ax.barh(places, net.values, height=0.45, color=UP, label="net change")
    ax.set_yticks(places, [shortened(g) for g in gross["group"].values], fontsize=8)
    ax.invert_yaxis()
    ax.axvline(0, color="black", linewidth=0.6)
    ax.set_xlabel(f"change of {_measured(result)}{_units(result)}")
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False, fontsize=8)
    return ax


def waterfall(result: Result, query: int = 0, tag: Describe | None = None, ax: Any = None) -> Any:
    """The ledger as a way from the initial to the final value, examples apart by `tag` (id -> class, source, ...).

    Raises:
        KeptAxesError: with a tag, where the result was not kept along the examples.

    Example:
        >>> ax = attrib.report.figures.waterfall(result, tag=lambda i: f"class {y[i]}")
        >>> [label.get_text() for label in ax.get_yticklabels()]
        ['initial', 'class 1', 'class 0', 'class 2', 'decay', 'inherited', 'residual', 'final']
    """
    chosen = result.select([query])
    terms = chosen.ledger().terms.isel(query=0)
    moves = [("examples", float(terms["examples"]))]
    if tag is not None:
        contributions = chosen.by("example")[0]
        moves = by_tag(contributions.values, tagged(tag, contributions["example"].values))
    moves += [(said_term(name), float(terms[name])) for name in (*terms_of(chosen.dataset), "residual")]
    ax = _axes(ax)
    level = initial = float(terms["initial"])
    bars = [("initial", 0.0, initial, WHOLE)]
    for name, value in moves:
        bars.append((name, level, value, UP if value >= 0 else DOWN))
        level += value
    bars.append(("final", 0.0, float(terms["final"]), WHOLE))
    for k, (_, base, value, colour) in enumerate(bars):
        ax.barh(k, value, left=base, color=colour)
        ax.annotate(f"{value:+.3g}", (max(base, base + value), k), (3, 0), textcoords="offset points", va="center",
                    fontsize=8)  # fmt: skip
    ax.set_yticks(range(len(bars)), [shortened(name) for name, *_ in bars])
    ax.invert_yaxis()
    ax.axvline(0, color="black", linewidth=0.6)
    ax.use_sticky_edges = False
    ax.margins(x=0.12)
    ax.set_xlabel(f"{_measured(result)}{_units(result)}")
    return ax


def overview(result: Result, query: int, title: str, describe: Describe, path: Any) -> None:
    """Timeline above, cumulative contributions below, saved to a file."""
    figure = _figure(9, 8)
    top, bottom = figure.subplots(2, 1, height_ratios=(1.2, 1))
    timeline(result, query, top)
    cumulative(result, query, 8, describe, bottom)
    figure.suptitle(title)
    figure.savefig(path, dpi=130)


def save(path: Path, draw: Callable[[Any], Any], overwrite: bool = False) -> None:
    """One figure to a file: `draw` is called with its axes.

    Raises:
        StoreExistsError: something is there and overwrite is False.
    """
    check_file(path, overwrite)
    figure = _figure(9, 4.8)
    draw(figure.subplots())
    with replacing(path) as beside:
        figure.savefig(beside, dpi=130)


def stacked(ax: Any, data: xr.DataArray, curve: xr.DataArray | None = None) -> Any:
    """Changes (step, group), stacked and signed, in bins of steps, on `ax`; over them the curve (step,) that they change, on
    axes of its own, which are returned, or None without a curve.

    Raises:
        ValueError: other dimensions, or values that are not finite.
    """
    expect(data, "stacked bars", ("a step", "group"))
    if not np.isfinite(data.values).all():
        raise ValueError(
            f"changes cannot be stacked: got {(~np.isfinite(data.values)).sum()} that are not finite, expected none, "
            f"at {data.name or 'an array without a name'}. Leave out the steps from which the run had diverged."
        )
    changes = fold_groups(data.transpose(..., "group"), len(COLOURS))
    at = changes[changes.dims[0]].values
    steps = np.append(at, at[-1] + 1)
    bins = bin_steps(len(at), BINS)
    edges, sums = steps[bins.edges], bins.sum(changes.values, 0)  # (B + 1,), (B, G)
    above, below = np.zeros(bins.count), np.zeros(bins.count)
    for values, name, colour in zip(sums.T, changes["group"].values, COLOURS, strict=False):
        base = np.where(values >= 0, above, below)
        ax.bar(edges[:-1], values, np.diff(edges), base, align="edge", color=colour, label=shortened(name))
        above, below = above + np.maximum(values, 0), below + np.minimum(values, 0)
    ax.axhline(0, color="black", linewidth=0.6)
    ax.set(xlabel="step", ylabel=f"change {per(bins.width)}", xlim=(edges[0], edges[-1]))
    if curve is None:
        return None
    expect(curve, "the curve", ("a step",))
    other = ax.twinx()
    other.spines["right"].set_visible(True)
    name = str(curve.name or "measurement").replace("_", " ")
    other.plot(curve[curve.dims[0]].values, curve.values, color="black", linewidth=1.4, label=name)
    other.set_ylabel(name)
    return other


def expect(data: xr.DataArray, what: str, dims: tuple[str, ...]) -> None:
    """These dimensions, in any order, one such as "a step" of any name; nothing of size zero."""
    named = {d for d in dims if not d.startswith("a ")}
    if data.ndim != len(dims) or not named <= set(data.dims) or not data.size:
        raise ValueError(
            f"{what} cannot be drawn of these data: got dimensions {data.dims} of sizes {data.shape}, "
            f"expected ({', '.join(dims)}), none empty, at {data.name or 'an array without a name'}. "
            f"Select from or average over the others, or rename."
        )


def _figure(width: float, height: float) -> Any:
    return need("matplotlib.figure", "plot").Figure(figsize=(width, height), layout="constrained")


def _axes(ax: Any) -> Any:
    return need("matplotlib.pyplot", "plot").subplots(layout="constrained")[1] if ax is None else ax


def diverging() -> Any:
    return need("matplotlib.colors", "plot").LinearSegmentedColormap.from_list("contribution", [DOWN, "white", UP])


def per(steps: int) -> str:
    return "per step" if steps == 1 else f"per {steps} steps"


def shortened(text: object) -> str:
    """As it stands: not as mathematics, not hidden from the legend for its underscore, not longer than there is room."""
    shown = str(text) if len(str(text)) <= LETTERS else str(text)[: LETTERS - 3] + "..."
    return ("\u200b" if shown.startswith("_") else "") + shown.replace("$", r"\$")


def _units(result: Labelled) -> str:
    return f" ({result.units})" if result.units else ""


def _measured(result: Labelled) -> str:
    return str(result.dataset.attrs.get("measurement", "measurement"))
