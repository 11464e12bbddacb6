"""The study's page: one section per question, the data of every figure saved beside it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from ...report.figures import diverging
from ...report.panels import curves, marks
from ..frame import Page
from ..parts import Parts
from ..verdicts import span
from . import claims
from .measures import MEASURES
from .setting import CLASSES, Setting
from .tables import NAMES, Run, Tables

LEAD = (
    "Full-batch gradient descent at the edge of stability. Of every step it is told, exactly, which image changed "
    "whose loss, and by how much. From that matrix follow pairs and groups of images that help themselves and harm "
    "each other; how their losses move is then judged in the steps that follow, beside controls, and with the "
    "groups left out."
)
SHOWN = 8  # images of a side


def write_page(setting: Setting, found: Sequence[dict[str, Any]], parts: Parts) -> Path:
    """index.html, and data/*.json."""
    t, page = Tables(setting, found), Page("Opposing signals", LEAD, parts.folder)
    page.article.section(
        "What is said, and these runs",
        f"{len(found)} seed(s), {setting.about}, {setting.images} images, rate {setting.lr:g}, {setting.steps} steps.",
    )
    if t.failed:
        page.article.text(
            f"Seeds {t.failed} did not come to the edge of stability in time, or have no opposing groups: they are "
            "left out "
            "of what is said of groups."
        )
    page.article.claims(claims.claims(t))
    _edge(page, t)
    for section in (_matrix, _groups, _moving, _projections, _without, _optimizers) if t.runs else ():
        section(page, t)
    _planted(page, t)
    page.ledgers(dict(_ledgers(found)))
    return page.write()


def _ledgers(found: Sequence[Run]) -> list[tuple[str, str]]:
    rows = []
    for r in found:
        named = {name: r[name] for name in ("sgd", "shuffled", "adam")} | dict(r["trials"])
        named |= {f"planted, brightness {p['brightness']:g}": p for p in r["planted"]}
        rows += [(f"seed {r['seed']}, {name}", one["ledger"]) for name, one in named.items()]
    return rows


def _edge(page: Page, t: Tables) -> None:
    page.article.section(
        "To the edge of stability",
        f"Sharpness: the largest eigenvalue of the Hessian of the mean loss. Dashed: 2 / lr = {2 / t.setting.lr:g}, "
        "above which gradient descent is unstable in that direction. Adam steps otherwise: the line is not its "
        "own.",
    )
    seen = {
        name: (page.keep(f"losses {name}", t.losses(name)), page.keep(f"sharpness {name}", t.sharpness(name)))
        for name in NAMES
    }

    def draw(figure: Any) -> None:
        axes = figure.subplots(2, len(NAMES), sharex="col")
        for column, (name, (losses, sharp)) in zip(axes.T, seen.items(), strict=True):
            curves(column[0], losses.clip(1e-4), "step", spread="seed", log=True)
            curves(column[1], sharp, "step", spread="seed")
            if name != "adam":
                column[1].axhline(2 / t.setting.lr, color="#595959", linewidth=0.9, linestyle="--")
            column[0].set(title=name, xlabel="")

    page.article.figure(draw, "Mean loss of the images that are trained on, and sharpness: gradient descent, the same with "
                        "shuffled labels, Adam; median and range over seeds.", 10, 4.4)  # fmt: skip


def _matrix(page: Page, t: Tables) -> None:
    run = t.runs[0]
    seen = run["sgd"]
    page.article.section(
        "Who changed whose loss",
        f"In step {int(seen['matrix']['at'])} of seed {run['seed']}, in which the losses moved most: the change of the "
        "loss of the image of a row that the image of a column caused. Blue lowered it. Over all images, of which "
        "some are "
        "shown, a row sums to the measured change of that loss.",
    )
    matrix = page.keep("matrix", t.matrix(run))
    bounds = matrix.attrs["bounds"]

    def draw(figure: Any) -> None:
        ax = figure.subplots()
        reach = float(np.quantile(np.abs(matrix.values), 0.98)) or 1.0
        mesh = ax.pcolormesh(matrix.values, cmap=diverging().reversed(), vmin=-reach, vmax=reach)
        middles = [(a + b) / 2 for a, b in zip([0, *bounds[:-1]], bounds, strict=True)]
        names = ["first group", "second group", "others"]
        ax.set_xticks(middles, names)
        ax.set_yticks(middles, names, rotation=90, va="center")
        for bound in bounds[:-1]:
            ax.axhline(bound, color="black", linewidth=0.8)
            ax.axvline(bound, color="black", linewidth=0.8)
        ax.set(xlabel="who changed it", ylabel="whose loss", aspect="equal")
        ax.invert_yaxis()
        ax.tick_params(length=0)
        figure.colorbar(mesh, ax=ax, label="change of a loss (nats)").outline.set_visible(False)

    page.article.figure(
        draw, "The matrix of one step: the strongest members of both groups, sorted by their digit, and others.", 6.5, 5
    )
    rows = [
        {"pairs that oppose": r["sgd"]["pairs"]["opposing"], "with a score over 0.5": r["sgd"]["pairs"]["strong"],
         "largest score": r["sgd"]["pairs"]["largest"][0][2]}
        for r in t.runs
    ]  # fmt: skip
    page.article.table(
        pd.DataFrame(rows, index=pd.Index(t.seeds, name="seed")),
        "Pairs: each lowers its own loss and raises the other's. Score: the harm they do each other, over the "
        "geometric mean of what each does for "
        "itself",
    )


def _groups(page: Page, t: Tables) -> None:
    page.article.section(
        "Opposing groups",
        "Found from the first half of the window by rounding the leading eigenvectors of the matrix: the members of a "
        "side help each other and harm the other side. Opposition: 1 for two equal sides that do nothing "
        "else.",
    )
    rows = []
    for run in t.runs:
        labels = run["sgd"]["labels"]
        for k, group in enumerate(run["sgd"]["groups"]):
            sides = [_classes(labels[np.array(group[side])]) for side in ("first", "second")]
            rows.append({"seed": run["seed"], "groups": k + 1, "first group": sides[0], "second group": sides[1],
                         "strength": group["strength"], "opposition": group["opposition"]})  # fmt: skip
    page.article.table(
        pd.DataFrame(rows).set_index(["seed", "groups"]), "Members by their digit, most frequent first", 2
    )
    run = t.runs[0]
    pictures, labels = run["images"]
    shown = [side[:SHOWN] for side in t.sides(run)]
    values = np.full((2, SHOWN, *pictures.shape[1:]), np.nan)
    for row, side in zip(values, shown, strict=True):
        row[: len(side)] = pictures[side]
    names = {"group": [1, 2], "member": np.arange(SHOWN), "row": np.arange(8), "column": np.arange(8)}
    kept = page.keep("members", xr.DataArray(values, names, name="brightness"))

    def draw(figure: Any) -> None:
        for axes, side, row in zip(figure.subplots(2, SHOWN), shown, kept.values, strict=True):
            for k, ax in enumerate(axes):
                ax.axis("off")
                if k < len(side):
                    ax.imshow(row[k], cmap="gray_r", vmin=0, vmax=1)
                    ax.set_title(f"a {labels[side[k]]}", fontsize=9)

    page.article.figure(draw, f"The strongest members of the two groups of seed {run['seed']}, a row each.", 8, 2.4)


def _classes(labels: np.ndarray) -> str:
    counts = np.bincount(labels, minlength=10)
    order = [d for d in np.argsort(-counts, kind="stable") if counts[d]]
    return (
        f"{len(labels)}: "
        + ", ".join(f"{counts[d]} of digit {d}" for d in order[:4])
        + (" ..." if len(order) > 4 else "")
    )


def _moving(page: Page, t: Tables) -> None:
    run = t.runs[0]
    page.article.section(
        "How they move",
        "Groups come from the first half of the window, the numbers from the second. Data, gross: the groups' share "
        "of the images and of the sum of the sizes of all changes of losses. Other groups: of the same sizes, 200 "
        "draws a seed.",
    )
    data = page.keep("group losses", t.by_group(run))

    def draw(figure: Any) -> None:
        ax = curves(figure.subplots(), data, "step", "group")
        marks(ax, {"second half": run["sgd"]["half"]})

    page.article.figure(
        draw, f"Mean losses of the two groups and of all images in the window, seed {run['seed']}.", 9, 3
    )
    own = page.keep("movement", t.movement())
    others = {r["seed"]: t.controls(r) for r in t.runs}
    names = list(dict.fromkeys(n for found in others.values() for n in found))
    for name in names:
        seeds = [s for s in others if name in others[s]]
        page.keep(f"movement, {name}", xr.concat([others[s][name] for s in seeds], "seed").assign_coords(seed=seeds))
    table = {"opposing groups": [span(own.sel(measure=m).values, 2) for m in own["measure"].values]}
    for name in names:
        drawn = xr.concat([found[name] for found in others.values() if name in found], "draw")
        table[name] = [span(drawn.sel(measure=m).values, 2) for m in own["measure"].values]
    page.article.table(
        pd.DataFrame(table, index=pd.Index(own["measure"].values, name="second half of the window")),
        "Median and range, over seeds and draws",
    )


def _projections(page: Page, t: Tables) -> None:
    page.article.section(
        "Along the sharpest direction",
        "Cosine of the gradient of each group's mean loss with the sharpest direction, at looks in the window's "
        "second half. Whether the groups oppose each other there is tested, not assumed.",
    )
    found = page.keep("projections", t.projections())

    def draw(figure: Any) -> None:
        curves(figure.subplots(), found, "look", "group", "seed").axhline(0, color="black", linewidth=0.6)

    page.article.figure(draw, "Median and range over seeds; the sign of the direction itself is arbitrary.", 8, 2.6)


def _without(page: Page, t: Tables) -> None:
    page.article.section(
        "Without them",
        "The same run, trained again from the beginning of the window: with the groups left out or down-weighted to "
        "a tenth, with as many other images left out, drawn at random or alike in gradient norm. Sharpness and "
        "mean loss are those of what is trained on.",
    )
    again = t.again()
    for name, values in again.items():
        page.keep(f"again {name}", values)

    def draw(figure: Any) -> None:
        left, right = figure.subplots(1, 2)
        curves(left, again["loss"], "step", "change", "seed", log=True, legend=False)
        curves(right, again["sharpness"], "step", "change", "seed")
        right.axhline(2 / t.setting.lr, color="#595959", linewidth=0.9, linestyle="--")

    page.article.figure(draw, "Mean loss and sharpness from the beginning of the window on.", 10.5, 3.2)
    table = pd.DataFrame(
        {
            "nats risen in all": [span(v, 2) for v in again["ascent"].values],
            "steps of a tenth or more": [span(v) for v in again["spikes"].values],
            "mean sharpness": [span(v, 1) for v in again["sharpness"].mean("step").values],
        },
        index=pd.Index(again["ascent"]["change"].values, name="change"),
    )
    page.article.table(table, "Unrest of the mean loss, and sharpness")


def _optimizers(page: Page, t: Tables) -> None:
    page.article.section(
        "Gradient descent beside Adam",
        f"Adam at rate {t.setting.adam_lr:g}, in a window from where its mean loss is what it was at the beginning "
        f"of gradient descent's window. Who changed whose loss in its {t.setting.adam_steps} steps before the second "
        f"half: of momentum, the gradients of {t.setting.lead} steps before are told apart, what is older is left "
        "over.",
    )
    runs = [r for r in t.runs if r["adam"]["groups"]]
    table = {}
    for name in ("sgd", "shuffled", "adam"):
        found = page.keep(f"movement of {name}", t.movement(name))
        table[name] = [span(found.sel(measure=m).values, 2) for m in found["measure"].values]
    if runs:
        data = page.keep("group losses of Adam", t.by_group(runs[0], "adam"))
        page.article.figure(
            lambda figure: curves(figure.subplots(), data, "step", "group", log=True),
            f"Adam: mean losses of its two groups and of all images, seed {runs[0]['seed']}.", 9, 2.8,
        )  # fmt: skip
    index = pd.Index(MEASURES, name="second half of the window")
    page.article.table(pd.DataFrame(table, index=index), "Each run's own opposing groups, median and range over seeds")


def _planted(page: Page, t: Tables) -> None:
    s = t.setting
    page.article.section(
        "A planted signal",
        f"{s.planted_images} images, of which {s.planted} of the digit {CLASSES[0]} and {s.planted} of the digit "
        f"{CLASSES[1]} have a bright corner of 2 x 2 pixels: strong, consistent, and without a word on the class. "
        "Brightness 1 is the brightest pixel of an image. The strongest opposing groups are compared with the "
        "truth.",
    )
    found = page.keep("planted", t.planted())
    rows = {
        f"brightness {b:g}": [span(found.sel(brightness=b, measure=m).values, 2) for m in found["measure"].values]
        for b in found["brightness"].values
    }
    table = pd.DataFrame.from_dict(rows, "index", columns=["precision", "recall", "members on the side of their class"])
    page.article.table(table.rename_axis("signal"), "Recovered, median and range over seeds")
