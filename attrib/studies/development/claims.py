"""What is said of development, beside what these runs say: a line for each network."""

from collections.abc import Sequence

import numpy as np

from ...report.article import Claim
from ..verdicts import of, span, verdict
from .tables import Planted, Tables

SAPHRA = "Saphra 2022, Interpretability Creationism"
FRANKLE = "Frankle et al. 2020, arXiv 1912.05671"
JUNEJA = "Juneja et al. 2023, arXiv 2205.12411"
ACHILLE = "Achille et al. 2019, arXiv 1711.08856"


def claims(tables: Sequence[Tables], planted: Planted) -> list[Claim]:
    made = [_planted(planted)]
    for t in tables:
        made += [_breakthrough(t), _vestigial(t), _early(t), _competition(t), *_lines(t), *_causes(t)]
    return made


def _said(t: Tables, text: str) -> str:
    return f"{t.network.name}: {text}"


def _planted(p: Planted) -> Claim:
    found, causes = p.vestiges(), p.causes()
    flagged = found.sel(measure="vestigial")
    account = (flagged.sel(group="early") == 1) & (flagged.sel(group="late") == 0)
    end = causes.sel(at="end")
    unneeded = (end.sel(change="frozen: early always") > 0.8) & (end.sel(change="ablated: early") > 0.8)
    needed = (end.sel(change="frozen: late always") < 0.2) & (end.sel(change="ablated: late") < 0.2)
    useful = causes.sel(at="turn", change="frozen: early before the turn") < 0.2
    yes = (account & unneeded & needed & useful).values
    return Claim(
        "A layer that was useful and was then made redundant is found by what is left of its height, and freezing "
        "confirms it.",
        f"{SAPHRA}; planted, where the right answer is known",
        verdict(yes),
        f"{of(yes)}; left of the height of the early branch "
        f"{span(found.sel(measure='left', group='early').values, 3)}, of the late one "
        f"{span(found.sel(measure='left', group='late').values, 2)}; output at the end, of the untouched: early "
        f"frozen all along {span(end.sel(change='frozen: early always').values, 2)}, early ablated "
        f"{span(end.sel(change='ablated: early').values, 2)}, late frozen "
        f"{span(end.sel(change='frozen: late always').values, 2)}; at the turn, early frozen "
        f"{span(causes.sel(at='turn', change='frozen: early before the turn').values, 2)}",
    )


def _breakthrough(t: Tables) -> Claim:
    found, onsets = t.breakthrough(), t.onsets()
    yes = found >= 0.5
    return Claim(
        _said(
            t,
            "what is learned breaks through: half of the rise of the held-out accuracy falls within some tenth of the "
            "run.",
        ),
        SAPHRA,
        verdict(yes),
        f"{of(yes)}; share {span(found, 2)}; onset of the accuracy at step "
        f"{span(onsets.sel(of='held-out accuracy').values)} of "
        f"{span(onsets.sel(of='steps').values)}",
    )


def _vestigial(t: Tables) -> Claim:
    found = t.vestiges()
    flagged = found.sel(measure="vestigial")
    yes = (flagged == 1).any("group").values
    left = ", ".join(f"{g} {span(found.sel(measure='left', group=g).values, 2)}" for g in t.groups)
    ratio = abs(found.sel(measure="net")) / found.sel(measure="gross")
    nets = ", ".join(f"{g} {span(ratio.sel(group=g).values, 2)}" for g in t.groups)
    return Claim(
        _said(t, "some layer is vestigial for the held-out margin: of what it built up at most a quarter is left."),
        SAPHRA,
        verdict(yes),
        f"{of(yes)}; left of the height: {left}; net over gross: {nets}",
    )


def _early(t: Tables) -> Claim:
    found = t.windows()["loss"].sel(act="frozen").max("group")
    yes = (found.argmax("window") == 0).values
    said = "; ".join(f"{w} {span(found.sel(window=w).values, 3)}" for w in found["window"].values)
    return Claim(
        _said(t, "early windows are critical: freezing a layer costs the final held-out loss most in the first one."),
        ACHILLE,
        verdict(yes),
        f"{of(yes)}; cost of the layer that costs most, by window, nats: {said}",
    )


