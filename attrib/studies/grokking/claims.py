"""What papers say about grokking, beside what these runs say: each claim holds, fails or depends, with numbers.

A claim is put as a yes or no for every run (or trial). It holds where at least MOST say yes, fails where at most FEW do,
and depends in between.
"""

from collections.abc import Sequence

import numpy as np

from ...report.article import Claim
from .fourier import KEY
from .tables import Tables, median

MOST, FEW = 0.8, 0.2
EXPLAIND, NANDA, OURS = "ExPLAIND, arXiv 2505.20076", "Nanda et al. 2023, arXiv 2301.05217", "this study, controls"


def claims(t: Tables) -> list[Claim]:
    """All of them, over the seeds that generalised."""
    paper = [_memorise_first(t), _decoder(t), _alternate(t), _decay(t), *_transplants(t)]
    circuits = [_restricted(t), _excluded(t), _few_frequencies(t), _same_sum(t), _cyclic(t)]
    return [*paper, _reinsertion(t), _controls(t), _embedding(t), *circuits, _pruning(t), _exact(t)]


def answer(t: Tables) -> list[str]:
    """By how much grokked layers speed up generalisation, where they do and where not, in a few sentences."""
    said = []
    for side in ("inner", "outer"):
        layers = ", ".join(getattr(t.setting, side))
        for init in t.setting.inits:
            trials = t.trials(f"{side} kept [{init}]")
            speed = [t.speed_up(run, 0.0, trial) for run, trial in trials]
            said.append(f"{layers} kept and the rest drawn anew ({init}): {span(speed, 1)}")
    cells = _cells(t)
    values = np.array([float(median(t.reinsertions).sel(_at(key))) for key in cells])
    faster = {
        f"into {target:g}": np.mean([v > 1 for key, v in zip(cells, values, strict=True) if key[2] == target])
        for target in t.setting.targets
    }
    best, worst = _ends(cells, values)
    names = ("inner", "outer", "embedding alone", "inner: equal size", "outer: equal size")
    controls = {
        f"into {target:g}": ", ".join(
            f"{name} {span(t.controls.sel({'condition': name, 'put into': target}).values, 1)}" for name in names
        )
        for target in t.setting.compared
    }
    return [
        "Transplanted into a fresh network and retrained, speed-up over the untouched run: " + "; ".join(said) + ".",
        f"Re-inserted into the same run: {_of(values > 1, 'cells of the grid')} generalise sooner than untouched in "
        f"the median over seeds. Best speed-up: {_cell(best, t)}. Worst: {_cell(worst, t)}. Share of cells that gain, "
        "by the step that the layers are put into: "
        + ", ".join(f"{name} {share:.0%}" for name, share in faster.items())
        + ".",
        "Speed-up of a re-insertion from the step of generalisation beside that of controls, the embedding alone and as "
        "many entries drawn from all layers: " + "; ".join(f"{into}: {said}" for into, said in controls.items()) + ".",
    ]


def verdict(answers: Sequence[bool] | np.ndarray) -> str:
    share = float(np.mean(answers)) if len(answers) else 0.0
    return "holds" if share >= MOST else "fails" if share <= FEW else "depends"


def span(values: Sequence[float] | np.ndarray, digits: int = 0) -> str:
    """Median and range; what is missing counts as beyond all others."""
    array = np.asarray(values, dtype=float)
    there = array[np.isfinite(array)]
    if not len(there):
        return "not reached" + (f" in any of {len(array)}" if len(array) > 1 else "")
    middle = np.median(np.where(np.isfinite(array), array, np.inf))
    said = f"{middle:.{digits}f}" if np.isfinite(middle) else "not reached"
    if len(array) == 1:
        return said
    lost = f", {len(array) - len(there)} of {len(array)} not reached" if len(there) < len(array) else ""
    return f"{said} ({there.min():.{digits}f} to {there.max():.{digits}f}{lost})"


def _of(answers: Sequence[bool] | np.ndarray, what: str = "seeds") -> str:
    return f"{int(np.sum(answers))} of {len(answers)} {what}"


