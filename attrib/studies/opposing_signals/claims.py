"""What is said of opposing signals, beside what these runs say."""

import numpy as np
import xarray as xr

from ...report.article import Claim
from ..verdicts import of, span, verdict
from .tables import Tables

ROSENFELD = "Rosenfeld and Risteski 2023, arXiv 2311.04163"
COHEN = "Cohen et al. 2021, arXiv 2103.00065"


def claims(t: Tables) -> list[Claim]:
    first = [_edge(t), _planted(t)]
    if not t.runs:
        return first
    return [*first, _few(t), _alternate(t), _calm(t), _opposite(t), *_without(t), _labels(t), _adam(t), _exact(t)]


def _edge(t: Tables) -> Claim:
    edge, reached, late = 2 / t.setting.lr, [r["sgd"]["reached"] for r in t.everyone], []
    for run in (r["sgd"] for r in t.everyone):
        late.append(float(run["sharpness"][run["sharpness"]["look"] >= run["first"]].median()))
    yes = [r and 0.75 * edge <= v <= 1.25 * edge for r, v in zip(reached, late, strict=True)]
    return Claim(
        "Gradient descent sharpens until it reaches the edge of stability, 2 / lr, and stays there: the median from then "
        "on is within a quarter of it.",
        COHEN,
        verdict(yes),
        f"{of(yes)}; passes {edge:g} at step {span([r['sgd']['first'] for r in t.everyone])}, median from there on "
        f"{span(late, 1)}",
    )


def _few(t: Tables) -> Claim:
    found = t.movement()
    data, gross = (found.sel(measure=m).values for m in ("data", "gross"))
    yes = (data <= 0.25) & (gross >= 2 * data)
    return Claim(
        "A few examples make up much of what moves: two opposing groups, a quarter of the data at most, with at least "
        "twice their share of the gross change of the losses.",
        ROSENFELD,
        verdict(yes),
        f"{of(yes)}; share of the data {span(data, 2)}, of the gross change {span(gross, 2)}",
    )


def _alternate(t: Tables) -> Claim:
    found, said, yes = t.movement(), [], []
    for run in t.runs:
        own, others = found.sel(seed=run["seed"]), t.controls(run)
        at = own.sel(measure="correlation")
        low = {name: float((c.sel(measure="correlation") <= at).mean()) for name, c in others.items()}
        opposed = bool(np.isfinite(at)) and all(v <= 0.05 for v in low.values())
        yes.append(opposed and float(own.sel(measure="opposite")) >= 0.8)
        said.append(low)
    names = list(dict.fromkeys(n for s in said for n in s))
    beaten = "; ".join(f"{n} {span([s[n] for s in said if n in s], 2)}" for n in names)
    lost = f" (in {said.count({})} of {len(said)} seeds there are not as many others)" if {} in said else ""
    return Claim(
        "The losses of the two groups alternate: one rises as the other falls, in four fifths of the steps at least, and "
        "their changes are more opposed (by correlation) than those of 95 % of groups of these sizes among the others.",
        ROSENFELD,
        verdict(yes),
        f"{of(yes)}; in the steps after those that the groups are from: opposite in "
        f"{span(found.sel(measure='opposite').values, 2)} of them, direction changed in "
        f"{span(found.sel(measure='flips').values, 2)}, correlation {span(found.sel(measure='correlation').values, 2)}; "
        f"share of other groups as opposed: {beaten}{lost}; own contribution of the matched, of the members' "
        f"{span(t.alike(), 2)}",
    )


def _calm(t: Tables) -> Claim:
    found = t.movement().sel(measure="calm").values
    yes = found <= 0.2
    return Claim(
        "The mean loss looks calm meanwhile: it changes by a fifth at most of what the single losses do.",
        ROSENFELD,
        verdict(yes),
        f"{of(yes)}; median ratio {span(found, 2)}",
    )


def _opposite(t: Tables) -> Claim:
    found = t.projections()
    signs = (np.sign(found[0]) != np.sign(found[1])).mean("look").values
    size = abs(found).mean("look")
    yes = signs >= 0.8
    return Claim(
        "The gradients of the two groups have opposite signs along the sharpest direction (at four fifths of the looks "
        "in the second half of the window).",
        ROSENFELD + "; a later study reports the same sign",
        verdict(yes),
        f"{of(yes)}; opposite at {span(signs, 2)} of the looks; mean size of the cosine with that direction "
        f"{span(size[0].values, 2)} and {span(size[1].values, 2)}",
    )


