"""Everything done with one seed: networks trained, recorded, and the strength of each mode explained.

The loss is half the squared error summed over the features of an item. Its mean over the N items, at a learning rate of
N eta, is the sum over items at eta that the theory has. All in float64.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...attribute import attribute
from ...measure import Measurement
from ...path import GaussLegendre, Secant
from ...result import Result, open_result
from ...run import Run, open_run
from .. import frame
from ..parts import SeedParts
from ..recipe import train_recorded
from .data import FEATURES, ITEMS, Items, category, contrasts, toy, tree, tree_items
from .theory import eigenvalues

TOLERANCE = 1e-9  # float64, of the gross size
ILLUSION = "a salmon can fly"
TOY_NAMES = ("living", "animal or plant", "canary or salmon", "oak or rose", ILLUSION)


@dataclass(frozen=True, kw_only=True)
class Setting(frame.Setting):
    """eta: rate. a0: strength of every mode of the aligned network at the start; scale: standard deviation of the weights of
    the others. width: of the hidden layer. steps, tree_steps: of training. depth, flip: of the tree; features: that the
    network learns of it; sampled: that its correlations are estimated from. sizes: (count, size of the category); snr:
    signal to noise; q: chance of a feature outside; draws: of the noise."""

    eta: float = 0.01
    a0: float = 1e-4
    scale: float = 1e-3
    width: int = 16
    steps: int = 700
    tree_steps: int = 1100
    depth: int = 4
    flip: float = 0.15
    features: int = 200
    sampled: int = 20_000
    sizes: tuple[tuple[int, int], ...] = ((100, 20), (400, 40))
    snr: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0, 4.0)
    q: float = 0.2
    draws: int = 3


_ABOUT = "four items with seven features; a tree of 8 items; a category in noise; depth 2 and depth 1, float64"
SETTINGS = {
    "quick": Setting(name="quick", about=_ABOUT, seeds=5),
    "toy": Setting(
        name="toy",
        about=f"{_ABOUT}; few and long steps: to see that everything runs, not to learn from",
        seeds=1,
        eta=0.04,
        steps=180,
        tree_steps=280,
        features=40,
        sampled=2000,
        sizes=((60, 15),),
        snr=(0.5, 2.0, 4.0),
        draws=1,
    ),
}


class DeepLinear(nn.Module):
    """y = W2 W1 x, from weights that are handed in: hidden (H, items), output (features, H)."""

    def __init__(self, hidden: np.ndarray, output: np.ndarray) -> None:
        super().__init__()
        self.hidden, self.output = (_linear(w) for w in (hidden, output))

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.hidden(x))

    def product(self) -> Tensor:
        return self.output.weight @ self.hidden.weight


class Shallow(nn.Module):
    """y = W x, from W = 0, (features, items)."""

    def __init__(self, features: int, items: int) -> None:
        super().__init__()
        self.output = _linear(np.zeros((features, items)))

    def forward(self, x: Tensor) -> Tensor:
        return self.output(x)

    def product(self) -> Tensor:
        return self.output.weight


def _linear(weight: np.ndarray) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=torch.float64)
    made.weight = nn.Parameter(torch.from_numpy(np.ascontiguousarray(weight)))
    return made


def squared_error(model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    """(B,): half the squared error of each item."""
    return 0.5 * (y - model(x)).square().sum(1)


def strengths(u: np.ndarray, v: np.ndarray, names: Sequence[str]) -> Measurement:
    """u_q^T W v_q for each column q of u (features, Q) and v (items, Q), W being the product of the layers."""
    rows = torch.from_numpy(u.T.copy()), torch.from_numpy(v.T.copy())
    return Measurement(_bilinear, rows, "strength", "", tuple(names))


def _bilinear(model: Any, u: Tensor, v: Tensor) -> Tensor:
    return ((u @ model.product()) * v).sum(1)


def study_seed(setting: Setting, parts: SeedParts) -> dict[str, Any]:
    """All parts of a seed: JSON, and under "results" and "runs" what was attributed and recorded."""
    made = networks(setting, parts.seed)
    found: dict[str, Any] = {"seed": parts.seed, "results": {}, "runs": {}, "ledgers": {}}
    for name, (items, model, measurement, steps) in made.items():
        work = partial(_explained, setting, parts, name, items, model, measurement, steps)
        done = parts.part(name, f"the {name} network", work)
        found["ledgers"][name] = done["ledger"]
        found["results"][name] = Result(open_result(parts.folder / f"{name} result.zarr").dataset.load())
        found["runs"][name] = open_run(parts.folder / f"{name}.zarr")
    items, model, measurement, _ = made["aligned"]
    found["paths"] = parts.part(
        "paths", "the secant and the path integral", lambda: _paths(found["runs"]["aligned"], model, measurement)
    )
    found["spectrum"] = parts.part("spectrum", "the tree's correlations", lambda: spectrum(setting, parts.seed))
    found["category"] = parts.part("category", "a category in noise", lambda: simulate(setting, parts.seed))
    found["items"] = {name: items for name, (items, *_) in made.items()}
    return found


def networks(setting: Setting, seed: int) -> dict[str, tuple[Items, nn.Module, Measurement, int]]:
    """By name: what is learned, the untrained network, what is measured, and the steps it is trained."""
    rng = np.random.default_rng(seed)
    four = toy()
    fly, salmon = (
        np.eye(len(FEATURES))[:, [list(FEATURES).index("Fly")]],
        np.eye(len(ITEMS))[:, [ITEMS.index("Salmon")]],
    )
    asked = strengths(np.hstack([four.u, fly]), np.hstack([four.v, salmon]), TOY_NAMES)
    between, _ = np.linalg.qr(rng.normal(size=(setting.width, len(four.s))))
    root = np.sqrt(setting.a0)
    aligned = DeepLinear(root * between @ four.v.T, root * four.u @ between.T)
    branched = tree_items(tree(setting.depth, setting.flip, setting.sampled, rng), setting.features)
    modes = strengths(branched.u, branched.v, [f"mode {k + 1}" for k in range(len(branched.s))])
    return {
        "aligned": (four, aligned, asked, setting.steps),
        "random": (four, _small(setting, four, rng), asked, 2 * setting.steps),
        "shallow": (four, Shallow(*four.y.shape), asked, setting.steps),
        "tree": (branched, _small(setting, branched, rng), modes, setting.tree_steps),
    }


def _small(setting: Setting, items: Items, rng: np.random.Generator) -> DeepLinear:
    features, count = items.y.shape
    shapes = (setting.width, count), (features, setting.width)
    return DeepLinear(*(setting.scale * rng.normal(size=shape) for shape in shapes))


def _explained(
    setting: Setting, parts: SeedParts, name: str, items: Items, model: nn.Module, measurement: Measurement, steps: int
) -> dict[str, Any]:
    """Train, recorded to NAME.zarr, and attribute, saved to NAME result.zarr."""
    (x, y), where = items.batch, parts.folder / f"{name}.zarr"
    optimizer = torch.optim.SGD(model.parameters(), lr=setting.eta * len(x))
    batches = ((torch.arange(len(x)), x, y) for _ in range(steps))
    train_recorded(model, optimizer, squared_error, batches, where, overwrite=True)
    keep = ("step", "example", "group")
    result = attribute(open_run(where), model, measurement, loss=squared_error, keep=keep)
    ledger = result.check(TOLERANCE)
    result.save(parts.folder / f"{name} result.zarr", overwrite=True)
    return {"ledger": str(ledger)}


def _paths(run: Run, model: nn.Module, measurement: Measurement) -> dict[str, float]:
    """Largest difference of any contribution between one secant and the path integral, over the largest contribution."""
    run.load(model, run.steps)
    found = [
        attribute(
            run, model, measurement, loss=squared_error, path=path, keep=("step", "example", "group"), progress=False
        )
        for path in (Secant(), GaussLegendre(4))
    ]
    secant, integral = (r.by("step", "example", "group").values for r in found)
    return {"difference": float(np.abs(secant - integral).max() / np.abs(integral).max())}


def effective(run: Run, items: Items) -> np.ndarray:
    """(K,): the strength a0 of each mode that grows from a network's first weights: of u^T W2 and W1 v the half sum."""
    first = run.parameters(0)
    into, out = first["hidden.weight"].numpy() @ items.v, first["output.weight"].numpy().T @ items.u
    found: np.ndarray = np.square((into + out) / 2).sum(0)
    return found


