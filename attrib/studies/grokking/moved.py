"""Sections of the page on changed networks: layers swapped, transplanted, re-inserted, beside controls; weights pruned."""

from typing import Any

import numpy as np
import pandas as pd

from ...report.panels import curves, dots, grid
from ..verdicts import span
from .grafts import EARLY
from .speeds import times
from .tables import Page, median


def swaps(page: Page) -> None:
    page.article.section(
        "Swaps without training",
        f"Inner layers ({', '.join(page.setting.inner)}) of a step with the outer ones "
        f"({', '.join(page.setting.outer)}) of the last step, and the other way round.",
    )
    names = {"accuracy": "held-out accuracy", "kl": "KL (nats)"}
    data = {key: page.keep(f"swaps {key}", page.t.swaps(key, name)) for key, name in names.items()}

    def draw(figure: Any) -> None:
        left, right = figure.subplots(1, 2)
        curves(left, data["accuracy"], "share of the steps", "layers", "seed", legend=False)
        curves(right, data["kl"], "share of the steps", "layers", "seed", legend=False)
        left.legend(frameon=False, fontsize=8, loc="upper left")

    page.article.figure(draw, "Held-out accuracy of the mixed network, and KL(last || mixed) on the held-out pairs, "
                        "against the step that a part of it is from.", 9, 3)  # fmt: skip


def transplants(page: Page) -> None:
    t, article = page.t, page.article
    article.section(
        "Transplant and retrain",
        "Some layers of the grokked network, all others drawn anew, trained from the start with the same data and "
        f"optimizer for {page.setting.retrain} steps at most. In brackets how the others are drawn. The untouched "
        f"runs took {span(t.steps('generalised'))} steps.",
    )
    data = page.keep("transplants", t.transplants)
    counts = [len(t.trials(name)) for name in data["kept"].values]
    whole = float(np.median(t.steps("generalised")))

    def draw(figure: Any) -> None:
        sizes = sorted(set(counts), reverse=True)  # conditions with as many trials share axes
        heights = [counts.count(size) + 0.5 for size in sizes]
        axes = np.atleast_1d(figure.subplots(len(sizes), 1, height_ratios=heights, sharex=True))
        for ax, size in zip(axes, sizes, strict=True):
            rows = data.isel(kept=[k for k, n in enumerate(counts) if n == size], trial=slice(0, size))
            ax.set_xlim(0, max(page.setting.retrain, whole) * 1.02)
            dots(ax, rows, whole, "untouched" if ax is axes[0] else "")

    article.figure(draw, "Steps to generalise: a dot per trial, a bar at the median; not reached: in the steps given.",
                9, 0.9 + 0.28 * data.sizes["kept"])  # fmt: skip


def reinsertions(page: Page) -> None:
    t, article = page.t, page.article
    article.section(
        "Re-insertion",
        "Layers of a later step of the run, with their optimizer state, put into an earlier one, from where the same "
        "run goes on with its own data. Steps are shares of the step at which the untouched run generalises. "
        "Speed-up: steps that the untouched run still needed, over those that the changed one took; 1 is no gain. "
        f"Each was given {page.setting.longest:g} times the steps that were still needed, {page.setting.at_most} at "
        "most. A dash: not reached in half of the seeds or more, or no such cell.",
    )
    data = page.keep("reinsertions", t.reinsertions["speed_up"])
    middle = median(data)
    rows = -(-len(page.setting.sets) // 3)

    def draw(figure: Any) -> None:
        axes = np.atleast_1d(figure.subplots(rows, min(3, len(page.setting.sets)), sharey=True)).ravel()
        for ax, name in zip(axes, page.setting.sets, strict=False):
            grid(ax, middle.sel(layers=name).drop_vars("layers"), "{:.1f}", ratio=True)
            ax.set_title(name, fontsize=9)
        for ax in axes[len(page.setting.sets) :]:
            ax.remove()

    article.figure(draw, "Speed-up, median over seeds; rows: the step that layers are taken from, columns: the step they "
                "are put into; blue: faster than untouched, orange: slower.", 9, 0.6 + 2.2 * rows)  # fmt: skip
    article.table(
        _reinserted(page),
        "Steps to generalise after the insertion; untouched: what the run still needed; faster: seeds",
    )


def _reinserted(page: Page) -> pd.DataFrame:
    t, s, rows = page.t, page.setting, []
    whole = t.steps("generalised")
    for name in s.sets:
        for source in s.sources:
            for target in s.targets:
                if target >= source:
                    continue
                speed = (
                    t.reinsertions["speed_up"].sel({"layers": name, "taken from": source, "put into": target}).values
                )
                left = whole - np.round(target * whole)
                rows.append({
                    "layers": name, "from": source, "into": target, "steps": span(left / speed), "untouched": span(left),
                    "speed-up": times(speed), "faster": f"{int((speed > 1).sum())} of {len(speed)}",
                })  # fmt: skip
    return pd.DataFrame(rows)


def controls(page: Page) -> None:
    t, article = page.t, page.article
    article.section(
        "Controls",
        "Beside the re-insertion of the step of generalisation itself (inner, outer): the embedding alone; other "
        f"treatment of the optimizer state; the same layers from before grokking, {EARLY:g} of the steps to "
        "generalise; the layers with their neurons in another order than those of the layers beside them; as many "
        "entries drawn from all layers.",
    )
    data = page.keep("controls", t.controls["speed_up"])
    shown = median(data)
    article.figure(
        lambda figure: grid(figure.subplots(), shown, "{:.1f}", ratio=True),
        "Speed-up, median over seeds; columns: the step that they are put into.", 9, 0.8 + 0.3 * data.sizes["condition"],
    )  # fmt: skip
    table = pd.DataFrame(
        {f"into {target:g}": [times(row.values) for row in data.sel({"put into": target})]
         for target in data["put into"].values},
        index=pd.Index(data["condition"].values, name="condition"),
    )  # fmt: skip
    article.table(table, "Speed-up: median, least and greatest seed")


def pruning(page: Page) -> None:
    names = {"accuracy": "held-out accuracy", "agreement": "agreement", "kl": "KL (nats)"}
    data = {key: page.keep(f"pruning {key}", page.t.pruning(key, name)) for key, name in names.items()}
    page.article.section(
        "Pruning",
        "Weights of the largest score kept, the others zero; of all weights together, or of each tensor the same "
        f"share. Contribution of a weight: what its updates did to the outputs of {page.setting.pruned[0]} held-out "
        "pairs, in size, summed over the outputs.",
    )

    def draw(figure: Any) -> None:
        axes = figure.subplots(1, 3)
        for ax, values in zip(axes, data.values(), strict=True):
            curves(ax, values, "weights kept", "score", "seed", legend=ax is axes[-1])

    page.article.figure(draw, "Accuracy, agreement with the whole network and KL(whole || pruned) on the held-out "
                        "pairs, by the share of the weights kept.", 10.5, 2.8)  # fmt: skip