def _memorise_first(t: Tables) -> Claim:
    memorised, generalised = t.steps("memorised"), t.steps("generalised")
    yes = generalised >= 5 * memorised
    return Claim(
        "The training pairs are memorised first, and the held-out pairs right only much later (five times as many "
        "steps).",
        EXPLAIND,
        verdict(yes),
        f"{_of(yes)}: memorised by {span(memorised)}, generalised by {span(generalised)}; breaks at "
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
        f"{_of(yes)}; its share of the rise {span(shares, 2)}",
    )


def _alternate(t: Tables) -> Claim:
    found = [t.flips(run) for run in t.runs]
    first, *middle, last = list(t.setting.groups)
    inner, ends = ([float(f.sel(group=names).mean()) for f in found] for names in (middle, [first, last]))
    yes = [a > b and a >= 0.25 for a, b in zip(inner, ends, strict=True)]
    return Claim(
        "While circuits form, the middle layers alternate: the sign of what they change for the held-out pairs flips "
        "more often than that of the first and the last layer, and from one bin to the next in a quarter of the "
        "cases at least.",
        EXPLAIND,
        verdict(yes),
        f"{_of(yes)}; share of flips {span(inner, 2)} against {span(ends, 2)}",
    )


def _decay(t: Tables) -> Claim:
    sizes = abs(t.by_phase.sum("group"))
    ratio = sizes.sel(term="decay") / sizes.sel(term="contribution")
    early, late = (ratio.sel(phase=name).values for name in ("memorising", "after"))
    yes = late > early
    return Claim(
        "Regularisation is more prominent at the end than while memorising.",
        EXPLAIND,
        verdict(yes),
        f"{_of(yes)}; decay over contribution of the examples, both in size: {span(early, 2)} while memorising, "
        f"{span(late, 2)} at the end",
    )


def _transplants(t: Tables) -> list[Claim]:
    made = []
    for side, other in (("inner", "outer"), ("outer", "inner")):
        for init in t.setting.inits:
            trials = t.trials(f"{side} kept [{init}]")
            took = np.array([np.nan if x["generalised"] is None else x["generalised"] for _, x in trials])
            whole = np.array([run["training"]["generalised"] for run, _ in trials])
            layers, drawn = (", ".join(getattr(t.setting, s)) for s in (side, other))
            gaps = [
                took[k] - x["memorised"] if x["memorised"] is not None else np.nan for k, (_, x) in enumerate(trials)
            ]
            plateau = whole - np.array([run["training"]["memorised"] for run, _ in trials])
            yes = (took <= 200) & (took * 5 <= whole) & (np.array(gaps) <= 0.2 * plateau)
            made.append(Claim(
                f"With {layers} of the grokked run kept and {drawn} drawn anew ({init}), it generalises within some "
                "200 steps, about ten times faster (five at least), without a plateau of memorisation.",
                EXPLAIND,
                verdict(yes),
                f"{_of(yes, 'trials')}: steps {span(took)} against {span(np.unique(whole))} of the whole run, "
                f"speed-up {span(whole / took, 1)}; from memorised to generalised {span(gaps)} steps against "
                f"{span(np.unique(plateau))}",
            ))  # fmt: skip
    return made


def _reinsertion(t: Tables) -> Claim:
    cells = _cells(t)
    values = np.array([float(median(t.reinsertions).sel(_at(key))) for key in cells])
    best, worst = _ends(cells, values)
    return Claim(
        "A grokked representation put into an earlier step of the same run makes it generalise sooner than untouched.",
        "this study",
        verdict(values > 1),
        f"{_of(values > 1, 'cells of the grid')} are faster in the median; best speed-up {_cell(best, t)}; worst "
        f"{_cell(worst, t)}",
    )


Cell = tuple[str, float, float]  # layers, taken from, put into


def _cells(t: Tables) -> list[Cell]:
    s = t.setting
    return [(name, i, j) for name in s.sets for i in s.sources for j in s.targets if j < i]


def _at(key: Cell) -> dict[str, object]:
    return dict(zip(("layers", "taken from", "put into"), key, strict=True))


def _ends(cells: Sequence[Cell], values: np.ndarray) -> tuple[Cell, Cell]:
    """Best and worst; not reached is worse than any."""
    known = np.where(np.isfinite(values), values, -1.0)
    return cells[int(np.argmax(known))], cells[int(np.argmin(known))]


