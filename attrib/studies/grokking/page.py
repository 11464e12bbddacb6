"""The study's page: one section per question, the data of every figure saved beside it."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from ...report import to_json
from ...report.article import Article
from ...report.files import replacing
from ...report.panels import bars, curves, dots, grid, marks, stack
from .claims import answer, claims, span
from .grafts import EARLY
from .setting import Setting
from .tables import Tables, median

LEAD = (
    "A network is trained on a part of the sums a + b modulo p. It knows its training pairs by heart early "
    "and gets the others "
    "right late. Every run is recorded; its predictions are accounted for exactly; and layers are moved "
    "between its steps. All "
    "figures are medians over seeds with their range, unless one seed is named."
)


def write_page(setting: Setting, found: list[dict[str, Any]], folder: Path) -> Path:
    """index.html, and data/*.json: `xarray.DataArray.from_dict(json.load(file)).astype(float)`."""
    t = Tables(setting, found)
    page = Page(t, folder)
    page.opening()
    if t.runs:
        page.answer()
        page.claims()
        page.layers()
        page.circuits()
        page.carriers()
        page.swaps()
        page.transplants()
        page.reinsertions()
        page.controls()
        page.pruning()
        page.ledgers()
    return page.article.write(folder / "index.html")


class Page:
    """Sections in the order in which they are called; `keep` saves the data of a figure under a name."""

    def __init__(self, tables: Tables, folder: Path) -> None:
        self.t, self.setting, self.folder = tables, tables.setting, folder / "data"
        self.folder.mkdir(exist_ok=True)
        self.article = Article(f"Grokking: {tables.setting.name}", LEAD)

    def keep(self, name: str, data: xr.DataArray) -> xr.DataArray:
        with replacing(self.folder / f"{name}.json") as beside:
            beside.write_text(to_json(data.drop_attrs().to_dict()))
        return data

    def opening(self) -> None:
        t, page = self.t, self.article
        seeds = len(t.everyone)
        page.section(
            "Runs",
            f"Setting {self.setting.name}: {self.setting.about}. AdamW, learning rate {self.setting.lr:g}, "
            "weight decay "
            f"{self.setting.weight_decay:g}, betas 0.9 and 0.98, full batch. {seeds} seed{'s' * (seeds > 1)}; "
            "looked at every "
            f"{self.setting.every} steps.",
        )
        if t.failed:
            page.text(
                f"Seeds {t.failed} did not generalise in {self.setting.limit} steps and are left out of what follows."
            )
        columns = ({"training": 1, "held out": 2}, {"training": 3, "held out": 4})
        looks = [t.looks(c, n) for c, n in zip(columns, ("accuracy", "loss (nats)"), strict=True)]
        self.keep("accuracy", looks[0])
        self.keep("loss", looks[1])

        def draw(figure: Any) -> None:
            left, right = figure.subplots(1, 2)
            curves(left, looks[0], "step", "pairs", "seed", legend=False)
            curves(right, looks[1].clip(1e-7), "step", "pairs", "seed", log=True)

        page.figure(draw, "Accuracy and mean loss of the training and the held-out pairs; bands: from the least to the "
                    "greatest seed.", 9, 3.2)  # fmt: skip
        if not t.runs:
            return
        names = ("memorised", "memorisation onset", "generalised", "generalisation onset")
        table = pd.DataFrame({name: t.steps(name) for name in names}, index=pd.Index(t.seeds, name="seed"))
        table.loc["median"] = table.median()
        page.table(
            table, "Steps: first look with 99.5 % of the pairs right, and the break of the accuracy (the step at which its "
            "rise exceeds that before it most, over a twentieth of the looks)",
        )  # fmt: skip

    def answer(self) -> None:
        self.article.section("Grokked layers put elsewhere: the answer in short", *answer(self.t))

    def claims(self) -> None:
        self.article.section(
            "What papers say, and these runs",
            "A claim is put as yes or no for every run or trial. It holds where four fifths say yes, fails "
            "where at most a fifth "
            "do, and depends in between. In brackets the least and the greatest.",
        )
        self.article.claims(claims(self.t))

    def layers(self) -> None:
        t, page, run = self.t, self.article, self.t.runs[0]
        page.section(
            "Layers over time",
            f"The mean log-probability of {self.setting.explained} held-out pairs, attributed to every step "
            "and layer (seed "
            f"{run['seed']}): what the training pairs contributed, what weight decay did, and the balance of "
            "both. The first two "
            "are large and of opposite sign throughout: decay pulls the weights back at each step and the "
            "examples push them "
            f"out again.",
        )
        terms = self.keep("layers", t.terms(run, 0))
        curve = run["result"].curve.isel(query=0).rename("log-probability (nats)")
        for term in ("contribution", "decay", "balance"):

            def draw(figure: Any, term: str = term) -> None:
                ax = stack(figure.subplots(), terms.sel(term=term).drop_vars("term"), curve)
                marks(
                    ax, {name: run["training"][name] for name in ("memorised", "generalisation onset", "generalised")}
                )

            page.figure(
                draw,
                f"{term.capitalize()} of each layer, stacked and signed; black: the log-probability itself.",
                9,
                3.2,
            )
        phases = self.keep("phases", t.by_phase)
        rows = {
            (phase, term): {**cell.to_series().to_dict(), "all": float(cell.sum())}
            for phase in phases["phase"].values
            for term in phases["term"].values
            for cell in [phases.sel(phase=phase, term=term).median("seed")]
        }
        page.table(
            pd.DataFrame.from_dict(rows, "index").rename_axis(["phase", "term"]),
            "Nats by phase, median over seeds: memorising (to 99.5 % of the training pairs), plateau (to the "
            "break of the held-out "
            "accuracy), generalising (to 99.5 % of the held-out pairs), after",
        )
        page.text(
            "Phases found rather than eyeballed: change points of the layers' timelines, each tested against shuffled noise "
            "that is as persistent as the run's own (attrib.phases)."
        )
        for run in t.runs:
            page.lines(f"seed {run['seed']}\n{run['phases']['text']}")

    def circuits(self) -> None:
        t, page, run = self.t, self.article, self.t.runs[0]
        keys = run["progress"]["keys"]
        page.section(
            "Circuits",
            "Restricted loss: of the held-out pairs, with the key frequencies of a + b alone in the logits. "
            "Excluded loss: of the "
            "training pairs, without them (Nanda et al. 2023). Key frequencies: with a twentieth of the "
            "hidden neurons' variance "
            "or more at the last step.",
        )
        losses, shares = self.keep("progress", t.progress), self.keep("frequencies", t.frequencies(run))

        def draw(figure: Any) -> None:
            left, right = figure.subplots(1, 2, width_ratios=(3, 2))
            curves(left, losses.clip(1e-7), "share of the steps", "loss", "seed", log=True, legend=False)
            left.legend(frameon=False, fontsize=8, loc="lower left")
            many = shares.isel(frequency=np.sort(np.argsort(-shares.values)[:16]))
            bars(right, many, [k for k in keys if k in many["frequency"].values])

        page.figure(draw, "Left: restricted and excluded loss, against the share of the steps at which the run generalises. "
                    "Right: the largest frequencies of the neurons at the last step, key frequencies in colour "
                    f"(seed {run['seed']}).",
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
        page.table(table, "Key frequencies, largest first", 2)

    def carriers(self) -> None:
        t, page, run = self.t, self.article, self.t.runs[0]
        page.section(
            "Who carries a held-out pair",
            "Contributions of the training pairs to single held-out predictions, by the distance of their "
            "sums modulo p. A cyclic "
            "structure would show as waves at the key frequencies, a lookup of equal sums as a peak at 0.",
        )
        profile = self.keep("carriers", t.residues(run))
        power = np.array(run["account"]["residues"]["power"])
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

        page.figure(draw, "Mean contribution of a training pair by the distance of its sum from the query's "
                    f"(seed {run['seed']}), and the spectrum of that profile, key frequencies in colour.", 9, 3)  # fmt: skip
        rows = [r["account"]["residues"] for r in t.runs]
        table = pd.DataFrame(
            [{"same sum": r["same"], "other sums": r["others"], "spread, sums shuffled": r["spread"]} for r in rows],
            index=pd.Index(t.seeds, name="seed"),
        )
        page.table(table, "Mean contribution of a training pair to a held-out pair, nats", 2)

    def swaps(self) -> None:
        self.article.section(
            "Swaps without training",
            f"Inner layers ({', '.join(self.setting.inner)}) of a step with the outer ones "
            f"({', '.join(self.setting.outer)}) of the "
            f"last step, and the other way round.",
        )
        names = {"accuracy": "held-out accuracy", "kl": "KL (nats)"}
        data = {key: self.keep(f"swaps {key}", self.t.swaps(key, name)) for key, name in names.items()}

        def draw(figure: Any) -> None:
            left, right = figure.subplots(1, 2)
            curves(left, data["accuracy"], "share of the steps", "layers", "seed", legend=False)
            curves(right, data["kl"], "share of the steps", "layers", "seed", legend=False)
            left.legend(frameon=False, fontsize=8, loc="upper left")

        self.article.figure(draw, "Held-out accuracy of the mixed network, and KL(last || mixed) on the held-out pairs, "
                            "against the step that a part of it is from.", 9, 3)  # fmt: skip

    def transplants(self) -> None:
        t, page = self.t, self.article
        page.section(
            "Transplant and retrain",
            "Some layers of the grokked network, all others drawn anew, trained from the start with the same "
            "data and optimizer for "
            f"{self.setting.retrain} steps at most. In brackets how the others are drawn. The untouched runs took "
            f"{span(t.steps('generalised'))} steps.",
        )
        data = self.keep("transplants", t.transplants)
        counts = [len(t.trials(name)) for name in data["kept"].values]
        whole = float(np.median(t.steps("generalised")))

        def draw(figure: Any) -> None:
            sizes = sorted(set(counts), reverse=True)  # conditions with as many trials share axes
            heights = [counts.count(size) + 0.5 for size in sizes]
            axes = np.atleast_1d(figure.subplots(len(sizes), 1, height_ratios=heights, sharex=True))
            for ax, size in zip(axes, sizes, strict=True):
                rows = data.isel(kept=[k for k, n in enumerate(counts) if n == size], trial=slice(0, size))
                ax.set_xlim(0, max(self.setting.retrain, whole) * 1.02)
                dots(ax, rows, whole, "untouched" if ax is axes[0] else "")

        page.figure(draw, "Steps to generalise: a dot per trial, a bar at the median; not reached: in the steps given.",
                    9, 0.9 + 0.28 * data.sizes["kept"])  # fmt: skip

    def reinsertions(self) -> None:
        t, page = self.t, self.article
        page.section(
            "Re-insertion",
            "Layers of a later step of the run, with their optimizer state, put into an earlier one, from where the same "
            "run goes on with its own data. Steps are shares of the step at which the untouched run generalises. "
            "Speed-up: steps that the untouched run still needed, over those that the changed one took; 1 is no gain. Each "
            f"was given {self.setting.longest:g} times the steps that were still needed, {self.setting.at_most} at most. A "
            "dash: not reached in half of the seeds or more, or no such cell.",
        )
        data = self.keep("reinsertions", t.reinsertions)
        middle = median(data)
        rows = -(-len(self.setting.sets) // 3)

        def draw(figure: Any) -> None:
            axes = np.atleast_1d(figure.subplots(rows, min(3, len(self.setting.sets)), sharey=True)).ravel()
            for ax, name in zip(axes, self.setting.sets, strict=False):
                grid(ax, middle.sel(layers=name).drop_vars("layers"), "{:.1f}", ratio=True)
                ax.set_title(name, fontsize=9)
            for ax in axes[len(self.setting.sets) :]:
                ax.remove()

        page.figure(draw, "Speed-up, median over seeds; rows: the step that layers are taken from, columns: the step they "
                    "are put into; blue: faster than untouched, orange: slower.", 9, 0.6 + 2.2 * rows)  # fmt: skip
        page.table(
            self._reinserted(),
            "Steps to generalise after the insertion; untouched: what the run still needed; faster: seeds",
        )

    def _reinserted(self) -> pd.DataFrame:
        t, s, rows = self.t, self.setting, []
        whole = t.steps("generalised")
        for name in s.sets:
            for source in s.sources:
                for target in s.targets:
                    if target >= source:
                        continue
                    speed = t.reinsertions.sel({"layers": name, "taken from": source, "put into": target}).values
                    left = whole - np.round(target * whole)
                    rows.append({
                        "layers": name, "from": source, "into": target, "steps": span(left / speed), "untouched": span(left),
                        "speed-up": span(speed, 2), "faster": f"{int((speed > 1).sum())} of {len(speed)}",
                    })  # fmt: skip
        return pd.DataFrame(rows)

    def controls(self) -> None:
        t, page = self.t, self.article
        page.section(
            "Controls",
            "Beside the re-insertion of the step of generalisation itself (inner, outer): the embedding alone; other "
            f"treatment of the optimizer state; the same layers from before grokking, {EARLY:g} of the steps to "
            "generalise; the layers with their neurons in another order than those of the layers beside them; as many "
            "entries drawn from all layers.",
        )
        data = self.keep("controls", t.controls)
        shown = median(data)
        page.figure(
            lambda figure: grid(figure.subplots(), shown, "{:.1f}", ratio=True),
            "Speed-up, median over seeds; columns: the step that they are put into.", 9, 0.8 + 0.3 * data.sizes["condition"],
        )  # fmt: skip
        table = pd.DataFrame(
            {f"into {target:g}": [span(row.values, 2) for row in data.sel({"put into": target})]
             for target in data["put into"].values},
            index=pd.Index(data["condition"].values, name="condition"),
        )  # fmt: skip
        page.table(table, "Speed-up: median, least and greatest seed")

    def pruning(self) -> None:
        names = {"accuracy": "held-out accuracy", "agreement": "agreement", "kl": "KL (nats)"}
        data = {key: self.keep(f"pruning {key}", self.t.pruning(key, name)) for key, name in names.items()}
        self.article.section(
            "Pruning",
            "Weights of the largest score kept, the others zero; of all weights together, or of each tensor the same share. "
            "Contribution of a weight: what its updates did to the outputs of "
            f"{self.setting.pruned[0]} held-out pairs, in size, summed over the outputs.",
        )

        def draw(figure: Any) -> None:
            axes = figure.subplots(1, 3)
            for ax, values in zip(axes, data.values(), strict=True):
                curves(ax, values, "weights kept", "score", "seed", legend=ax is axes[-1])

        self.article.figure(draw, "Accuracy, agreement with the whole network and KL(whole || pruned) on the held-out "
                            "pairs, by the share of the weights kept.", 10.5, 2.8)  # fmt: skip

    def ledgers(self) -> None:
        self.article.section(
            "Ledgers", "Of every seed: initial + examples + decay + inherited + residual = final, in nats."
        )
        for run in self.t.runs:
            self.article.lines(f"seed {run['seed']}\n{run['account']['ledger']}")
