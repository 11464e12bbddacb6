"""Sections of the page on the untouched runs: what was seen, what papers say, layers over time, circuits, carriers."""

from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from ...report.panels import bars, curves, marks, stack
from . import claims as paper
from .account import HELD_OUT
from .tables import Page


def opening(page: Page) -> None:
    t, article = page.t, page.article
    seeds = len(t.everyone)
    article.section(
        "Runs",
        f"Setting {page.setting.name}: {page.setting.about}. AdamW, learning rate {page.setting.lr:g}, weight decay "
        f"{page.setting.weight_decay:g}, betas 0.9 and 0.98, full batch. {seeds} seed{'s' * (seeds > 1)}; looked at "
        f"every {page.setting.every} steps.",
    )
    if t.failed:
        article.text(
            f"Seeds {t.failed} did not generalise in {page.setting.limit} steps and are left out of what follows."
        )
    columns = ({"training": 1, "held out": 2}, {"training": 3, "held out": 4})
    looks = [t.looks(c, n) for c, n in zip(columns, ("accuracy", "loss (nats)"), strict=True)]
    page.keep("accuracy", looks[0])
    page.keep("loss", looks[1])

    def draw(figure: Any) -> None:
        left, right = figure.subplots(1, 2)
        curves(left, looks[0], "step", "pairs", "seed", legend=False)
        curves(right, looks[1].clip(1e-7), "step", "pairs", "seed", log=True)

    article.figure(draw, "Accuracy and mean loss of the training and the held-out pairs; bands: from the least to the "
                "greatest seed.", 9, 3.2)  # fmt: skip
    if not t.runs:
        return
    names = ("memorised", "memorisation onset", "generalised", "generalisation onset")
    table = pd.DataFrame({name: t.steps(name) for name in names}, index=pd.Index(t.seeds, name="seed"))
    table.loc["median"] = table.median()
    article.table(
        table, "Steps: first look with 99.5 % of the pairs right, and the break of the accuracy (the step at which its "
        "rise exceeds that before it most, over a twentieth of the looks)",
    )  # fmt: skip


def answer(page: Page) -> None:
    page.article.section("Grokked layers put elsewhere: the answer in short", *paper.answer(page.t))


def claims(page: Page) -> None:
    page.article.section(
        "What papers say, and these runs",
        "A claim is put as yes or no for every run or trial. It holds where four fifths say yes, fails where at most "
        "a fifth do, and depends in between. In brackets the least and the greatest.",
    )
    if len(page.t.runs) < 3:
        page.article.text("Fewer than three runs: the verdicts are of these alone, and say little of others.")
    page.article.claims(paper.claims(page.t))


def layers(page: Page) -> None:
    t, article, run = page.t, page.article, page.t.runs[0]
    article.section(
        "Layers over time",
        f"The mean log-probability of {page.setting.explained} held-out pairs, attributed to every step and layer "
        f"(seed {run['seed']}): what the training pairs contributed, what weight decay did, and the balance of both. "
        "Where the first two are large and of opposite sign, decay pulls the weights back at each step and the examples "
        "push them out again; how they stand in each phase is in the table.",
    )
    terms = page.keep("layers", t.terms(run, HELD_OUT))
    curve = run["result"].curve.isel(query=0).rename("log-probability (nats)")
    for term in ("contribution", "decay", "balance"):

        def draw(figure: Any, term: str = term) -> None:
            ax = stack(figure.subplots(), terms.sel(term=term).drop_vars("term"), curve)
            marks(ax, {name: run["training"][name] for name in ("memorised", "generalisation onset", "generalised")})

        article.figure(
            draw,
            f"{term.capitalize()} of each layer, stacked and signed; black: the log-probability itself.",
            9,
            3.2,
        )
    phases = page.keep("phases", t.by_phase)
    rows = {
        (phase, term): {**cell.to_series().to_dict(), "all": float(cell.sum())}
        for phase in phases["phase"].values
        for term in phases["term"].values
        for cell in [phases.sel(phase=phase, term=term).median("seed")]
    }
    article.table(
        pd.DataFrame.from_dict(rows, "index").rename_axis(["phase", "term"]),
        "Nats by phase, median over seeds: memorising (to 99.5 % of the training pairs), plateau (to the break of "
        "the held-out accuracy), generalising (to 99.5 % of the held-out pairs), after",
    )
    article.text(
        "Phases found rather than eyeballed: change points of the layers' timelines, each tested against shuffled "
        "noise that is as persistent as the run's own (attrib.phases)."
    )
    for run in t.runs:
        article.lines(f"seed {run['seed']}\n{run['phases']['text']}")


