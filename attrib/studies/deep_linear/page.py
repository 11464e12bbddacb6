"""The study's page: one section per question, the data of every figure saved beside it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from ...report.figures import COLOURS
from ...report.panels import curves, stack
from ..frame import Page
from ..parts import Parts
from ..verdicts import span
from . import claims, theory
from .data import ITEMS
from .recipe import ILLUSION, Setting
from .tables import MODES, Tables

LEAD = (
    "A linear network with a hidden layer learns the modes of its data one after the other: broad distinctions first, as "
    "they explain the most correlation. Here the strength of every mode is measured at every step and written, exactly, as "
    "a sum over items, steps and layers. All is gradient descent in float64."
)


def write_page(setting: Setting, found: Sequence[dict[str, Any]], parts: Parts) -> Path:
    """index.html, and data/*.json."""
    t, page = Tables(setting, found), Page("Deep linear networks: hierarchy before detail", LEAD, parts.folder)
    page.article.section("What the theory says, and these runs", f"{len(found)} seed(s), {setting.about}.")
    page.article.claims(claims.claims(t))
    for section in (_modes, _contributions, _illusion, _tree, _hidden, _category):
        section(page, t)
    page.ledgers({f"seed {r['seed']}, {name}": text for r in found for name, text in r["ledgers"].items()}, "strength")
    return page.write()


def _modes(page: Page, t: Tables) -> None:
    page.article.section(
        "Strength of each mode",
        f"u^T W2 W1 v over steps, at rate {t.setting.eta:g}. Aligned: each mode starts at {t.setting.a0:g}, the layers "
        "share their directions. Random: small weights, the closed form taken from what of them grows. Shallow: one layer, "
        "from 0.",
    )
    networks = ("aligned", "random", "shallow")
    seen = {n: page.keep(f"strengths {n}", t.strengths(n)) for n in networks}
    expected = {n: page.keep(f"theory {n}", t.expected(n)) for n in networks}

    def draw(figure: Any) -> None:
        for ax, name in zip(figure.subplots(1, 3, sharey=True), networks, strict=True):
            curves(ax, seen[name], "step", "mode", "seed", legend=name == networks[-1])
            for mode in MODES:
                middle = expected[name].sel(mode=mode).median("seed")
                ax.plot(middle["step"].values, middle.values, ":", color="black", linewidth=1)
            ax.set_title(name)

    page.article.figure(draw, "Measured strengths (bands: from least to greatest seed) and, dotted, the closed form.",
                        10, 3)  # fmt: skip
    table = {}
    for name in networks[:2]:
        half = page.keep(f"half-rise {name}", t.half_rises(name))
        for kind in half["of"].values:
            table[f"{name}, {kind}"] = [
                span(half.sel(mode=m, of=kind).values, int(kind == "closed form")) for m in MODES
            ]
    rows = pd.DataFrame(table, index=pd.Index(MODES, name="mode"))
    page.article.table(rows, "Half-rise: the step whose update takes the mode over half its final strength")


def _contributions(page: Page, t: Tables) -> None:
    page.article.section(
        "Who made each mode grow",
        "Contributions of the items, and of the gradients of the two layers, summed up to each step: the upper edge is the "
        "strength of the mode itself, less what it was at the start.",
    )
    grown = {axis: page.keep(f"contributions of {axis}s", t.grown("aligned", axis)) for axis in ("item", "layer")}

    def draw(figure: Any) -> None:
        axes = figure.subplots(2, len(MODES), sharex=True, sharey="col")
        for row, (axis, data) in zip(axes, grown.items(), strict=True):
            for ax, mode in zip(row, MODES, strict=True):
                labels = [str(v) for v in data[axis].values]
                colours = COLOURS if axis == "item" else COLOURS[4:]
                ax.stackplot(data["step"].values, data.sel(mode=mode).values, labels=labels, colors=colours)
            row[0].set_ylabel(f"strength, by {axis}")
            row[-1].legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=9)
        for ax, mode in zip(axes[0], MODES, strict=True):
            ax.set_title(mode)
        for ax in axes[1]:
            ax.set_xlabel("step")

    page.article.figure(draw, f"Aligned network, seed {t.seeds[0]}: stacked contributions to each mode.", 10, 4.2)
    shares = page.keep("item shares", t.shares("aligned")).isel(seed=0).round(12)
    table = pd.DataFrame(
        {
            f"{item}, {kind}": shares.sel(item=item, of=kind).values
            for item in ITEMS
            for kind in ("contribution", "v^2")
        },
        index=pd.Index(MODES, name="mode"),
    )
    page.article.table(table, "Shares of the items in each mode's growth")


def _illusion(page: Page, t: Tables) -> None:
    page.article.section(
        "An illusory correlation",
        f"The output “{ILLUSION}”, of which the truth is 0. While the network tells animals from plants but not yet animals "
        "from each other, what the canary teaches is believed of the salmon.",
    )
    seen, who = page.keep("illusion", t.illusion()), page.keep("illusion by item", t.deceivers(t.runs[0]))

    def draw(figure: Any) -> None:
        left, right = figure.subplots(1, 2)
        curves(left, seen, "step", "network", "seed", legend=False)
        left.legend(fontsize=9)
        curve = seen.sel(network="aligned").isel(seed=0, drop=True).drop_vars("network").dropna("step")
        stack(right, who, curve)

    page.article.figure(draw, "Left: the output over steps, bands over seeds. Right: what each item contributed to it, step "
                        f"by step (aligned, seed {t.seeds[0]}), and the output itself.", 10, 3)  # fmt: skip


def _tree(page: Page, t: Tables) -> None:
    s = t.setting
    page.article.section(
        "A tree of items",
        f"Each feature is +1 or -1 at the root of a binary tree of {s.depth} levels and flips at each branch with "
        f"probability {s.flip:g}; the leaves are the items. The network learns {s.features} features, the correlations are "
        f"estimated from {s.sampled}.",
    )
    rows = [
        {"level": level, "modes": len(row[0]["sample"]), "theory": row[0]["theory"],
         "measured": span([r["measured"] for r in row], 4), "standard error": span([r["error"] for r in row], 4),
         "eigenvalues of the sample": span([v for r in row for v in r["sample"]], 3)}
        for level, row in enumerate(zip(*(run["spectrum"] for run in t.runs), strict=True))
    ]  # fmt: skip
    page.article.table(pd.DataFrame(rows).set_index("level"), "Eigenvalues of the items' correlations", 4)
    run = t.runs[0]
    items, result = run["items"]["tree"], run["results"]["tree"]
    labels = {
        "mode": [f"{k + 1}, s = {s:.2f}" for k, s in enumerate(items.s)],
        "step": np.arange(result.curve.shape[1]),
    }
    seen = page.keep("tree strengths", xr.DataArray(result.curve.values, labels, name="strength"))
    expected = page.keep("tree theory", xr.DataArray(t.closed(run, "tree"), labels, name="strength"))

    def draw(figure: Any) -> None:
        ax = curves(figure.subplots(), seen, "step", "mode")
        ax.plot(seen["step"].values, expected.values.T, ":", color="black", linewidth=1)

    page.article.figure(draw, f"Strengths of the tree's modes (seed {run['seed']}) and, dotted, the closed form.", 9, 3)
    half = page.keep("tree half-rise", t.by_level())
    table = pd.DataFrame({"half-rise": [span(half.sel(level=level).values) for level in t.levels]}, index=t.levels)
    page.article.table(table.rename_axis("level"), "Half-rise of the modes of each level, their mean step")


def _hidden(page: Page, t: Tables) -> None:
    from scipy.cluster.hierarchy import dendrogram, linkage
    from scipy.spatial.distance import squareform

    run = t.runs[0]
    page.article.section(
        "Progressive differentiation",
        "Distances between the items in the hidden layer. Items that part at the root of the tree are told apart first.",
    )
    apart = page.keep("separation", t.separations())
    states = [0, *t.between(run)]
    names = [f"item {k + 1}" for k in range(len(run["items"]["tree"].v))]
    far = np.stack([t.distances(run, state) for state in states])
    kept = page.keep("distances", xr.DataArray(far, {"step": states, "item": names, "other": names}, name="distance"))

    def draw(figure: Any) -> None:
        axes = figure.subplots(1, len(states) + 1, width_ratios=[1.6, *[1] * len(states)])
        curves(axes[0], apart, "step", "level", "seed", legend=False)
        axes[0].legend(fontsize=8)
        top = 1.1 * float(kept.max())
        for ax, state in zip(axes[1:], states, strict=True):
            tree = linkage(squareform(kept.sel(step=state).values, checks=False), "average")
            dendrogram(
                tree, ax=ax, labels=[n.split()[1] for n in names], color_threshold=0, above_threshold_color="#0072B2"
            )
            ax.set(title=f"step {state}", ylim=(0, top))
            if ax is not axes[1]:
                ax.set_yticks([])

    page.article.figure(draw, "Left: mean distance of items that part at each level, over that of the last state. Right: "
                        f"the hidden layer clustered (average linkage) at steps, seed {run['seed']}.", 10.5, 3)  # fmt: skip


def _category(page: Page, t: Tables) -> None:
    page.article.section(
        "When a category is coherent enough",
        "Items and features of which some share a planted block of ones; signal to noise as the theory has it. Squared "
        "overlap of the leading direction with the planted items: of the data's first mode, and of what a network of eight "
        "hidden units has learned when it is half as large as that mode. Dotted: the limit of infinite size.",
    )
    found = page.keep("category", t.overlaps())
    x = "signal to noise"

    def draw(figure: Any) -> None:
        for ax, kind in zip(figure.subplots(1, 2, sharey=True), ("data", "network"), strict=True):
            curves(ax, found.sel(of=kind).drop_vars("of"), x, "size", "draw", legend=kind == "network",
                   labels={n: f"{n} x {n}" for n in found["size"].values.tolist()})  # fmt: skip
            fine = np.linspace(found[x].values[0], found[x].values[-1], 200)
            ax.plot(fine, theory.overlap(fine), ":", color="black", linewidth=1)
            ax.axvline(1, color="#595959", linewidth=0.9, linestyle="--")
            ax.set_title(f"first of the {kind}")

    page.article.figure(draw, "Squared overlap with the planted category, median and range over draws and seeds.", 9, 3)
