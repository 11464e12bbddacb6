"""What the theory says about deep linear networks, beside what these runs say."""

import numpy as np

from ...report.article import Claim
from ..verdicts import of, span, verdict
from . import theory
from .data import ITEMS
from .recipe import ILLUSION
from .tables import MODES, Tables

SAXE13, SAXE19 = "Saxe, McClelland, Ganguli 2013, arXiv 1312.6120", "Saxe, McClelland, Ganguli 2019, arXiv 1810.10531"
NEAR = 0.05  # of the time that the closed form gives


def claims(t: Tables) -> list[Claim]:
    modes = [_oracle(t), _closed_form(t), _broad_first(t), _shares(t), _layers(t), _one_secant(t)]
    tree = [_eigenvalues(t), _tree_order(t), _differentiation(t)]
    return [*modes, _illusion(t), _who_deceives(t), _no_illusion(t), *tree, _coherence(t)]


def _oracle(t: Tables) -> Claim:
    half = t.half_rises("aligned")
    off = abs(half.sel(of="network") - half.sel(of="discrete oracle"))
    yes = (off <= 1).all("mode").values
    return Claim(
        "From small balanced weights each mode grows by itself: half-rise within one step of the discrete oracle.",
        SAXE13,
        verdict(yes),
        f"{of(yes)} (they differ by a rotation of the hidden layer); half-rise at steps "
        + ", ".join(span(half.sel(of="network", mode=m).values) for m in MODES)
        + "; oracle " + ", ".join(span(half.sel(of="discrete oracle", mode=m).values) for m in MODES),
    )  # fmt: skip


def _closed_form(t: Tables) -> Claim:
    half = t.half_rises("random")
    off = abs(half.sel(of="network") / half.sel(of="closed form") - 1)
    yes = (off <= NEAR).all("mode").values
    return Claim(
        "From small random weights, too: half-rise within a twentieth of the closed form, each mode's a0 being what "
        "of its first weights grows.",
        SAXE13,
        verdict(yes),
        f"{of(yes)}; largest deviation of a mode {span(off.max('mode').values, 3)}; half-rise at "
        + ", ".join(span(half.sel(of="network", mode=m).values) for m in MODES)
        + " against " + ", ".join(span(half.sel(of="closed form", mode=m).values) for m in MODES),
    )  # fmt: skip


def _broad_first(t: Tables) -> Claim:
    half = t.half_rises("random").sel(of="network").values
    yes = (half[0] < half[1]) & (half[1] < half[2:].min(0))
    return Claim(
        "Broad distinctions before details: living before animal or plant, and that before single items, from small "
        "random weights.",
        SAXE19,
        verdict(yes),
        f"{of(yes)}; in units of the first half-rise " + ", ".join(span(h / half[0], 2) for h in half),
    )


def _shares(t: Tables) -> Claim:
    found = {name: t.shares(name) for name in ("aligned", "random")}
    off = {n: abs(s.sel(of="contribution") - s.sel(of="v^2")).max(("mode", "item")).values for n, s in found.items()}
    yes = off["aligned"] <= 1e-3
    return Claim(
        "Item i contributes the share v_i^2 of a mode's growth, where the network is aligned (to 1e-3).",
        "this study, from the dynamics of Saxe et al.",
        verdict(yes),
        f"{of(yes)}; largest deviation {off['aligned'].max():.1e}; from small random weights "
        f"{span(off['random'], 3)}: there the degenerate modes mix",
    )


def _layers(t: Tables) -> Claim:
    found = {name: t.layers(name) for name in ("aligned", "random")}
    off = {name: abs(s - 0.5).max(("mode", "group")).values for name, s in found.items()}
    yes = off["random"] <= 0.05
    return Claim(
        "Both layers contribute half of each mode's growth (to a twentieth), from small random weights.",
        "this study: balanced weights stay balanced",
        verdict(yes),
        f"{of(yes)}; largest deviation from a half {span(off['random'], 3)}, in the aligned network "
        f"{off['aligned'].max():.1e}",
    )


def _one_secant(t: Tables) -> Claim:
    found = [run["paths"]["difference"] for run in t.runs]
    yes = [d <= 1e-14 for d in found]
    return Claim(
        "At depth 2 one secant is the path integral: no contribution differs by more than 1e-14 of the largest.",
        "theory of the secant",
        verdict(yes),
        f"{of(yes)}; largest difference {max(found):.1e}",
    )