def circuits(page: Page) -> None:
    t, article, run = page.t, page.article, page.t.runs[0]
    keys = run["progress"]["keys"]
    article.section(
        "Circuits",
        "Restricted loss: of the held-out pairs, with the key frequencies of a + b alone in the logits. Excluded loss: of "
        "the training pairs, without them (Nanda et al. 2023). Key frequencies: with a twentieth of the hidden neurons' "
        "variance, and twice an even share, or more at the last step.",
    )
    losses, shares = page.keep("progress", t.progress), page.keep("frequencies", t.frequencies(run))

    def draw(figure: Any) -> None:
        left, right = figure.subplots(1, 2, width_ratios=(3, 2))
        curves(left, losses.clip(1e-7), "share of the steps", "loss", "seed", log=True, legend=False)
        left.legend(frameon=False, fontsize=8, loc="lower left")
        many = shares.isel(frequency=np.sort(np.argsort(-shares.values)[:16]))
        bars(right, many, [k for k in keys if k in many["frequency"].values])

    article.figure(draw, "Left: restricted and excluded loss, against the share of the steps at which the run generalises. "
                "Right: the largest frequencies of the neurons at the last step, key frequencies in colour (seed "
                f"{run['seed']}).",
                9, 3.4)  # fmt: skip
    table = pd.DataFrame(
        {
            "key frequencies": [", ".join(map(str, r["progress"]["keys"])) for r in t.runs],
            "their share of the variance": [
                float(sum(t.frequencies(r).values[k - 1] for k in r["progress"]["keys"])) for r in t.runs
            ],
        },
        index=pd.Index(t.seeds, name="seed"),
    )
    article.table(table, "Key frequencies, largest first", 2)


def carriers(page: Page) -> None:
    t, article, run = page.t, page.article, page.t.runs[0]
    article.section(
        "Who carries a held-out pair",
        "Contributions of the training pairs to single held-out predictions, by the distance of their sums modulo p. "
        "A cyclic structure would show as waves at the key frequencies, a lookup of equal sums as a peak at 0.",
    )
    profile = page.keep("carriers", t.residues(run))
    power = np.array(run["residues"]["power"])
    spectrum = xr.DataArray(power, {"frequency": np.arange(1, len(power) + 1)}, name="share of the spectrum")

    def draw(figure: Any) -> None:
        left, right = figure.subplots(1, 2)
        at = profile["distance of the sums"].values
        left.bar(np.where(at > len(at) // 2, at - len(at), at), profile.values, 0.8)
        left.set(xlabel="distance of the sums", ylabel=str(profile.name))
        right.bar(spectrum["frequency"].values, spectrum.values, 0.8, color="#c4c4c4")
        keys = [k for k in run["progress"]["keys"] if k <= len(power)]
        right.bar(keys, spectrum.values[np.array(keys) - 1], 0.8)
        right.set(xlabel="frequency", ylabel="share of the spectrum")

    article.figure(draw, "Mean contribution of a training pair by the distance of its sum from the query's "
                f"(seed {run['seed']}), and the spectrum of that profile, key frequencies in colour.", 9, 3)  # fmt: skip
    rows = [r["residues"] for r in t.runs]
    table = pd.DataFrame(
        [
            {
                "same sum": r["same"],
                "same sum, no number shared": r["apart"],
                "other sums": r["others"],
                "spread, sums shuffled": r["spread"],
            }
            for r in rows
        ],
        index=pd.Index(t.seeds, name="seed"),
    )
    article.table(table, "Mean contribution of a training pair to a held-out pair, nats", 2)


def ledgers(page: Page) -> None:
    page.ledgers({f"seed {run['seed']}": run["account"]["ledger"] for run in page.t.runs})
