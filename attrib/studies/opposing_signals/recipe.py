"""Everything done with one seed.

1. Gradient descent on all images at every step, recorded, until well into the edge of stability; its sharpness.
2. From where the sharpness passes 2 / lr: the change of every loss in every step, over the images that caused it.
3. Opposing pairs and groups of that matrix, and how the groups' losses move in the steps that follow.
4. Trained again without the groups, with the groups down-weighted, without others.
5. The same with shuffled labels, with Adam, and with a planted signal, of which the right answer is known.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from ... import measure
from ...attribute import attribute
from ...development import Move, curvature, evaluate, moves
from ...intervention import Drop, Reweight, replay, weighted
from ...kernels.opposition import help_between, opposing_groups, opposing_pairs
from ...run import Run, open_run
from ..digits import DigitsCnn
from ..parts import SeedParts
from ..recipe import cross_entropy, train_recorded
from .measures import matched, recovered
from .setting import Setting, images, planted

TOLERANCE = 1e-5  # float32 replay of float32 training, of the gross size
GROUPS = 2
DOWN = 0.1  # weight of what is down-weighted
SHOWN = 32  # images whose mean loss a ledger is of


def study_seed(setting: Setting, parts: SeedParts) -> dict[str, Any]:
    """All parts of a seed: JSON and labelled arrays, by the name of the run; "trials" of what was trained again."""
    found: dict[str, Any] = {"seed": parts.seed, "planted": []}
    x, y = images(setting.images, parts.seed)
    found["images"] = x[:, 0].numpy(), y.numpy()
    found["sgd"] = _studied(setting, parts, "sgd", x, y)
    found["projections"] = parts.part("projections", "project", lambda: _projections(parts, found["sgd"], x, y))
    found["trials"] = {
        name: parts.trial(name, partial(_again, setting, parts, found["sgd"]["first"], name, weights, x, y))
        for name, weights in _changes(found["sgd"], parts.seed).items()
    }
    found["shuffled"] = _studied(setting, parts, "shuffled", *images(setting.images, parts.seed, shuffled=True))
    begin = float(found["sgd"]["losses"][found["sgd"]["first"]].mean())
    found["adam"] = _studied(setting, parts, "adam", x, y, until=begin)
    for brightness in setting.brightness:
        found["planted"].append(_planted(setting, parts, brightness))
    return found


def _studied(
    setting: Setting, parts: SeedParts, name: str, x: Tensor, y: Tensor, until: float | None = None
) -> dict[str, Any]:
    """A run, its losses and sharpness, who changed whose loss, and the groups.

    until: a mean loss; the window of Adam begins where it is reached, that of gradient descent where the sharpness passes
    2 / lr. reached: whether it did, early enough for a whole window; else the window is the last that there is.
    """
    rate = setting.adam_lr if name == "adam" else setting.lr
    shuffled = name == "shuffled"
    steps, every = (setting.shuffled_steps, setting.shuffled_every) if shuffled else (setting.steps, setting.every)
    done = parts.part(name, f"train {name}, recorded", lambda: _train(parts, name, x, y, steps, rate))
    run, model = open_run(parts.folder / f"{name}.zarr"), DigitsCnn()
    run.load(model, run.steps)
    looks = list(range(0, run.steps + 1, every))
    seen = parts.dataset(f"{name} looks", "losses and sharpness", lambda: _looks(run, model, x, y, looks))
    losses = seen["losses"].values
    reached = seen["eigenvalue"].values >= 2 / rate if until is None else losses.mean(1)[::every] <= until
    first = int(looks[int(np.argmax(reached))]) if reached.any() else run.steps - setting.window
    inside, first = first <= run.steps - setting.window, min(first, run.steps - setting.window)
    half, short = first + setting.window // 2, setting.adam_steps
    told = range(half - short if name == "adam" else first, half)
    given = parts.dataset(
        f"{name} matrix", "who changed whose loss", lambda: _told(run, model, x, y, told, short, setting.lead)
    )
    groups = parts.part(f"{name} groups", "who opposes whom", lambda: grouped(given["all"].values))
    brief = parts.part(f"{name} brief groups", "who opposes whom", lambda: grouped(given["brief"].values))["groups"]
    return {
        "ledger": done["ledger"], "first": first, "half": half, "brief": brief,
        "reached": bool(reached.any()) and inside,
        "last": first + setting.window, "losses": losses, "sharpness": seen["eigenvalue"], "vectors": seen["vector"],
        "matrix": given, "labels": y.numpy(), **groups,
    }  # fmt: skip


def _train(parts: SeedParts, name: str, x: Tensor, y: Tensor, steps: int, rate: float) -> dict[str, Any]:
    """Recorded to NAME.zarr; the ledger of the mean loss."""
    torch.manual_seed(parts.seed)
    model, store = DigitsCnn(), parts.folder / f"{name}.zarr"
    kind = torch.optim.Adam if name == "adam" else torch.optim.SGD
    batches = ((torch.arange(len(x)), x, y) for _ in range(steps))
    train_recorded(model, kind(model.parameters(), lr=rate), cross_entropy, batches, store, overwrite=True)
    return {"ledger": _ledger(open_run(store), model, cross_entropy, (x, y))}


def _ledger(run: Run, model: DigitsCnn, loss: Any, batch: tuple[Tensor, ...]) -> str:
    """Of the mean loss of some of the images that are trained on."""
    some = [t[:SHOWN] for t in batch]

    def mean_loss(m: Any) -> Tensor:  # measurements are computed in float64
        own = m.output.weight.dtype
        return loss(m, *(t.to(own) if t.is_floating_point() else t for t in some)).mean()[None]

    return str(attribute(run, model, mean_loss, loss=loss, keep=("example",), progress=False).check(TOLERANCE))


def _looks(run: Run, model: DigitsCnn, x: Tensor, y: Tensor, looks: Sequence[int]) -> xr.Dataset:
    """Losses of all images at every state (state, image), and the sharpest direction at some."""
    losses = evaluate(run, model, measure.loss(x, y)).values
    sharp = (
        curvature(run, model, cross_entropy, (x, y), looks, progress=False).isel(rank=0, drop=True).rename(state="look")
    )
    return sharp.assign(losses=(("state", "image"), losses), vector=sharp["vector"].astype("float32"))


def _told(run: Run, model: DigitsCnn, x: Tensor, y: Tensor, steps: range, brief: int, lead: int) -> xr.Dataset:
    """Who changed whose loss, (whose, who): all: summed over the steps; brief: over the last so many of them; largest: in
    the step in which the losses moved most. left: of each step, the share of the gross change that momentum from before
    the lead made; gap: what is missing of the change itself, over its gross size."""
    whole, short = np.zeros((2, len(x), len(x)))
    largest, left, gap, size, at = whole, [], [], -1.0, steps.start
    for move in moves(run, model, measure.loss(x, y), steps, loss=cross_entropy, lead=lead):
        whole += move.contributions
        if move.step >= steps.stop - brief:
            short += move.contributions
        left.append(float(np.abs(move.inherited).sum() / np.abs(move.change).sum()))
        gap.append(_gap(move))
        if np.abs(move.change).sum() > size:
            largest, size, at = move.contributions, float(np.abs(move.change).sum()), move.step
    axes = ("whose", "who")
    arrays = {"all": (axes, whole), "brief": (axes, short), "largest": (axes, largest)}
    return xr.Dataset({**arrays, "left": ("step", left), "gap": ("step", gap), "at": at}, {"step": list(steps)})


def _gap(move: Move) -> float:
    terms = move.contributions.sum(1) + move.decay + move.inherited + move.remainder
    return float(np.max(np.abs(terms - move.change) / np.abs(move.contributions).sum(1)))


def grouped(matrix: np.ndarray) -> dict[str, Any]:
    """Of a matrix of who changed whose loss: own contributions, how many pairs oppose, the strongest, and the groups."""
    helped = help_between(matrix)
    scores = opposing_pairs(matrix)[np.triu_indices(len(matrix), 1)]
    rows, columns = np.triu_indices(len(matrix), 1)
    top = np.argsort(-scores, kind="stable")[:10]
    return {
        "own": np.diag(helped).tolist(),
        "pairs": {
            "opposing": float((scores > 0).mean()),
            "strong": float((scores > 0.5).mean()),
            "largest": [[int(rows[k]), int(columns[k]), float(scores[k])] for k in top],
        },
        "groups": [
            {"first": g.first.tolist(), "second": g.second.tolist(), "strength": g.strength, "opposition": g.opposition}
            for g in opposing_groups(helped, GROUPS)
        ],
    }


def _projections(parts: SeedParts, seen: dict[str, Any], x: Tensor, y: Tensor) -> list[dict[str, float]]:
    """At the looks of the second half of the window: the gradient of each group's mean loss along the sharpest direction,
    and its length."""
    run, model = open_run(parts.folder / "sgd.zarr"), DigitsCnn()
    rows: list[dict[str, float]] = []
    if not seen["groups"]:
        return rows
    for look in seen["vectors"]["look"].values.tolist():
        if not seen["half"] <= look <= seen["last"]:
            continue
        run.load(model, look)
        along, row = seen["vectors"].sel(look=look).values, {"step": float(look)}
        for side in ("first", "second"):
            members = torch.tensor(seen["groups"][0][side])
            model.zero_grad()
            cross_entropy(model, x[members], y[members]).mean().backward()
            own = dict(model.named_parameters())
            gradients = [own[name].grad for name in run.groups]
            gradient = torch.cat([g.reshape(-1) for g in gradients if g is not None]).numpy()
            row[side], row[f"{side} length"] = float(gradient @ along), float(np.linalg.norm(gradient))
        rows.append(row)
    return rows


def _changes(seen: dict[str, Any], seed: int) -> dict[str, dict[int, float]]:
    """What is trained again: weights of examples, 0 for those left out. The groups, as many others drawn at random, and as
    many others alike in gradient norm."""
    if not seen["groups"]:
        return {"untouched": {}}
    members = np.concatenate([seen["groups"][0][side] for side in ("first", "second")]).astype(int)
    others = np.setdiff1d(np.arange(len(seen["labels"])), members)
    drawn = np.random.default_rng(seed).permutation(others)[: len(members)]
    alike = matched(np.array(seen["own"]), members)
    out = {"groups": members, "random": drawn, "matched": alike}
    return {
        "untouched": {},
        **{f"{name} left out": dict.fromkeys(map(int, which), 0.0) for name, which in out.items()},
        "groups down-weighted": dict.fromkeys(map(int, members), DOWN),
    }


def _again(
    setting: Setting, parts: SeedParts, first: int, name: str, weights: dict[int, float], x: Tensor, y: Tensor
) -> dict[str, Any]:
    """Trained again from the beginning of the window, recorded: the mean loss of what is trained on, at every state, its
    sharpness, and its ledger."""
    run, model, store = open_run(parts.folder / "sgd.zarr"), DigitsCnn(), parts.folder / f"{name}.zarr"
    left_out = [i for i, weight in weights.items() if weight == 0]
    change: Any = Drop(left_out) if left_out else Reweight(weights) if weights else []
    until = first + setting.retrain
    again = replay(
        run, first, change, model=model, loss=cross_entropy, store=store, until=until, overwrite=True, progress=False
    )
    kept = torch.tensor([i for i in range(len(x)) if i not in left_out])
    batch: tuple[Tensor, ...] = (x[kept], y[kept])
    loss: Any = cross_entropy
    if weights and not left_out:
        batch, loss = (*batch, torch.tensor([weights.get(i, 1.0) for i in range(len(x))])), weighted(cross_entropy)
    looks = range(0, again.steps + 1, setting.every)
    sharp = curvature(again, model, loss, batch, looks, progress=False)["eigenvalue"].isel(rank=0)
    return {
        "weights": {str(i): weight for i, weight in weights.items()},
        "states": [first + look for look in looks],
        "sharpness": sharp.values.tolist(),
        "losses": evaluate(again, model, lambda m: loss(m, *batch).mean()[None]).values[:, 0].tolist(),
        "ledger": _ledger(again, model, loss, batch),
    }


def _planted(setting: Setting, parts: SeedParts, brightness: float) -> dict[str, Any]:
    """A planted signal of this brightness, the groups found from the middle of training on, and how well they are it."""
    name = f"planted {brightness:g}"
    x, y, truth = planted(setting.planted_images, setting.planted, brightness, parts.seed)
    done = parts.part(
        name, f"train {name}, recorded", lambda: _train(parts, name, x, y, setting.planted_steps, setting.lr)
    )
    run, middle = open_run(parts.folder / f"{name}.zarr"), setting.planted_steps // 2
    told = range(middle, middle + setting.planted_window)

    def find() -> dict[str, Any]:
        matrix = _told(run, DigitsCnn(), x, y, told, 0, 0)["all"].values
        groups = grouped(matrix)["groups"]
        sides = (truth[0].tolist(), truth[1].tolist())
        quality = recovered(groups[0] if groups else {"first": [], "second": []}, sides)
        return {"brightness": brightness, **quality, "groups": groups[:1]}

    return {"ledger": done["ledger"], **parts.part(f"{name} groups", "who opposes whom", find)}