def _illusion(t: Tables) -> Claim:
    found, said, yes = t.illusion(), [], []
    for name in ("aligned", "random"):
        curve = found.sel(network=name).dropna("step", how="all")
        peak, at, end = curve.max("step").values, curve.argmax("step").values - 1, curve[:, -1].values
        yes.append((peak > 0.2) & (abs(end) < 0.1 * peak))
        said.append(f"{name}: rises to {span(peak, 3)} at step {span(at)}, at the end {span(end, 3)}")
    return Claim(
        f"An illusory correlation: that {ILLUSION} is believed for a while, and given up.",
        SAXE19,
        verdict(np.concatenate(yes)),
        f"{of(yes[1])} from small random weights; " + "; ".join(said),
    )


def _who_deceives(t: Tables) -> Claim:
    yes, rows = [], []
    for run, curve in zip(t.runs, t.illusion().sel(network="random"), strict=True):
        found, peak = t.deceivers(run, "random"), int(curve.argmax("step"))
        up, down = found[:peak].sum("step"), found[peak:].sum("step")
        yes.append(up.idxmax("group").item() == "Canary" and down.idxmin("group").item() == "Salmon")
        rows.append([up.values, down.values])
    sums = np.array(rows)
    said = "; ".join(f"{item} {span(sums[:, 0, k], 2)}, then {span(sums[:, 1, k], 2)}" for k, item in enumerate(ITEMS))
    return Claim(
        "The canary teaches the network that a salmon can fly, more than any other item, and the salmon itself "
        "takes it back most.",
        "this study",
        verdict(yes),
        f"{of(yes)}; contributions up to the peak, then after it, from small random weights: {said}",
    )


def _no_illusion(t: Tables) -> Claim:
    found = abs(t.illusion().sel(network="shallow")).max("step").values  # the same for all seeds: it starts from 0
    yes = found < 1e-9
    return Claim(
        "A shallow network has no such illusion.", SAXE19, verdict(yes), f"{of(yes)}; at most {found.max():.1e}"
    )


def _eigenvalues(t: Tables) -> Claim:
    rows = [row for run in t.runs for row in run["spectrum"]]
    off = np.array([(row["measured"] - row["theory"]) / row["error"] for row in rows])
    said = [span([run["spectrum"][k]["measured"] for run in t.runs], 3) for k in range(t.setting.depth)]
    values = ", ".join(f"{v:.4f}" for v in theory.eigenvalues(t.setting.depth, t.setting.flip))
    yes = abs(off) <= 3
    return Claim(
        f"The correlations of the tree have the eigenvalues {values}, one a level (to three standard errors).",
        SAXE19,
        verdict(yes),
        f"{of(yes, 'estimates')}; measured {', '.join(said)}; off by {span(off, 2)} standard errors",
    )


def _tree_order(t: Tables) -> Claim:
    half = t.by_level().values
    yes: np.ndarray = np.all(np.diff(half, axis=0) > 0, axis=0)
    return Claim(
        "The levels of a tree are learned from the root to the leaves.",
        SAXE19,
        verdict(yes),
        f"{of(yes)}; half-rise of the modes of each level " + ", ".join(span(h) for h in half),
    )


def _differentiation(t: Tables) -> Claim:
    found = np.array([t.clusters(run)[:-1] for run in t.runs])
    yes: np.ndarray = np.all(found, axis=1)
    return Claim(
        "The hidden layer differentiates progressively: when the modes of a level are learned and those of the next not, "
        "clustering the items into as many groups finds the branches of that level.",
        SAXE19,
        verdict(yes),
        f"{of(yes)}; by level " + ", ".join(of(f) for f in found.T),
    )


def _coherence(t: Tables) -> Claim:
    found = t.overlaps().isel(size=-1)
    at = found["signal to noise"].values
    below, above = found.isel({"signal to noise": at <= 0.5}), found.isel({"signal to noise": at >= 2})
    yes = np.concatenate([(below < 0.2).values.ravel(), (above > 0.2).values.ravel()])
    data = {
        name: float(abs(found.sel(of=name).mean("draw") - theory.overlap(at)).max()) for name in ("data", "network")
    }
    return Claim(
        "A category in noise is learnable where its signal to noise is above 1: squared overlap under 0.2 up to a half, "
        "over 0.2 from two on.",
        SAXE19,
        verdict(yes),
        f"{of(yes, 'trials')}; overlap of the first mode of the data {span(below.sel(of='data').values.ravel(), 2)} and "
        f"{span(above.sel(of='data').values.ravel(), 2)}, of what the network learned first "
        f"{span(below.sel(of='network').values.ravel(), 2)} and {span(above.sel(of='network').values.ravel(), 2)}; mean "
        f"over draws at most {data['data']:.2f} and {data['network']:.2f} from the limit",
    )