def _competition(t: Tables) -> Claim:
    found = t.windows()["shift"].sel(act="suppressed").isel(window=0)
    yes = (found.min("group") <= -0.05).values
    said = ", ".join(f"{g} {span(found.sel(group=g).values, 2)}" for g in t.groups)
    return Claim(
        _said(t, "what is learned first stands in the way: some layer pulled towards zero in the first window, the held-out "
                 "accuracy breaks earlier, by a twentieth of the run at least."),
        f"{SAPHRA}; the intervention is this study's",
        verdict(yes),
        f"{of(yes)}; shift of the onset by layer, as a share of the run: {said}",
    )  # fmt: skip


def _lines(t: Tables) -> list[Claim]:
    height, made = t.setting.height, []
    if len(t.seeds) > 1:
        ends, gaps = t.ends(), t.ends("gap")
        yes = ends > height
        made.append(Claim(
            _said(t, f"two seeds end in two basins: a barrier of more than {height:g} nats between their last states."),
            JUNEJA,
            verdict(yes),
            f"{of(yes, 'pairs')}; barrier {span(ends, 2)}, convexity gap {span(gaps, 2)} nats",
        ))  # fmt: skip
    settled = t.settled()
    yes = settled <= 0.5
    along = "; ".join(
        f"{share:g} {span(b, 2)}" for share, b in zip(t.setting.checkpoints[:-1], t.along().T[:-1], strict=True)
    )
    made.append(Claim(
        _said(t, "a run settles early: from half of it on its checkpoints are in the cluster of its last state."),
        FRANKLE,
        verdict(yes),
        f"{of(yes)}; settled at {span(settled, 2)} of the run; barrier to the last state from {along}",
    ))  # fmt: skip
    branches = t.branches()
    if branches is not None and (branches["branched at"] >= 0.25).any():
        late = branches.isel({"branched at": branches["branched at"].values >= 0.25})
        yes = (late <= height).all("branched at").values
        said = "; ".join(
            f"{s:g} {span(branches.sel({'branched at': s}).values, 3)}" for s in branches["branched at"].values
        )
        made.append(Claim(
            _said(t, "what other batches lead to lies in the same basin, if the run branches at a quarter or later."),
            FRANKLE,
            verdict(yes),
            f"{of(yes)}; barrier by the share of the run at which it branched, nats: {said}",
        ))  # fmt: skip
    return made


def _causes(t: Tables) -> list[Claim]:
    made, similar, dropped = [], t.similar(), t.dropped()
    if similar is not None:
        own, chance = similar["similar"].mean("query").values, similar["chance"].mean("query")
        yes = own > chance.max("draw").values
        made.append(Claim(
            _said(t, "two seeds owe a prediction to the same examples, more than chance has it."),
            "this study",
            verdict(yes),
            f"{of(yes, 'pairs')}; mean rank correlation {span(own, 2)}, with the examples shuffled "
            f"{span(chance.values.ravel(), 2)}",
        ))  # fmt: skip
    measured, accounted = (dropped.sel(of=o) for o in ("measured", "accounted"))
    ratio = (measured / accounted).sel(kind="largest").values
    yes = (ratio >= 0.5) & (ratio <= 2)
    both = np.corrcoef(measured.values.ravel(), accounted.values.ravel())[0, 1]
    made.append(Claim(
        _said(t, f"leaving the {t.setting.dropped} examples that raised a prediction most out of training costs it what the "
                 "account says they gave, within a factor of two."),
        "this study: accounting is not a counterfactual",
        verdict(yes),
        f"{of(yes, 'cases')}; measured {span(measured.sel(kind='largest').values, 2)} nats, accounted "
        f"{span(accounted.sel(kind='largest').values, 2)}; as many at random "
        f"{span(measured.sel(kind='random').values, 2)} and "
        f"{span(accounted.sel(kind='random').values, 2)}; correlation over all cases {both:.2f}",
    ))  # fmt: skip
    return made
