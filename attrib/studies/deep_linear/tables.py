"""The seeds beside each other, as labelled arrays: what figures and claims are made of."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import xarray as xr

from . import theory
from .data import ITEMS, branches, contrasts
from .recipe import ILLUSION, TOY_NAMES, Setting, effective

Run = Mapping[str, Any]  # what `study_seed` gives
MODES = TOY_NAMES[:4]
LOOKS = 60  # states at which the hidden layer is looked into


class Tables:
    def __init__(self, setting: Setting, found: Sequence[Run]) -> None:
        self.setting, self.runs = setting, found
        self.seeds = [run["seed"] for run in found]
        self.levels = [f"level {level}" for level in range(setting.depth)]

    # modes of the toy set

    def strengths(self, network: str) -> xr.DataArray:
        """(mode, seed, step): measured at every state."""
        rows = [run["results"][network].curve.values[: len(MODES)] for run in self.runs]
        return self._by_step(np.stack(rows, 1), "strength")

    def expected(self, network: str) -> xr.DataArray:
        """(mode, seed, step): the closed form, from the weights that the network started with."""
        return self._by_step(np.stack([self.closed(run, network) for run in self.runs], 1), "strength")

    def closed(self, run: Run, network: str) -> np.ndarray:
        """(mode, steps + 1): the closed form of every mode."""
        items, steps, eta = run["items"][network], np.arange(run["runs"][network].steps + 1), self.setting.eta
        if network == "shallow":
            return np.array([theory.shallow(s, 0.0, eta, steps) for s in items.s])
        starts = effective(run["runs"][network], items)
        return np.array([theory.deep(s, a0, eta, steps) for s, a0 in zip(items.s, starts, strict=True)])

    def _by_step(self, values: np.ndarray, name: str) -> xr.DataArray:
        steps = np.arange(values.shape[-1])
        return xr.DataArray(values, {"mode": list(MODES), "seed": self.seeds, "step": steps}, name=name)

    def half_rises(self, network: str) -> xr.DataArray:
        """(mode, seed, of): the step whose update takes a mode over half its final strength: in the network, by the discrete
        oracle, by the closed form; NaN where none does."""
        rows = []
        for run in self.runs:
            items, steps = run["items"][network], run["runs"][network].steps
            curves = run["results"][network].curve.values
            starts = effective(run["runs"][network], items)
            for k, (s, a0) in enumerate(zip(items.s, starts, strict=True)):
                oracle = theory.discrete(s, a0, self.setting.eta, steps)
                found = [theory.crossing(curve, s / 2) for curve in (curves[k], oracle)]
                rows.append([*found, theory.half_rise(s, a0, self.setting.eta)])
        count = len(self.runs[0]["items"][network].s)
        values = np.array(rows, dtype=float).reshape(len(self.runs), count, 3).transpose(1, 0, 2)
        names = list(MODES) if network != "tree" else [f"mode {k + 1}" for k in range(count)]
        kinds = ["network", "discrete oracle", "closed form"]
        return xr.DataArray(values, {"mode": names, "seed": self.seeds, "of": kinds}, name="half-rise (step)")

    def shares(self, network: str) -> xr.DataArray:
        """(mode, item, seed, of): of a mode's growth, what each item contributed, and v^2."""
        rows = []
        for run in self.runs:
            given = run["results"][network].by("example").values[: len(MODES)]
            rows.append(np.stack([given / given.sum(1, keepdims=True), run["items"][network].v.T ** 2], -1))
        labels = {"mode": list(MODES), "item": list(ITEMS), "seed": self.seeds, "of": ["contribution", "v^2"]}
        return xr.DataArray(np.stack(rows, 2), labels, name="share")

    def layers(self, network: str) -> xr.DataArray:
        """(mode, group, seed): of a mode's growth, what the gradients of each layer contributed, as a share."""
        rows = [run["results"][network].by("group").values[: len(MODES)] for run in self.runs]
        groups = self.runs[0]["results"][network].by("group")["group"].values
        values = np.stack([r / r.sum(1, keepdims=True) for r in rows], -1)
        return xr.DataArray(values, {"mode": list(MODES), "group": groups, "seed": self.seeds}, name="share")

    def grown(self, network: str, axis: str) -> xr.DataArray:
        """(mode, axis, step): of the first seed, contributions of "item" or "layer" to each mode, summed up to each step."""
        result = self.runs[0]["results"][network]
        names = {"item": "example", "layer": "group"}
        found = result.by("step", names[axis])[: len(MODES)].transpose("query", names[axis], "step").values.cumsum(-1)
        labels = list(ITEMS) if axis == "item" else [str(g).split(".")[0] for g in result.by("group")["group"].values]
        steps = np.arange(found.shape[-1]) + 1
        return xr.DataArray(found, {"mode": list(MODES), axis: labels, "step": steps}, name="strength")

    # the illusory correlation

    def illusion(self) -> xr.DataArray:
        """(network, seed, step): "a salmon can fly", in the deep and the shallow networks; the truth is 0. NaN beyond the
        steps of a network."""
        networks, at = ("aligned", "random", "shallow"), TOY_NAMES.index(ILLUSION)
        curves = [[run["results"][n].curve.values[at] for run in self.runs] for n in networks]
        length = max(len(c) for row in curves for c in row)
        values = [[np.pad(c, (0, length - len(c)), constant_values=np.nan) for c in row] for row in curves]
        labels = {"network": list(networks), "seed": self.seeds, "step": np.arange(length)}
        return xr.DataArray(np.array(values), labels, name=ILLUSION)

    def deceivers(self, run: Run, network: str = "aligned") -> xr.DataArray:
        """(step, group): contributions of the items to "a salmon can fly"."""
        found = run["results"][network].by("step", "example")[TOY_NAMES.index(ILLUSION)]
        return xr.DataArray(found.values, {"step": found["step"].values, "group": list(ITEMS)}, name="contribution")

    # the tree

    def separations(self) -> xr.DataArray:
        """(level, seed, step): mean distance in the hidden layer between items that part at a level, of the last."""
        parted = branches(self.setting.depth)
        rows = []
        for run in self.runs:
            states = self.looks
            far = np.stack([self.distances(run, state) for state in states])
            rows.append(np.stack([far[:, parted == level].mean(1) for level in range(self.setting.depth - 1)]))
        values = np.stack(rows, 1)
        labels = {"level": self.levels[:-1], "seed": self.seeds, "step": self.looks}
        return xr.DataArray(values / values[..., -1:], labels, name="distance, of the last")

    @property
    def looks(self) -> np.ndarray:
        return np.unique(np.linspace(0, self.runs[0]["runs"]["tree"].steps, LOOKS).astype(int))

    def distances(self, run: Run, state: int) -> np.ndarray:
        """(items, items): between the items' vectors in the hidden layer at a state."""
        hidden = run["runs"]["tree"].parameters(int(state))["hidden.weight"].numpy().T
        found: np.ndarray = np.linalg.norm(hidden[:, None] - hidden[None], axis=-1)
        return found

    def by_level(self) -> xr.DataArray:
        """(level, seed): half-rise of the modes of a level, their mean step; NaN where one did not rise. A mode is of
        the level whose contrasts between branches it overlaps with most."""
        found = self.half_rises("tree").sel(of="network")
        rows = []
        for k, run in enumerate(self.runs):
            overlaps = [np.square(level.T @ run["items"]["tree"].v).sum(0) for level in contrasts(self.setting.depth)]
            own = np.argmax(overlaps, axis=0)
            half = found.values[:, k]
            rows.append(
                [half[own == level].mean() if (own == level).any() else np.nan for level in range(len(overlaps))]
            )
        return xr.DataArray(np.array(rows).T, {"level": self.levels, "seed": self.seeds}, name="half-rise (step)")

    def between(self, run: Run) -> list[int]:
        """A state at which the modes of each level from the second on are learned, those of the next not; the last."""
        half = self.by_level().sel(seed=run["seed"]).values
        steps = run["runs"]["tree"].steps
        halves = np.where(np.isfinite(half), half, steps)
        return [*(int((a + b) / 2) for a, b in pairwise(halves[1:])), steps]

    def clusters(self, run: Run) -> list[bool]:
        """For each state of `between`, whether the hidden layer, clustered, falls into the branches of its level."""
        from scipy.cluster.hierarchy import fcluster, linkage
        from scipy.spatial.distance import squareform

        parted, found = branches(self.setting.depth), []
        for level, state in enumerate(self.between(run), start=1):
            tree = linkage(squareform(self.distances(run, state), checks=False), "average")
            labels = fcluster(tree, 2**level, "maxclust")
            found.append(bool(np.array_equal(labels[:, None] == labels[None], parted >= level)))
        return found

    # the category

    def overlaps(self) -> xr.DataArray:
        """(size, of, draw, snr): squared overlap with the planted category."""
        rows = [row for run in self.runs for row in run["category"]]
        sizes = [count for count, _ in self.setting.sizes]
        values = [[[row[kind] for row in rows if row["count"] == n] for kind in ("data", "network")] for n in sizes]
        array = np.array(values)
        labels = {"size": sizes, "of": ["data", "network"], "draw": np.arange(array.shape[2])}
        return xr.DataArray(array, {**labels, "signal to noise": list(self.setting.snr)}, name="squared overlap")