def _without(t: Tables) -> list[Claim]:
    again = t.again()
    half = again["sharpness"]["step"].values[-1] / 2
    late = again["sharpness"].where(again["sharpness"]["step"] >= half).mean("step")
    ascent, spikes = again["ascent"], again["spikes"]
    others = ("random left out", "matched left out")

    def below(values: xr.DataArray) -> np.ndarray:
        own = values.sel(change="groups left out").values
        found: np.ndarray = np.all([own < values.sel(change=other).values for other in others], axis=0)
        return found

    def told(values: xr.DataArray, digits: int) -> str:
        return ", ".join(f"{c} {span(values.sel(change=c).values, digits)}" for c in values["change"].values)

    calmer, flatter, source = below(ascent), below(late), f"{ROSENFELD}; the intervention is this study's"
    return [
        Claim(
            "Without the two groups training is calmer than without as many others: the mean loss of what is trained on "
            "rises less in all.",
            source,
            verdict(calmer),
            f"{of(calmer)}; nats it rose by in all: {told(ascent, 2)}; steps of a tenth or more: {told(spikes, 0)}",
        ),
        Claim(
            "Without the two groups what is trained on is less sharp than without as many others.",
            source,
            verdict(flatter),
            f"{of(flatter)}; mean sharpness in the second half: {told(late, 1)}; 2 / lr is {2 / t.setting.lr:g}",
        ),
    ]


def _labels(t: Tables) -> Claim:
    reached, ratios = [r["shuffled"]["reached"] for r in t.runs], []
    for name in ("sgd", "shuffled"):
        ratios.append((t.movement(name).sel(measure="gross") / t.movement(name).sel(measure="data")).values)
    flips = t.movement("shuffled").sel(measure="flips").values
    yes = [bool(a > b) if r and np.isfinite(b) else None for a, b, r in zip(*ratios, reached, strict=True)]
    return Claim(
        "It takes real labels: with shuffled ones, at their own edge of stability, the groups' share of the movement is "
        "less of a multiple of their share of the data.",
        "this study, control",
        verdict(yes),
        f"{_decided(yes)}; multiples {span(ratios[0], 2)} and with shuffled labels {span(ratios[1], 2)}, whose groups "
        f"change direction in {span(flips, 2)} of the steps; at the edge of stability {of(reached)}",
    )


def _adam(t: Tables) -> Claim:
    sgd, adam = (t.movement(name, "brief") for name in ("sgd", "adam"))
    own, other = (m.sel(measure="opposite").values for m in (sgd, adam))
    yes = [bool(a > b) if np.isfinite(a + b) else None for a, b in zip(own, other, strict=True)]
    left = [float(r["adam"]["matrix"]["left"].mean()) for r in t.runs]
    return Claim(
        "Adam does not alternate so: its own opposing groups' losses move against each other in fewer steps (groups of "
        f"both from {t.setting.adam_steps} steps).",
        ROSENFELD,
        verdict(yes),
        f"{_decided(yes)}; opposite in {span(other, 2)} of the steps against {span(own, 2)}, correlation "
        f"{span(adam.sel(measure='correlation').values, 2)} against {span(sgd.sel(measure='correlation').values, 2)}; of "
        f"Adam's changes {span(left, 2)} are momentum from before what was told apart",
    )


def _decided(answers: list[bool | None]) -> str:
    known = [a for a in answers if a is not None]
    return of(known) + (f", {len(answers) - len(known)} undecided" if len(known) < len(answers) else "")


def _planted(t: Tables) -> Claim:
    found = t.planted()
    strong = found.isel(brightness=0)
    yes = (strong.sel(measure=["precision", "recall"]) >= 0.95).all("measure").values
    said = "; ".join(
        f"brightness {b:g}: precision {span(found.sel(brightness=b, measure='precision').values, 2)}, recall "
        f"{span(found.sel(brightness=b, measure='recall').values, 2)}" for b in found["brightness"].values
    )  # fmt: skip
    return Claim(
        "A planted signal, a bright corner that two classes share, is found: precision and recall of 0.95 at least where "
        f"the corner is {float(strong['brightness']):g} times as bright as the brightest pixel.",
        "this study, where the right answer is known",
        verdict(yes),
        f"{of(yes)}; {said}",
    )


def _exact(t: Tables) -> Claim:
    gaps = [float(r[name]["matrix"]["gap"].max()) for r in t.runs for name in ("sgd", "shuffled")]
    return Claim(
        "The matrix is exact: what all images did to a loss in a step is the change of that loss.",
        "theory of the secant",
        verdict([g <= 1e-5 for g in gaps]),
        f"largest gap {max(gaps):.1e} of the gross size, float32",
    )
