"""The study's page: the planted layer, then each network, the data of every figure saved beside it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from ...report.panels import curves, grid, marks
from ..frame import Page
from ..parts import Parts
from ..verdicts import span
from . import claims
from .networks import LOOKS, Setting
from .recipe import across
from .tables import ACTS, Planted, Tables

LEAD = (
    "The whole trajectory instead of the final model: what is measured at every step, what each layer built up and "
    "tore down, which states lie in one basin; and, as observation is not causation, what becomes of the run when a "
    "layer is frozen or suppressed in a window, goes on with other batches, or does without some examples."
)


def write_page(setting: Setting, found: Sequence[dict[str, Any]], parts: Parts) -> Path:
    """index.html, and data/*.json."""
    page = Page("Development", LEAD, parts.folder)
    tables = [Tables(setting, n, found, across(setting, found, parts, n)) for n in setting.networks()]
    planted = Planted(found)
    page.article.section("What is said, and these runs", f"{len(found)} seed(s): {setting.about}.")
    if len(found) < 3:
        page.article.text("Fewer than three seeds: the verdicts are of these alone, and say little of others.")
    page.article.claims(claims.claims(tables, planted))
    _planted(page, planted)
    for t in tables:
        for section in (_curves, _layers, _windows, _basins, _causes):
            section(page, t)
    names = (*(t.network.name for t in tables), "planted")
    page.ledgers({f"seed {r['seed']}, {name}": r[name]["ledger"] for r in found for name in names})
    return page.write()


def _planted(page: Page, p: Planted) -> None:
    page.article.section(
        "A planted vestigial layer",
        "Two branches whose outputs are added. Until the turn only the early one learns; from then on only the late "
        "one does, while the early one decays to nothing. The account is of the mean output towards the right "
        "side.",
    )
    running = page.keep("planted running", p.running())

    def draw(figure: Any) -> None:
        ax = curves(figure.subplots(), running, "step", "group", "seed")
        marks(ax, {"turn": p.runs[0]["turn"]})

    page.article.figure(draw, "What each branch's updates have made of the output so far; bands over seeds.", 8, 2.8)
    found, causes = page.keep("planted vestiges", p.vestiges()), page.keep("planted causes", p.causes())
    table = {m: [span(found.sel(measure=m, group=g).values, 2) for g in p.groups] for m in found["measure"].values[:4]}
    page.article.table(pd.DataFrame(table, index=pd.Index(p.groups, name="branch")), "Gross against net")
    rows = {f"at the {at}": [span(causes.sel(change=c, at=at).values, 2) if np.isfinite(causes.sel(change=c, at=at)).any()
            else "–" for c in causes["change"].values] for at in ("turn", "end")}  # fmt: skip
    page.article.table(
        pd.DataFrame(rows, index=pd.Index(causes["change"].values, name="change")),
        "The output after a change, over that of the untouched run",
    )


def _curves(page: Page, t: Tables) -> None:
    name = t.network.name
    page.article.section(f"{name.capitalize()}: how it developed")
    looks = page.keep(f"{name} looks", t.looks())

    def draw(figure: Any) -> None:
        left, right = figure.subplots(1, 2)
        for ax, kind in ((left, "accuracy"), (right, "loss")):
            some = looks.sel(look=[look for look in LOOKS if look.endswith(kind)]).rename(kind)
            curves(ax, some.clip(1e-4) if kind == "loss" else some, "share of the run", "look", "seed", kind == "loss")

    page.article.figure(draw, "Accuracy and mean loss (nats); median and range over seeds.", 10.5, 3)
    onsets = page.keep(f"{name} onsets", t.onsets())
    table = pd.DataFrame(onsets.values.T, index=pd.Index(t.seeds, name="seed"), columns=onsets["of"].values)
    page.article.table(table, "Step at which the held-out accuracy and loss break, and the steps of the run")


def _layers(page: Page, t: Tables) -> None:
    name = t.network.name
    page.article.section(
        f"{name.capitalize()}: what each layer built up and tore down",
        "By the account of the mean held-out margin (against the mean of the other outputs): what the layer's updates "
        "have made of it so far. Left: of its height, what there is at the end. Then, as a test, the layer ablated "
        "at the end.",
    )
    running, found = page.keep(f"{name} running", t.running()), page.keep(f"{name} vestiges", t.vestiges())
    ablated = page.keep(f"{name} ablated", t.ablated())
    page.article.figure(
        lambda figure: curves(figure.subplots(), running, "share of the run", "group", "seed"),
        "Change of the held-out margin by each layer's updates so far; median and range over seeds.", 8.5, 3,
    )  # fmt: skip
    table = {m: [span(found.sel(measure=m, group=g).values, 2) for g in t.groups] for m in found["measure"].values[:4]}
    table["vestigial"] = [f"{int(found.sel(measure='vestigial', group=g).sum())} of {len(t.seeds)}" for g in t.groups]
    for to in ablated["to"].values:
        table[f"loss with it at {to}"] = [span(ablated.sel(to=to, group=g).values, 2) for g in t.groups]
    page.article.table(
        pd.DataFrame(table, index=pd.Index(t.groups, name="layer")),
        "Gross against net in units of the margin, and the change of the held-out loss in nats when a layer is ablated",
    )


def _windows(page: Page, t: Tables) -> None:
    name = t.network.name
    page.article.section(
        f"{name.capitalize()}: frozen and suppressed",
        f"Each layer frozen, or pulled towards zero (weight {t.network.pull:g}), in one window of the run, which then "
        "goes on to its end. Median over "
        "seeds.",
    )
    found = t.windows()
    kept = {key: page.keep(f"{name} windows {key}", found[key].rename(key)) for key in found.data_vars}

    def draw(figure: Any, key: str) -> None:
        for ax, act in zip(figure.subplots(1, len(ACTS)), ACTS, strict=True):
            shown = kept[key].sel(act=act).median("seed").drop_vars("act")
            grid(ax, shown, "{:+.2f}", 0.0, bar=False)
            ax.set_title(act)

    height = 1.2 + 0.32 * len(t.groups)
    page.article.figure(lambda f: draw(f, "loss"), "Change of the final held-out loss, nats; blue: worse.", 9, height)
    page.article.figure(
        lambda f: draw(f, "shift"),
        "Shift of the onset of the held-out accuracy, as a share of the run; blue: later; a dash: it had come "
        "before the window, or did not come.", 9, height,
    )  # fmt: skip
    rows = {
        (act, group): {
            w: span(kept["loss"].sel(act=act, group=group, window=w).values, 3) for w in found["window"].values
        }
        for act in ACTS
        for group in t.groups
    }
    table = pd.DataFrame.from_dict(rows, "index").rename_axis(["act", "layer"])
    page.article.table(table, "Change of the final held-out loss by window, nats, median and range over seeds")


def _basins(page: Page, t: Tables) -> None:
    name, height = t.network.name, t.setting.height
    page.article.section(
        f"{name.capitalize()}: basins",
        "Barriers of the held-out loss on straight lines between checkpoints of all seeds; a checkpoint is a seed and "
        f"a share of its run. Clusters hold no barrier above {height:g} "
        "nats.",
    )
    barriers, gaps = page.keep(f"{name} barriers", t.barriers()), page.keep(f"{name} gaps", t.barriers("gap"))
    labels = page.keep(f"{name} clusters", t.clusters())

    def draw(figure: Any) -> None:
        for ax, data in zip(figure.subplots(1, 2), (barriers, gaps), strict=True):
            mesh = ax.pcolormesh(data.values, cmap="viridis_r")
            count, own = len(t.setting.checkpoints), np.arange(len(t.seeds))
            ax.set_xticks((own + 0.5) * count, [f"seed {s}" for s in t.seeds], rotation=35)
            ax.set_yticks((own + 0.5) * count, [f"seed {s}" for s in t.seeds])
            for edge in own[1:] * count:
                ax.axhline(edge, color="white", linewidth=1)
                ax.axvline(edge, color="white", linewidth=1)
            ax.set(aspect="equal", title=str(data.name))
            ax.invert_yaxis()
            ax.tick_params(length=0)
            figure.colorbar(mesh, ax=ax, shrink=0.8).outline.set_visible(False)

    shares = ", ".join(f"{c:g}" for c in t.setting.checkpoints)
    page.article.figure(draw, f"Barriers and convexity gaps, nats; of each seed the checkpoints at {shares} of its "
                        "run, in order.", 9.5, 4.2)  # fmt: skip
    own = {s: [int(labels.sel(point=f"{s}: {c:g}")) for c in t.setting.checkpoints] for s in t.seeds}
    table = pd.DataFrame.from_dict(own, "index", columns=[f"at {c:g}" for c in t.setting.checkpoints]).rename_axis(
        "seed"
    )
    table["settled at"] = t.settled()
    page.article.table(table, "Clusters of the checkpoints, and from where on a run is in that of its last state", 2)
    branches = t.branches()
    if branches is not None:
        kept = page.keep(f"{name} branches", branches)
        page.article.figure(
            lambda figure: curves(figure.subplots(), kept, "branched at", spread="seed").axhline(
                height, color="#595959", linewidth=0.9, linestyle="--"
            ),
            "Barrier between the end of a run and that of the same run gone on with other batches, by the share at "
            "which it "
            "branched; dashed: the height that parts two basins.", 6.5, 2.6,
        )  # fmt: skip


def _causes(page: Page, t: Tables) -> None:
    name = t.network.name
    page.article.section(
        f"{name.capitalize()}: the same examples?",
        f"Rank correlation of the contributions to {t.setting.queries} single held-out predictions between two "
        f"seeds; and the {t.setting.dropped} examples that raised a prediction most, or as many at random, left out "
        "from the start: what it costs the log-probability, beside what the account says they gave. The account is "
        "not a counterfactual.",
    )
    similar, dropped = t.similar(), page.keep(f"{name} left out", t.dropped())
    if similar is not None:
        seen = page.keep(f"{name} similarity", similar["similar"].rename("rank correlation"))
        chance = page.keep(f"{name} similarity by chance", similar["chance"].rename("rank correlation"))
        rows = {"between seeds": span(seen.values.ravel(), 2), "examples shuffled": span(chance.values.ravel(), 2)}
        page.article.table(
            pd.DataFrame({"rank correlation": rows}).rename_axis("contributions"), "Over queries and pairs of seeds"
        )

    def draw(figure: Any) -> None:
        ax = figure.subplots()
        for kind, colour in zip(dropped["kind"].values, ("#0072B2", "#c4c4c4"), strict=True):
            chosen: xr.DataArray = dropped.sel(kind=kind)
            ax.scatter(
                chosen.sel(of="accounted"), chosen.sel(of="measured"), color=colour, label=f"{kind} left out", s=18
            )
        ax.axline((0, 0), slope=1, color="#595959", linewidth=0.8, linestyle="--")
        ax.set(xlabel="accounted (nats)", ylabel="measured (nats)")
        ax.legend(loc="upper left", bbox_to_anchor=(1, 1))

    page.article.figure(draw, "Change of a log-probability when examples are left out, against what the account has them "
                        "contribute, negative; a dot per seed and query; dashed: equal.", 6.5, 3.2)  # fmt: skip
