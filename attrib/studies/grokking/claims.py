"""What papers say about grokking, beside what these runs say: each claim holds, fails or depends, with numbers.

A claim is put as a yes or no for every run (or trial): see `verdicts`.
"""

import numpy as np

from ...report.article import Claim
from ..verdicts import of, span, verdict
from .speeds import beats, by_seed, cells_of, counted, ends, gain, speeds_of, times, told
from .tables import Tables

EXPLAIND, NANDA = "ExPLAIND, arXiv 2505.20076", "Nanda et al. 2023, arXiv 2301.05217"


def claims(t: Tables) -> list[Claim]:
    """All of them, over the seeds that generalised."""
    paper = [_memorise_first(t), _decoder(t), _alternate(t), _decay(t), *_transplants(t)]
    circuits = [_restricted(t), _excluded(t), _few_frequencies(t), _same_sum(t), _cyclic(t)]
    return [*paper, _reinsertion(t), _controls(t), _embedding(t), *circuits, _pruning(t), _exact(t)]


def answer(t: Tables) -> list[str]:
    """By how much grokked layers speed up generalisation, where they do and where not, in a few sentences."""
    said = []
    for init in t.setting.inits:
        for side in ("inner", "outer"):
            speed = times(speeds_of(t, f"{side} kept [{init}]"))
            said.append(f"{', '.join(getattr(t.setting, side))} kept and the rest drawn anew ({init}) {speed}")
        said.append(f"nothing kept ({init}) {times(speeds_of(t, f'nothing kept [{init}]'))}")
    cells = {key: gain(t, key) for key in cells_of(t)}
    faster = {
        f"into {target:g}": ", ".join(counted([v for key, v in cells.items() if key[2] == target]))
        for target in t.setting.targets
    }
    best, worst = ends(t)
    names = ("inner", "outer", "embedding alone", "inner: equal size", "outer: equal size")
    speeds = t.controls["speed_up"]
    controls = {
        f"into {target:g}": ", ".join(
            f"{name} {times(speeds.sel({'condition': name, 'put into': target}).values)}" for name in names
        )
        for target in t.setting.compared
    }
    return [
        "Transplanted into a fresh network and retrained, speed-up over the untouched run: " + "; ".join(said) + ".",
        "Re-inserted into the same run (a gain: a tenth faster than untouched at least, in the median over seeds): "
        f"{', '.join(counted(list(cells.values())))} of the grid's cells. Best speed-up: {told(best, t)}. Worst: "
        f"{told(worst, t)}. By the step that the layers are put into: "
        + "; ".join(f"{name} {share}" for name, share in faster.items()) + ".",
        "Speed-up of a re-insertion from the step of generalisation beside that of controls, the embedding alone and as "
        "many entries drawn from all layers: " + "; ".join(f"{into}: {said}" for into, said in controls.items()) + ".",
    ]  # fmt: skip


def _memorise_first(t: Tables) -> Claim:
    memorised, generalised = t.steps("memorised"), t.steps("generalised")
    yes = generalised >= 5 * memorised
    return Claim(
        "The training pairs are memorised first, and the held-out pairs right only much later (five times as many "
        "steps).",
        EXPLAIND,
        verdict(yes),
        f"{of(yes)}: memorised by {span(memorised)}, generalised by {span(generalised)}; breaks at "
        f"{span(t.steps('memorisation onset'))} and {span(t.steps('generalisation onset'))}",
    )


def _decoder(t: Tables) -> Claim:
    last = list(t.setting.groups)[-1]
    changes = [t.memorising(run) for run in t.runs]
    yes = [str(c["group"].values[int(np.argmax(c.values))]) == last for c in changes]
    shares = [float(c.sel(group=last) / c.sum()) for c in changes]
    return Claim(
        "The last layer drives memorisation: no other raises the training pairs as much while they are memorised.",
        EXPLAIND,
        verdict(yes),
        f"{of(yes)}; its share of the rise {span(shares, 2)}",
    )


def _alternate(t: Tables) -> Claim:
    found = [t.flips(run) for run in t.runs]
    first, *middle, last = list(t.setting.groups)
    inner, outer = ([float(f.sel(group=names).mean()) for f in found] for names in (middle, [first, last]))
    yes = [a > b and a >= 0.25 for a, b in zip(inner, outer, strict=True)]
    return Claim(
        "While circuits form, the middle layers alternate: the sign of what they change for the held-out pairs flips "
        "more often than that of the first and the last layer, and from one bin to the next in a quarter of the "
        "cases at least.",
        EXPLAIND,
        verdict(yes),
        f"{of(yes)}; share of flips {span(inner, 2)} against {span(outer, 2)}",
    )