def spectrum(setting: Setting, seed: int) -> list[dict[str, Any]]:
    """Of each level: the eigenvalue by theory, estimated along its known eigenvectors with the standard error, and the
    sample's own eigenvalues."""
    values = tree(setting.depth, setting.flip, setting.sampled, np.random.default_rng(seed))
    own = np.linalg.eigvalsh(values.T @ values / len(values))[::-1]
    rows, begin = [], 0
    for expected, vectors in zip(eigenvalues(setting.depth, setting.flip), contrasts(setting.depth), strict=True):
        squares = np.square(values @ vectors).mean(1)
        count = vectors.shape[1]
        rows.append({
            "theory": float(expected),
            "measured": float(squares.mean()),
            "error": float(squares.std(ddof=1) / np.sqrt(len(squares))),
            "sample": own[begin : begin + count].tolist(),
        })  # fmt: skip
        begin += count
    return rows


def simulate(setting: Setting, seed: int) -> list[dict[str, Any]]:
    """Squared overlap with the planted category, by size and signal to noise: of the first mode of the data, and of what a
    network has learned when it is half as large as that mode. A row per size and draw."""
    rows = []
    for count, size in setting.sizes:
        for draw in range(setting.draws):
            rng = np.random.default_rng([seed, count, draw])
            planted = np.zeros(count)
            planted[:size] = 1 / np.sqrt(size)
            found = []
            for snr in setting.snr:
                y = category(count, size, snr, setting.q, rng)
                _, s, vt = np.linalg.svd(y, full_matrices=False)
                found.append([float((vt[0] @ planted) ** 2), float((first_learned(y, s[0], rng) @ planted) ** 2)])
            rows.append({"count": count, "data": [f[0] for f in found], "network": [f[1] for f in found]})
    return rows


def first_learned(y: np.ndarray, largest: float, rng: np.random.Generator, rate: float = 0.05) -> np.ndarray:
    """(items,): the leading input direction of a network of eight hidden units when its product is half as large as the
    first mode; trained on y (features, items) from small weights."""
    w1, w2 = (1e-3 * rng.normal(size=shape) / np.sqrt(max(y.shape)) for shape in ((8, y.shape[1]), (y.shape[0], 8)))
    while np.sqrt(((w1 @ w1.T) * (w2.T @ w2)).sum()) < largest / 2:  # the norm of w2 w1
        back, out = w2.T @ y - (w2.T @ w2) @ w1, y @ w1.T - w2 @ (w1 @ w1.T)
        w1, w2 = w1 + rate * back, w2 + rate * out
    _, r = np.linalg.qr(w2)
    found: np.ndarray = np.linalg.svd(r @ w1, full_matrices=False)[2][0]
    return found
