"""Drawings of labelled arrays on axes, for the pages of studies (extra `plot`).

Each draws on the `ax` it is given and returns it. Numbers that are missing are seen to be missing.
"""

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import xarray as xr

from .extras import need
from .figures import COLOURS, UP, diverging, expect, shortened, stacked

STYLES = ("-", "--", ":", "-.")
QUIET, DARK = "#c4c4c4", "#1b1b1b"
SMALL = 9  # points
LETTER = 0.6  # of the size of type: width of a letter, rather wide


def curves(
    ax: Any,
    data: xr.DataArray,
    x: str,
    hue: str | None = None,
    spread: str | None = None,
    log: bool = False,
    labels: Mapping[Any, str] | None = None,
    legend: bool = True,
) -> Any:
    """A line per entry of `hue`; with `spread`, the median over it, and a band from its least to its greatest value.

    What is not finite is left out, and where nothing along `spread` is finite there is neither line nor band.

    Args:
        data: of dimensions x and, where given, hue and spread, in any order; its name names the vertical axis.
        log: a logarithmic vertical axis.
        labels: entry of hue -> what the legend, right of the axes, calls it.
        legend: False where a panel beside this one has it.

    Raises:
        ValueError: other dimensions.
    """
    expect(data, "curves", tuple(d for d in (x, hue, spread) if d is not None))
    values = data.where(np.isfinite(data)).transpose(x, ...)
    at = values[x].values
    for k in range(values.sizes[hue] if hue else 1):
        chosen = values.isel({hue: k}) if hue else values
        entry = chosen[hue].values.item() if hue else None
        name = shortened((labels or {}).get(entry, _named(entry))) if hue else None
        colour, style = COLOURS[k % len(COLOURS)], STYLES[k // len(COLOURS) % len(STYLES)]
        if spread:
            low, middle, high = _range(chosen.values)
            ax.fill_between(at, low, high, color=colour, alpha=0.2, linewidth=0)
        else:
            middle = chosen.values
        ax.plot(at, middle, style, color=colour, linewidth=1.5, label=name)
    if log:
        ax.set_yscale("log")
    ax.set(xlabel=_said(x), ylabel=_said(data.name))
    if hue and legend:
        _legend(ax)
    return ax


def stack(ax: Any, data: xr.DataArray, curve: xr.DataArray | None = None) -> Any:
    """Changes, stacked and signed, in bins of steps; over them the curve that they change, on an axis of its own.

    Args:
        data: (step, group) of any name of the first; all finite. Groups beyond eight are folded into one.
        curve: (step,) of any name. Its name is the axis's.

    Raises:
        ValueError: other dimensions, or values that are not finite.
    """
    other = stacked(ax, data, curve)
    handles = [h for a in (ax, other) if a is not None for h in a.get_legend_handles_labels()[0]]
    _legend(ax, handles, 0 if other is None else 58)
    return ax


def grid(
    ax: Any,
    data: xr.DataArray,
    fmt: str = "{:.0f}",
    centre: float | None = None,
    label: str = "",
    bar: bool = True,
    ratio: bool = False,
) -> Any:
    """A heat map with its numbers in the cells.

    Args:
        data: two dimensions: down, across. Cells that are not finite are grey and hatched.
        fmt: of the numbers.
        centre: a value that is white, lower ones orange and higher ones blue; without it, the greater the darker.
        label: of the colours.
        bar: the scale of the colours beside the map.
        ratio: positive values, with colours by their logarithm, around 1; for these there is no scale.

    Raises:
        ValueError: other than two dimensions.
    """
    expect(data, "a grid", ("a row", "a column"))
    values = data.values.astype(float)
    centre, shade, bar = (0.0, np.log(values), False) if ratio else (centre, values, bar)
    mesh = ax.pcolormesh(np.ma.masked_invalid(shade), cmap=_colours(centre), edgecolors="white", linewidth=1.5)
    mesh.set_clim(*_limits(shade, centre))
    texts = [["–" if np.isnan(v) else fmt.format(v) for v in row] for row in values]
    widest = max((len(t) for row in texts for t in row), default=1)
    size = float(np.clip(_width(ax) / max(1, values.shape[1]) / (widest + 0.5) / LETTER, 6, SMALL + 1))
    patch = need("matplotlib.patches", "plot").Rectangle
    for (i, j), value in np.ndenumerate(values):
        lost = not np.isfinite(value)
        if lost:
            ax.add_patch(patch((j, i), 1, 1, facecolor="#ececec", edgecolor="white", hatch="////", linewidth=1.5))
        colour = DARK if lost else _readable(mesh.cmap(mesh.norm(shade[i, j])))
        ax.text(j + 0.5, i + 0.5, texts[i][j], ha="center", va="center", color=colour, fontsize=size)
    down, across = (str(d) for d in data.dims)
    ax.set_yticks(np.arange(values.shape[0]) + 0.5, [shortened(_named(v)) for v in data[down].values])
    _names(ax, np.arange(values.shape[1]) + 0.5, data[across].values)
    ax.set(xlabel=_said(across), ylabel=_said(down))
    ax.invert_yaxis()
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    if bar:
        ax.figure.colorbar(mesh, ax=ax, label=label).outline.set_visible(False)
    return ax


def dots(
    ax: Any, data: xr.DataArray, reference: float | None = None, reference_label: str = "", missing: str = "not reached"
) -> Any:
    """A row per condition: a dot per seed, a bar at their median, and at the right edge how many are missing.

    What is missing (NaN) counts as beyond all others, as it does where the numbers say when something came about: the
    bar is at the median of all seeds, and is left out where that is missing itself.

    Args:
        data: (condition, seed), of any names; its name names the horizontal axis.
        reference: a value that a line is drawn at.
        missing: what is said of those missing.

    Raises:
        ValueError: other than two dimensions.
    """
    expect(data, "dots", ("a condition", "a seed"))
    values = data.values.astype(float)
    spots = np.linspace(-0.16, 0.16, values.shape[1]) if values.shape[1] > 1 else np.zeros(1)
    for row, seeds in enumerate(values):
        colour = COLOURS[row % len(COLOURS)] if len(values) <= len(COLOURS) else UP
        there = ~np.isnan(seeds)
        ax.plot(seeds[there], row + spots[there], "o", color=colour, alpha=0.75, markersize=5.5, markeredgewidth=0)
        middle = np.median(np.where(there, seeds, np.inf)) if len(seeds) else np.inf
        if np.isfinite(middle):
            ax.plot([middle, middle], [row - 0.3, row + 0.3], color=DARK, linewidth=2, solid_capstyle="butt")
        if not there.all():
            edge = ax.get_yaxis_transform()
            ax.plot(
                [1], [row], "o", color=colour, markerfacecolor="white", markersize=6.5, transform=edge, clip_on=False
            )
            ax.annotate(f"{(~there).sum()} of {len(seeds)} {missing}", (1, row), (8, 0), xycoords=edge, va="center",
                        textcoords="offset points", fontsize=SMALL, annotation_clip=False)  # fmt: skip
    if reference is not None:
        ax.axvline(reference, color=DARK, linewidth=0.9, linestyle="--")
        _above(ax, {reference_label: reference})
    ax.set_yticks(range(len(values)), [shortened(_named(v)) for v in data[data.dims[0]].values])
    ax.set(xlabel=_said(data.name), ylabel=_said(data.dims[0]), ylim=(len(values) - 0.5, -0.5))
    ax.grid(axis="x", color="#e6e6e6", linewidth=0.8)
    ax.set_axisbelow(True)
    return ax


def marks(ax: Any, steps: Mapping[str, float]) -> Any:
    """Dashed lines at steps, their names above the axes, higher where they would run into each other.

    To be called when all else is drawn, as room is judged by the limits of the axes. A step that is not finite (of what
    did not happen) has no line.
    """
    there = {name: float(step) for name, step in steps.items() if np.isfinite(step)}
    for step in there.values():
        ax.axvline(step, color="#595959", linewidth=0.9, linestyle="--", zorder=1.5)
    _above(ax, there)
    return ax


def bars(ax: Any, data: xr.DataArray, highlight: Collection[Any] = ()) -> Any:
    """A bar per category, those of `highlight` in colour; a category without a number has a dash.

    Args:
        data: (category,) of any name; its name names the vertical axis.

    Raises:
        ValueError: other than one dimension, or a category in `highlight` that there is not.
    """
    expect(data, "bars", ("a category",))
    names = [v.item() if hasattr(v, "item") else v for v in data[data.dims[0]].values]
    unknown = [h for h in highlight if h not in names]
    if unknown:
        raise ValueError(
            f"there are no such categories to highlight: got {unknown}, expected some of {names}, at {data.dims[0]}. "
            f"Name them as the data do."
        )
    values = data.values.astype(float)
    chosen = [UP if name in highlight else QUIET if len(highlight) else UP for name in names]
    ax.bar(range(len(names)), values, 0.7, color=chosen)
    for k in np.flatnonzero(~np.isfinite(values)):
        ax.annotate("–", (k, 0), (0, 3), textcoords="offset points", ha="center")
    ax.axhline(0, color="black", linewidth=0.6)
    _names(ax, np.arange(len(names)), np.asarray(names, dtype=object))
    ax.set(xlabel=_said(data.dims[0]), ylabel=_said(data.name))
    return ax


def _range(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(X, S) -> least, median and greatest of each row's numbers, NaN where it has none."""
    found = np.full((3, len(values)), np.nan)
    some = ~np.isnan(values).all(1)  # of nothing, numpy warns
    found[:, some] = [np.nanmin(values[some], 1), np.nanmedian(values[some], 1), np.nanmax(values[some], 1)]
    return found[0], found[1], found[2]


def _limits(values: np.ndarray, centre: float | None) -> tuple[float, float]:
    finite = values[np.isfinite(values)]
    if centre is not None:
        reach = float(np.abs(finite - centre).max(initial=0.0)) or 1.0
        return centre - reach, centre + reach
    if not finite.size:
        return 0.0, 1.0
    low, high = float(finite.min()), float(finite.max())
    return (low, high) if low < high else (low - 0.5, high + 0.5)


def _colours(centre: float | None) -> Any:
    if centre is not None:
        return diverging()
    return need("matplotlib.colors", "plot").LinearSegmentedColormap.from_list("size", ["#f1f6fa", UP, "#00263d"])


def _readable(colour: tuple[float, ...]) -> str:
    """Black or white, whichever contrasts more with a colour (relative luminance as WCAG 2 has it)."""
    parts = np.asarray(colour[:3])
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    luminance = float(linear @ [0.2126, 0.7152, 0.0722])
    return "black" if (luminance + 0.05) ** 2 > 0.05 * 1.05 else "white"


def _legend(ax: Any, handles: list[Any] | None = None, away: float = 0) -> None:
    """Right of the axes, `away` points from them: it hides nothing, and titles and marks have the room above."""
    shift = need("matplotlib.transforms", "plot").ScaledTranslation(away / 72, 0, ax.figure.dpi_scale_trans)
    given = {} if handles is None else {"handles": handles}
    ax.legend(**given, loc="upper left", bbox_to_anchor=(1, 1), bbox_transform=ax.transAxes + shift, frameon=False,
              fontsize=SMALL)  # fmt: skip


def _above(ax: Any, places: Mapping[str, float]) -> None:
    """Names above the axes. They are the ticks of an axis on top, as titles keep clear of those."""
    order = sorted(places, key=lambda name: places[name])
    if not order:
        return
    middle = [ax.transAxes.inverted().transform(ax.transData.transform((places[n], 0)))[0] * _width(ax) for n in order]
    ends: list[float] = []  # of the names in each row
    texts = []
    for name, at in zip(order, middle, strict=True):
        shown = shortened(name)
        half = len(shown) * LETTER * SMALL / 2
        row = next((r for r, end in enumerate(ends) if end < at - half), len(ends))
        ends[row : row + 1] = [at + half + SMALL / 2]
        texts.append(shown + "\n" * row)
    top = ax.secondary_xaxis("top")
    top.set_xticks([places[name] for name in order], texts, fontsize=SMALL)
    top.tick_params(which="both", length=0, pad=2)
    top.minorticks_off()
    top.spines["top"].set_visible(False)


def _names(ax: Any, places: np.ndarray, names: np.ndarray) -> None:
    """Names under the axes, slanted where they would run into each other."""
    shown = [shortened(_named(v)) for v in names]
    slanted = max(map(len, shown), default=0) * LETTER * 10 > 0.95 * _width(ax) / max(1, len(shown))
    slant = {"rotation": 35, "ha": "right", "rotation_mode": "anchor"} if slanted else {}
    ax.set_xticks(places, shown, **slant)


def _width(ax: Any) -> float:
    """Of the axes in points, rather too little: what stands beside them is laid out only when all is drawn."""
    return float(0.85 * ax.get_position().width * ax.figure.get_size_inches()[0] * 72)


def _named(value: Any) -> str:
    value = value.item() if hasattr(value, "item") else value
    return f"{value:g}".replace("e-0", "e-").replace("e+0", "e+") if isinstance(value, float) else str(value)


def _said(name: Any) -> str:
    """Of an axis: in full, and not as mathematics."""
    return "" if name is None else str(name).replace("_", " ").replace("$", r"\$")