def _decay(t: Tables) -> Claim:
    early, late = (np.array([t.prominence(run, name) for run in t.runs]) for name in ("memorising", "after"))
    yes = late > 1.1 * early
    return Claim(
        "Regularisation is more prominent at the end than while memorising (by a tenth at least).",
        EXPLAIND,
        verdict(yes),
        f"{of(yes)}; sizes of decay over sizes of the examples' contributions, summed over steps and layers: "
        f"{span(early, 2)} while memorising, {span(late, 2)} at the end",
    )


def _transplants(t: Tables) -> list[Claim]:
    made = []
    for side, other in (("inner", "outer"), ("outer", "inner")):
        for init in t.setting.inits:
            trials = [trial for _, trial in t.trials(f"{side} kept [{init}]")]
            speed = speeds_of(t, f"{side} kept [{init}]")
            took, memorised = (
                np.array([trial[key] for trial in trials], dtype=float) for key in ("generalised", "memorised")
            )
            plateau = float(np.median(t.steps("generalised") - t.steps("memorised")))
            yes = (took <= 200) & (speed >= 5) & (took - memorised <= 0.2 * plateau)
            layers, drawn = (", ".join(getattr(t.setting, s)) for s in (side, other))
            made.append(Claim(
                f"With {layers} of the grokked run kept and {drawn} drawn anew ({init}), it generalises within some "
                "200 steps, about ten times faster (five at least), without a plateau of memorisation.",
                EXPLAIND,
                verdict(yes),
                f"{of(yes, 'trials')}: steps {span(took)} against {span(t.steps('generalised'))} of the whole run, "
                f"speed-up {times(speed)}, with nothing kept {times(speeds_of(t, f'nothing kept [{init}]'))}; from "
                f"memorised to generalised {span(took - memorised)} steps against {plateau:.0f}",
            ))  # fmt: skip
    return made


def _reinsertion(t: Tables) -> Claim:
    gains = [gain(t, key) for key in cells_of(t)]
    best, worst = ends(t)
    return Claim(
        "A grokked representation put into an earlier step of the same run makes it generalise sooner than untouched "
        "(by a tenth at least, in the median over seeds).",
        "this study",
        verdict(gains),
        f"cells of the grid: {', '.join(counted(gains))}; best speed-up {told(best, t)}; worst {told(worst, t)}",
    )


def _controls(t: Tables) -> Claim:
    said, answers = [], []
    for side in ("inner", "outer"):
        for name in ("from before grokking", "permuted neurons", "equal size"):
            label = f"{side}: {name}"
            if label not in t.controls["condition"].values:
                continue
            # at a random start the neurons beside the graft are as good in any order
            targets = [s for s in t.setting.compared if s > 0 or name != "permuted neurons"]
            better = beats(t, side, label, targets)
            answers.append(better)
            known = better[~np.isnan(better)]
            said.append(f"{label} {int(known.sum())}/{len(known)}")
    yes = by_seed(answers)
    return Claim(
        "It is the grokked representation that counts: the same layers from before grokking, with permuted neurons, "
        "or as many entries of all layers do less (a tenth at least, in most comparisons of a seed).",
        "this study, controls",
        verdict(yes),
        f"{of(yes)}; comparisons that re-insertion wins of those that the steps given decide: " + ", ".join(said),
    )


def _embedding(t: Tables) -> Claim:
    found = {side: beats(t, side, "embedding alone", t.setting.compared) for side in ("inner", "outer")}
    yes = by_seed(list(found.values()))
    wins = ", ".join(f"{side} {int(np.nansum(v))}/{int((~np.isnan(v)).sum())}" for side, v in found.items())
    speeds = t.controls["speed_up"]
    return Claim(
        "More than the embedding is needed: each of the two sets beats the embedding alone (by a tenth at least, in "
        "most comparisons of a seed).",
        "this study, controls",
        verdict(yes),
        f"{of(yes)}; comparisons won: {wins}; speed-up of the embedding alone "
        f"{times(speeds.sel(condition='embedding alone').values.ravel())}",
    )


