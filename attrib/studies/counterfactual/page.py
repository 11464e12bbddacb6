"""What the seeds say, beside each other: claims, tables and figures."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from attrib.report.article import Claim
from attrib.report.panels import curves

from ..frame import Page
from ..parts import Parts
from ..verdicts import claim, span
from .recipe import CHANGES, GROUPS, SUMS, Setting, steepest

LEAD = (
    "Which examples should go to change this prediction? Accounting says what examples did, influence what would change "
    "if they weighed less. Here they are left out for real, and the change is written, exactly, as what they no longer did "
    "and how all others reacted. All is in float64."
)
CHAOTIC = 1e3  # growth of the sensitivity from which on no derivative is said to predict
BESIDE = ["held out", "growth"]
TERMS = ["accounted", "predicted", "gone", "reaction", "measured"]


class Tables:
    """All seeds. rows: of every query; asked: of every training; spikes: of every seed."""

    def __init__(self, s: Setting, found: Sequence[dict[str, Any]]) -> None:
        every = [
            ({"seed": f["seed"], "network": a["network"], "steps": a["steps"]}, a) for f in found for a in f["asked"]
        ]
        self.rows = pd.DataFrame([at | row for at, a in every for row in a["rows"]])
        self.asked = pd.DataFrame([at | a["lds"] | a["causes"] | {k: a[k] for k in BESIDE} for at, a in every])
        self.near, self.seeds, self.spikes = s.near, [f["seed"] for f in found], [f["spike"] for f in found]

    def losses(self, k: int) -> xr.DataArray:
        """(change, step, group): round the spike of a seed."""
        values, begin = np.array(self.spikes[k]["losses"]), self.spikes[k]["begin"]
        labels = {"change": CHANGES, "step": begin + np.arange(values.shape[1]), "group": list(GROUPS)}
        return xr.DataArray(values, labels, name="mean loss (nats)")

    def rises(self) -> np.ndarray:
        """(seed, change, 2): of the loss of the others how far it rises in its spike, and the step of its peak."""
        until = [spike["peak"] + self.near // 2 for spike in self.spikes]
        seen = [self.losses(k).sel(group="others", step=slice(end)) for k, end in enumerate(until)]
        return np.array([[_rise(curve) for curve in curves_of] for curves_of in seen])


def _rise(curve: xr.DataArray) -> tuple[float, int]:
    low, high = steepest(curve.values, curve.size)
    return float(curve[high] - curve[low]), int(curve["step"][high])


def claims(t: Tables, s: Setting) -> list[Claim]:
    def by(table: pd.DataFrame, values: pd.Series, digits: int = 2) -> str:
        groups = table.loc[values.index].groupby("network", sort=False).groups
        return "; ".join(f"{name} {span(values[at].values, digits)}" for name, at in groups.items())

    pictures = t.rows[t.rows["network"] != SUMS]
    short, long = (pictures[pictures["steps"] == n] for n in (s.lengths[0], s.lengths[-1]))
    end, sums = t.asked[t.asked["steps"].isin([s.lengths[-1], s.sums[-1]])], t.asked[t.asked["network"] == SUMS]
    left, first = abs(t.rows["residual"] / t.rows["measured"]), short["accounted"] / short["measured"]
    last, predicted = long["accounted"] / long["measured"], long["predicted"] / long["measured"]
    quiet = sums["growth"] < CHAOTIC
    only, back = short["gone"] / short["measured"], -long["reaction"] / long["gone"]
    carried = abs(sums["residual"] / sums["change"])
    asked, runs, lds = "predictions", "trainings", sums["influence"].values
    return [
        claim("What the dropped no longer did and how the others reacted make the measured change, to 1e-9 of it.",
              (left <= 1e-9).values, f"largest residual {left.max():.1e} of the change", asked),
        *(claim(f"With {name}, in a training of {s.lengths[0]} steps, accounting foretells the change of a digit, within a "
                "factor of two.", ratio.between(0.5, 2).values, f"accounted over measured: {by(short, ratio)}", asked)
          for name, ratio in ((n, first[short["network"].str.contains(n)]) for n in ("SGD", "AdamW"))),
        claim("With either the others hardly react there: what the dropped no longer did is the change, within a quarter.",
              only.between(0.8, 1.25).values, f"gone over measured: {by(short, only)}; accounting takes AdamW's second "
              "moment as it was, a difference does not", asked),
        claim(f"In one of {s.lengths[-1]} it does not: they accounted for more than twice what their absence changes.",
              (abs(last) > 2).values, f"accounted over measured: {by(long, last, 0)}", asked),
        claim("For the others take their place: nine tenths of what is gone, at least, comes back.",
              back.between(0.9, 1.1).values, f"share that comes back: {by(long, back)}", asked),
        claim("Influence foretells there what the largest do to a digit, within a factor of two.",
              predicted.between(0.5, 2).values, f"predicted over measured: {by(long, predicted)}", asked),
        claim("Influence ranks random sets in the longest trainings: LDS of 0.8 at least.",
              (end["influence"] >= 0.8).values, f"LDS {by(end, end['influence'])}", runs),
        claim("Accounting does not: LDS below 0.8.",
              (end["accounting"] < 0.8).values, f"LDS {by(end, end['accounting'])}", runs),
        claim("Where no derivative predicts the sums is known beforehand: LDS is below 0.5 where, and only where, the "
              "sensitivity grows a thousandfold.", (lds >= 0.5) == quiet.values,
              f"grows {by(sums, sums['growth'], 0)}; LDS there {span(lds[~quiet], 2) if (~quiet).any() else 'of none'}, "
              f"elsewhere {span(lds[quiet], 2)}", runs),
        claim("The sums are hard: by cause, the terms of a difference are a hundred times what they sum to, or more.",
              (sums["cancellation"] >= 100).values,
              f"gross over net {', '.join(f'{c:.1e}' for c in sums['cancellation'])}", runs),
        claim("Even there they sum to the change, to 1e-6 of it.", (carried <= 1e-6).values,
              f"residual over change {', '.join(f'{c:.0e}' for c in carried)}", runs),
        *_of_spikes(t),
    ]  # fmt: skip


def _of_spikes(t: Tables) -> list[Claim]:
    whose, terms = (np.array([spike[name] for spike in t.spikes]) for name in ("whose", "terms"))
    own, other = whose[:, [0, 1], [0, 1]], whose[:, [0, 1], [1, 0]]
    gone, opposing, change = terms[:, [0, 1], [0, 1]], terms[:, [0, 1], [1, 0]], terms[:, :2].sum(-1)
    rise, peak = np.moveaxis(t.rises(), -1, 0)
    opposed: np.ndarray = np.all((own < 0) & (other > 0), axis=1)
    moved = (abs(rise / rise[:, :1] - 1) >= 1 / 3) | (peak != peak[:, :1])
    said = "; ".join(f"{c} {span(rise[:, k], 2)} at step {span(peak[:, k])}" for k, c in enumerate(CHANGES))
    return [
        claim("In a spike two groups of images oppose each other: each lowers its own mean loss and raises the other's.",
              opposed, f"own {span(own.ravel(), 2)}, other's {span(other.ravel(), 2)} nats"),
        claim("The spike moves when one of them goes: on images of neither it is lower or higher by a third, or at another "
              "step.", moved[:, 1:3].ravel(), f"rise {said}", "groups"),
        claim("As many images at random do not move it.", ~moved[:, 3], "rises as above"),
        claim("It is the opposing group that reacts: what it does otherwise is more than half of the reaction.",
              (abs(opposing) > abs(change - gone) / 2).ravel(), f"at the peak: gone {span(gone.ravel(), 2)}, opposing group "
              f"{span(opposing.ravel(), 2)}, all reaction {span((change - gone).ravel(), 2)} nats", "groups"),
    ]  # fmt: skip


def write_page(s: Setting, found: Sequence[dict[str, Any]], parts: Parts) -> Path:
    """index.html, and data/*.json."""
    t, page = Tables(s, found), Page("Counterfactuals", LEAD, parts.folder)
    page.article.section("What is asked, and what these runs say", f"{len(found)} seed(s): {s.about}.")
    page.article.claims(claims(t, s))
    _dropped(page, t, s)
    _spike(page, t, s)
    names = "seed {seed}, {network}, {steps} steps".format
    page.ledgers({names(seed=f["seed"], **a): a["ledger"] for f in found for a in f["asked"]})
    return page.write()


def _dropped(page: Page, t: Tables, s: Setting) -> None:
    page.article.section(
        "Dropped for real",
        f"For each of {s.queries} held-out predictions the {s.dropped} examples that accounted most for its "
        "log-probability, left out from the start. Accounted, predicted: what accounting and influence say that changes, in "
        "nats. Gone: what they no longer did; reaction: what all others did otherwise; measured: the sum of both.",
    )
    values = page.keep("dropped", xr.DataArray(t.rows[TERMS].values, {"row": t.rows.index, "term": TERMS}, name="nats"))

    def draw(figure: Any) -> None:
        lengths = sorted(set(t.rows["steps"]))
        panels = figure.subplots(1, len(lengths), sharex=True, sharey=True)
        for ax, steps in zip(panels, lengths, strict=True):
            rows = abs(values[(t.rows["steps"] == steps).values])
            for term, sign in (("accounted", "o"), ("predicted", "x")):
                ax.plot(rows.sel(term="measured"), rows.sel(term=term), sign, label=term, alpha=0.7)
            ax.plot([1e-3, 10], [1e-3, 10], color="black", linewidth=0.8)
            ax.set(xscale="log", yscale="log", title=f"{steps} steps", xlabel="measured (nats)")
        panels[0].set_ylabel("foretold (nats)")
        ax.legend()

    caption = "The sizes of what was foretold against those of what happened, by steps of training."
    page.article.figure(draw, caption, 10, 2.8)
    by = ["network", "steps"]
    page.article.table(t.rows.groupby(by, sort=False)[TERMS].median(), "Medians over queries and seeds")
    page.article.text(
        f"Scores against {s.draws} random sets of {s.dropped}: rank correlation of foretold and measured change (LDS). "
        "Change, residual, cancellation (gross over net): of the first query's difference, by cause. Held out: mean "
        "log-probability of the queries. Growth: of the sensitivity, back through the training."
    )
    page.article.table(t.asked.drop(columns="seed").groupby(by, sort=False).median(), "Medians over seeds")


def _spike(page: Page, t: Tables, s: Setting) -> None:
    page.article.section(
        "Opposing groups in a spike",
        f"Full-batch gradient descent on {s.edge_images} digits until its loss spikes. In the rise, who raised whose loss "
        f"is told exactly; the groups are the {s.side} images at either end of the direction in which most is done. Then it "
        f"goes on without one of them, or as many at random, from {s.near} steps before the rise; others stay in.",
    )
    seen = page.keep("spike", t.losses(0))

    def draw(figure: Any) -> None:
        left, right = figure.subplots(1, 2)
        curves(left, seen.sel(change="untouched", drop=True), "step", "group")
        curves(right, seen.sel(group="others", drop=True), "step", "change")

    caption = f"Mean losses, seed {t.seeds[0]}: of the groups, untouched; of the others, by what is left out."
    page.article.figure(draw, caption, 11, 3)
    terms = [[*row, sum(row)] for spike in t.spikes for row in spike["terms"]]
    index = pd.MultiIndex.from_product([t.seeds, CHANGES[1:]], names=["seed", "at the peak"])
    page.article.table(pd.DataFrame(terms, index, [*GROUPS, "residual", "change"]),
                       "Change of the mean loss of the others, by what each group did otherwise (nats)")  # fmt: skip
    rows = [row for spike in t.spikes for row in spike["digits"]]
    index = pd.MultiIndex.from_product([t.seeds, GROUPS[:2]], names=["seed", "group"])
    page.article.table(pd.DataFrame(rows, index, [f"{d}s" for d in range(10)]), "Digits of the two groups")
