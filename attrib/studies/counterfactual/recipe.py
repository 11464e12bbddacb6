"""Everything done with one seed, all in float64.

1. Digits with SGD and AdamW, trainings of several lengths; modular addition before and after it is grokked: the examples
   that accounted most for a held-out prediction, left out, and random sets of as many.
2. Gradient descent at the edge of stability: two groups of images that oppose each other in a spike of the loss, and the
   spike without either of them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import attrib
from attrib.intervention import Drop

from .. import digits, frame, modular
from ..parts import SeedParts
from ..recipe import cross_entropy, train_recorded

TOLERANCE = 1e-9  # float64, of the gross size
SUMS = "sums"
SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=1e-3)
ADAMW = partial(torch.optim.AdamW, lr=3e-3, weight_decay=1e-2)
NETWORKS = {
    f"digits, {name}, {activation.__name__}": (build, activation)
    for name, build in (("SGD", SGD), ("AdamW", ADAMW))
    for activation in (nn.GELU, nn.ReLU)
}


@dataclass(frozen=True, kw_only=True)
class Setting(frame.Setting):
    """images, batch: of digits. lengths: steps of the trainings on them; sums: of those on sums modulo p. queries: held-out
    predictions; dropped: examples that are left out; draws: random sets of as many. edge_images, edge_steps: of gradient
    descent at the edge of stability; near: states round its spike; side: images of either group."""

    networks: tuple[str, ...] = tuple(NETWORKS)
    images: int = 500
    batch: int = 50
    lengths: tuple[int, ...] = (10, 50, 200)
    p: int = 31
    sums: tuple[int, ...] = (300, 1500)
    queries: int = 4
    dropped: int = 20
    draws: int = 40
    edge_images: int = 500
    edge_steps: int = 180
    near: int = 10
    side: int = 40


_ABOUT = (
    "digits with SGD and AdamW, smooth and with kinks; sums before and after grokking; gradient descent at its edge"
)
SETTINGS = {
    "quick": Setting(name="quick", about=_ABOUT, seeds=2),
    "toy": Setting(
        name="toy", about=f"{_ABOUT}; few images and steps: to see that everything runs, not to learn from", seeds=1,
        networks=tuple(NETWORKS)[1:3], images=60, batch=20, lengths=(3, 9), p=7, sums=(4, 8), queries=1, dropped=4, draws=4,
        edge_images=60, edge_steps=40, near=4, side=5,
    ),
}  # fmt: skip


class Training(NamedTuple):
    """build, optimizer: of the model, of its parameters. batches: ids into x and y, of every step. queries: held-out ids.
    lengths: of what is asked about."""

    build: Callable[[], nn.Module]
    optimizer: Callable[[Any], torch.optim.Optimizer]
    batches: Sequence[Tensor]
    x: Tensor
    y: Tensor
    queries: Tensor
    lengths: tuple[int, ...] = ()

    def recorded(self, store: Path, seed: int) -> tuple[attrib.Run, nn.Module]:
        """In float64."""
        torch.manual_seed(seed)
        model = self.build().double()
        steps = ((ids, self.x[ids], self.y[ids]) for ids in self.batches)
        train_recorded(model, self.optimizer(model.parameters()), cross_entropy, steps, store, overwrite=True)
        return attrib.open_run(store), model


def _mlp(activation: Callable[[], nn.Module]) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 40), activation(), nn.Linear(40, 10))


def trainings(s: Setting, seed: int) -> dict[str, Training]:
    data, generator = digits.load(s.images, seed), torch.Generator().manual_seed(seed)
    batches: list[Tensor] = []
    while len(batches) < s.lengths[-1]:
        batches += data.train[torch.randperm(s.images, generator=generator)].split(s.batch)
    images = data.x.double(), data.y, data.test[: s.queries], s.lengths
    found = {
        name: Training(partial(_mlp, NETWORKS[name][1]), NETWORKS[name][0], batches, *images) for name in s.networks
    }
    pairs, build = modular.ordered_pairs(s.p, 0.5, seed), partial(modular.PairMlp, s.p)
    adamw = partial(torch.optim.AdamW, lr=0.01, weight_decay=1.0, betas=(0.9, 0.98))
    some = pairs.test[:: len(pairs.test) // s.queries][: s.queries]
    found[SUMS] = Training(build, adamw, [pairs.train] * s.sums[-1], pairs.x, pairs.y, some, s.sums)
    return found


def study_seed(s: Setting, parts: SeedParts) -> dict[str, Any]:
    """JSON: of every training that is asked about, and of the spike."""
    asked = []
    for name, training in trainings(s, parts.seed).items():
        for length in training.lengths:
            key = f"{name}, {length} steps"
            work = partial(ask, s, parts, training._replace(batches=training.batches[:length]), key)
            asked.append({"network": name, "steps": length, **parts.part(key, f"{key}: leave examples out", work)})
    done = parts.part("spike", "opposing groups in a spike", lambda: spike(s, parts))
    return {"seed": parts.seed, "asked": asked, "spike": done}


def _call(what: Callable[..., Any], *runs: Any, **options: Any) -> Any:
    return what(*runs, loss=cross_entropy, progress=False, **options)


def ask(s: Setting, parts: SeedParts, t: Training, key: str) -> dict[str, Any]:
    """How well scores foretell what random sets do; and for every query what becomes of it without its largest examples."""
    run, model = t.recorded(parts.folder / f"{key}.zarr", parts.seed)
    measurement = attrib.measure.log_prob(t.x[t.queries], t.y[t.queries])
    asked, rows, causes = partial(_call, model=model, measurement=measurement), [], {}
    result, influence = asked(attrib.attribute, run, keep=["example"]), asked(attrib.influence, run, keep=["example"])
    influence.check()
    subsets = attrib.random_subsets(run, s.dropped / len(run.examples), s.draws, parts.seed)
    outcomes = asked(attrib.retrain_subsets, run, subsets)
    given = result.by("example")
    for q, order in enumerate(np.argsort(-given.values, axis=1, kind="stable")):
        top = given["example"].values[order[: s.dropped]]
        place = parts.folder / f"{key} without.zarr"
        changed = _call(attrib.replay, run, 0, Drop(top.tolist()), model=model, store=place, overwrite=True)
        why = partial(asked, attrib.difference, run, changed, measurement=measurement.select([q]), keep=["example"])
        reaction = why(via="reaction")
        gone = float(reaction.by("example").sel(example=top).sum())
        rows.append({
            "accounted": -float(given[q].sel(example=top).sum()),
            "predicted": float((influence.predict([top])[0] - influence.final)[q]),
            "gone": gone, "reaction": float(reaction.by()[0]) - gone,
            "measured": float(reaction.change[0]), "residual": float(reaction.residual[0]),
        })  # fmt: skip
        if q == 0:
            cause = why(via="cause")
            causes = {k: float(getattr(cause, k)[0]) for k in ("change", "residual", "cancellation")}
    scores = {"accounting": given, "influence": -influence.without()}
    return {
        "rows": rows, "causes": causes, "held out": float(result.final.mean()), "growth": float(influence.growth.max()),
        "ledger": str(result.check(TOLERANCE)),
        "lds": {name: float(attrib.lds(score, None, outcomes)["mean"]) for name, score in scores.items()},
    }  # fmt: skip


GROUPS = ("first", "second", "random", "others")
CHANGES = ["untouched", *(f"without {group}" for group in GROUPS[:3])]


def spike(s: Setting, parts: SeedParts) -> dict[str, Any]:
    """Gradient descent past its first spike; the groups at either end of the direction in which most is done to each other's
    losses in its rise; and again without either of them, or as many at random."""
    data, everyone = digits.load(s.edge_images, parts.seed), torch.arange(s.edge_images)
    x, y, sgd = data.x[data.train].double(), data.y[data.train], partial(torch.optim.SGD, lr=0.1)
    edge = Training(digits.DigitsCnn, sgd, [everyone] * s.edge_steps, x, y, everyone)
    (run, model), losses = edge.recorded(parts.folder / "edge.zarr", parts.seed), attrib.measure.loss(x, y)
    foot, peak = steepest(attrib.evaluate(run, model, losses).mean("query").values, s.near)
    moved = attrib.moves(run, model, losses, range(foot, peak), loss=cross_entropy)
    whose = np.sum([m.contributions for m in moved], axis=0)  # whose loss, by whom
    values, vectors = np.linalg.eigh(-(whose + whose.T) / 2)
    order = np.argsort(vectors[:, np.argmax(values)], kind="stable")
    rest = np.random.default_rng(parts.seed).permutation(order[s.side : -s.side])
    members = (order[: s.side], order[len(order) - s.side :], rest[: s.side], rest[s.side :])

    def means(m: Any) -> Tensor:
        found = cross_entropy(m, x, y)
        return torch.stack([found[torch.from_numpy(g)].mean() for g in members])

    begin, until = max(0, foot - s.near), min(run.steps, peak + s.near)
    changes = {f"without {name}": Drop(ids.tolist()) for name, ids in zip(GROUPS[:3], members, strict=False)}
    asked = partial(_call, model=model, measurement=means)
    seen = asked(attrib.what_if, run, changes, states=range(begin, until + 1), start=begin)
    terms, again = [], partial(_call, attrib.replay, run, begin, model=model, until=peak, overwrite=True)
    for name, change in changes.items():
        changed = again(change, store=parts.folder / f"edge {name}.zarr")
        found = asked(attrib.difference, run, changed, via="reaction", keep=["example"]).select([len(members) - 1])
        terms.append([*(float(found.by("example").sel(example=g).sum()) for g in members), float(found.residual[0])])
    return {
        "begin": begin, "foot": foot, "peak": peak, "losses": seen.values.tolist(), "terms": terms,
        "digits": [np.bincount(y[g], minlength=10).tolist() for g in members[:2]],
        "whose": [[float(whose[np.ix_(a, b)].mean(0).sum()) for b in members] for a in members],
    }  # fmt: skip


def steepest(curve: np.ndarray, width: int) -> tuple[int, int]:
    """The states, at most `width` apart, between which a curve rises most."""
    pairs = [(a, b) for b in range(1, len(curve)) for a in range(max(0, b - width), b)]
    return max(pairs, key=lambda ends: curve[ends[1]] - curve[ends[0]])