def _restricted(t: Tables) -> Claim:
    onset = t.steps("generalisation onset") / t.steps("generalised")
    loss = t.progress.sel(loss="restricted, held-out pairs")
    halved = _first(loss <= 0.5 * loss[:, 0])
    yes = halved < onset
    return Claim(
        "The general solution grows before it shows: the restricted loss has halved before the held-out pairs break "
        "through.",
        NANDA,
        verdict(yes),
        f"{of(yes)}; halved at {span(halved, 2)} of the steps to generalise, break at {span(onset, 2)}",
    )


def _excluded(t: Tables) -> Claim:
    loss = t.progress.sel(loss="excluded, training pairs")
    low = loss.min("share of the steps").values
    end = loss[:, -1].values
    yes = end > 2 * low
    return Claim(
        "Memorised solutions are given up: without the key frequencies the training pairs are worse at the end than "
        "before.",
        NANDA,
        verdict(yes),
        f"{of(yes)}; excluded loss {span(low, 2)} nats at its least, {span(end, 2)} at the end",
    )


def _few_frequencies(t: Tables) -> Claim:
    shares = [t.frequencies(run).values for run in t.runs]
    keys = [np.array(run["progress"]["keys"]) - 1 for run in t.runs]
    counts, joint = [len(k) for k in keys], [float(s[k].sum()) for s, k in zip(shares, keys, strict=True)]
    yes = [c <= 5 and j >= 0.5 for c, j in zip(counts, joint, strict=True)]
    return Claim(
        "A few key frequencies make up the neurons: at most five, with half of the variance or more.",
        NANDA,
        verdict(yes),
        f"{of(yes)}; {span(counts)} key frequencies of {len(shares[0])}, together {span(joint, 2)}",
    )


def _same_sum(t: Tables) -> Claim:
    found = [run["residues"] for run in t.runs]
    yes = [r["same"] > r["others"] + 5 * r["spread"] and r["apart"] > r["others"] for r in found]
    return Claim(
        "A held-out pair is carried by training pairs of the same sum, also by those that share no number with it.",
        EXPLAIND,
        verdict(yes),
        f"{of(yes)}; mean contribution of a pair of the same sum {span([r['same'] for r in found], 1)} nats, sharing "
        f"no number {span([r['apart'] for r in found], 1)}, of another sum {span([r['others'] for r in found], 1)}; "
        f"spread where sums are shuffled {span([r['spread'] for r in found], 1)}",
    )


def _cyclic(t: Tables) -> Claim:
    found = [run["residues"] for run in t.runs]
    yes = [r["p"] <= 0.01 for r in found]
    return Claim(
        "Contributions are cyclic in the distance of the sums: the network's key frequencies stand out in their spectrum.",
        EXPLAIND,
        verdict(yes),
        f"{of(yes)}; share of the key frequencies {span([r['cyclic'] for r in found], 2)}, p against shuffled sums "
        f"{span([r['p'] for r in found], 3)}",
    )


def _pruning(t: Tables) -> Claim:
    published = t.pruning("accuracy", "held-out accuracy").sel({"weights kept": slice(0, 0.3)}).mean("weights kept")
    ours, size = (published.sel(score=name).values for name in ("contribution", "magnitude"))
    yes = ours > size
    return Claim(
        "Pruning by contribution leaves more than pruning by magnitude, 1 to 30 % of the weights kept.",
        EXPLAIND,
        verdict(yes),
        f"{of(yes)}; mean held-out accuracy {span(ours, 3)} against {span(size, 3)}",
    )


def _exact(t: Tables) -> Claim:
    relative = [run["account"]["relative"] for run in t.runs]
    return Claim(
        "A run can be rebuilt from its contributions (the reference needs 100 gradients a step for agreement 1; one "
        "here).",
        EXPLAIND,
        verdict([r <= 1e-5 for r in relative]),
        f"largest residual {max(run['account']['residual'] for run in t.runs):.1e} nats, {max(relative):.1e} of the "
        "gross size",
    )


def _first(there: "np.ndarray | object") -> np.ndarray:
    """(seed, share) of yes and no -> the first share of yes; 2 where there is none."""
    values = np.asarray(there)
    grid = np.append(np.linspace(0, 1, values.shape[1]), 2.0)
    found: np.ndarray = grid[np.where(values.any(1), values.argmax(1), values.shape[1])]
    return found