def _cell(key: Cell, t: Tables) -> str:
    name, source, target = key
    return f"{name} from {source:g} into {target:g}, {span(t.reinsertions.sel(_at(key)).values, 1)}"


def _controls(t: Tables) -> Claim:
    yes, said = [], []
    for side in ("inner", "outer"):
        own = t.controls.sel(condition=side).fillna(0)
        for name in ("from before grokking", "permuted neurons", "equal size"):
            label = f"{side}: {name}"
            if label in t.controls["condition"].values:
                other = t.controls.sel(condition=label).fillna(0)
                better = (own > 1.1 * other).values.ravel()
                yes += better.tolist()
                said.append(f"{label} {better.sum()}/{better.size}")
    return Claim(
        "It is the grokked representation that counts: the same layers from before grokking, with permuted neurons, "
        "or as many entries of all layers do less (a tenth at least).",
        OURS,
        verdict(yes),
        f"{_of(yes, 'comparisons')}; re-insertion beats " + ", ".join(said),
    )


def _embedding(t: Tables) -> Claim:
    sides = t.controls.sel(condition=["inner", "outer"]).fillna(0).max("condition")
    alone = t.controls.sel(condition="embedding alone").fillna(0)
    yes = (sides > 1.1 * alone).values.ravel()
    return Claim(
        "More than the embedding is needed: the better of the two sets beats the embedding alone (by a tenth at "
        "least).",
        OURS,
        verdict(yes),
        f"{_of(yes, 'comparisons')}; speed-up {span(sides.values.ravel(), 2)} against {span(alone.values.ravel(), 2)}",
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
        f"{_of(yes)}; halved at {span(halved, 2)} of the steps to generalise, break at {span(onset, 2)}",
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
        f"{_of(yes)}; excluded loss {span(low, 2)} nats at its least, {span(end, 2)} at the end",
    )


def _few_frequencies(t: Tables) -> Claim:
    shares = [t.frequencies(run).values for run in t.runs]
    counts = [int((s >= KEY).sum()) for s in shares]
    joint = [float(s[s >= KEY].sum()) for s in shares]
    yes = [c <= max(5, len(s) // 5) and j >= 0.5 for c, j, s in zip(counts, joint, shares, strict=True)]
    return Claim(
        "A few key frequencies make up the neurons: at most five (or a fifth of all), with half of the variance or "
        "more.",
        NANDA,
        verdict(yes),
        f"{_of(yes)}; {span(counts)} of {len(shares[0])} frequencies with {KEY:.0%} or more each, together "
        f"{span(joint, 2)}",
    )


def _same_sum(t: Tables) -> Claim:
    found = [run["account"]["residues"] for run in t.runs]
    yes = [r["same"] > r["others"] + 5 * r["spread"] for r in found]
    return Claim(
        "A held-out pair is carried by training pairs of the same sum.",
        EXPLAIND,
        verdict(yes),
        f"{_of(yes)}; mean contribution of a pair of the same sum {span([r['same'] for r in found], 2)} nats, of "
        f"another {span([r['others'] for r in found], 2)}; spread where sums are shuffled "
        f"{span([r['spread'] for r in found], 2)}",
    )


def _cyclic(t: Tables) -> Claim:
    yes, excess = [], []
    for run in t.runs:
        power = np.array(run["account"]["residues"]["power"])
        keys = np.array(run["progress"]["keys"]) - 1
        excess.append(float(power[keys].sum() / (len(keys) / len(power))))
        yes.append(excess[-1] > 1.5)
    return Claim(
        "Contributions are cyclic in the distance of the sums, at the network's key frequencies.",
        EXPLAIND,
        verdict(yes),
        f"{_of(yes)}; their share of the spectrum of the contributions is {span(excess, 2)} times that of chance",
    )


def _pruning(t: Tables) -> Claim:
    published = t.pruning("accuracy", "held-out accuracy").sel({"weights kept": slice(0, 0.3)}).mean("weights kept")
    ours, size = (published.sel(score=name).values for name in ("contribution", "magnitude"))
    yes = ours > size
    return Claim(
        "Pruning by contribution leaves more than pruning by magnitude, 1 to 30 % of the weights kept.",
        EXPLAIND,
        verdict(yes),
        f"{_of(yes)}; mean held-out accuracy {span(ours, 3)} against {span(size, 3)}",
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
