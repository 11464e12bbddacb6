"""The seeds beside each other, as labelled arrays: what figures and claims are made of."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from .measures import MEASURES, controls, matched, movement, unrest
from .setting import Setting

Run = Mapping[str, Any]  # what `study_seed` gives
NAMES = ("sgd", "shuffled", "adam")


class Tables:
    """`runs`: of the seeds in which gradient descent came to the edge of stability and groups were found; `failed`: the
    others."""

    def __init__(self, setting: Setting, found: Sequence[Run]) -> None:
        self.setting, self.everyone = setting, found
        self.runs = [run for run in found if run["sgd"]["groups"] and run["sgd"]["reached"]]
        self.failed = [run["seed"] for run in found if not (run["sgd"]["groups"] and run["sgd"]["reached"])]
        self.seeds = [run["seed"] for run in self.runs]

    def sharpness(self, name: str) -> xr.DataArray:
        """(seed, step): the largest eigenvalue of the Hessian of the mean loss of a run."""
        looks = self.everyone[0][name]["sharpness"]["look"].values
        return self._curves([r[name]["sharpness"].values for r in self.everyone], looks, "sharpness")

    def losses(self, name: str) -> xr.DataArray:
        """(seed, step): mean loss of the images that are trained on, in nats."""
        values = [r[name]["losses"].mean(1) for r in self.everyone]
        return self._curves(values, np.arange(len(values[0])), "mean loss (nats)")

    def _curves(self, values: list[np.ndarray], steps: np.ndarray, name: str) -> xr.DataArray:
        return xr.DataArray(np.array(values), {"seed": [r["seed"] for r in self.everyone], "step": steps}, name=name)

    def sides(self, run: Run, name: str = "sgd", groups: str = "groups") -> tuple[np.ndarray, np.ndarray]:
        group = run[name][groups][0]
        return np.array(group["first"]), np.array(group["second"])

    def window(self, run: Run, name: str = "sgd") -> np.ndarray:
        """(states, N): losses in the second half of the window."""
        found: np.ndarray = run[name]["losses"][run[name]["half"] : run[name]["last"] + 1]
        return found

    def movement(self, name: str = "sgd", groups: str = "groups") -> xr.DataArray:
        """(measure, seed): of the groups, in the second half of the window; NaN where there are none. groups: "brief" for
        those found from as many steps as Adam's are."""
        rows = [
            movement(self.window(r, name), *self.sides(r, name, groups)) if r[name][groups] else {} for r in self.runs
        ]
        values = np.array([[row.get(m, np.nan) for row in rows] for m in MEASURES])
        return xr.DataArray(values, {"measure": list(MEASURES), "seed": self.seeds}, name="movement")

    def alike(self) -> np.ndarray:
        """(seed,): mean own contribution of the matched others over that of the members; 1 where they are alike."""
        found = []
        for r in self.runs:
            own, members = np.array(r["sgd"]["own"]), np.concatenate(self.sides(r))
            found.append(float(own[matched(own, members)].mean() / own[members].mean()))
        return np.array(found)

    def controls(self, run: Run) -> dict[str, xr.DataArray]:
        """Name -> (measure, draw): of other groups of the same sizes in the second half of the window."""
        found = controls(self.window(run), *self.sides(run), np.array(run["sgd"]["own"]), seed=run["seed"])
        made = {}
        for name, rows in found.items():
            if rows:
                values = np.array([list(row.values()) for row in rows]).T
                made[name] = xr.DataArray(values, {"measure": list(rows[0]), "draw": np.arange(len(rows))}, name=name)
        return made

    def by_group(self, run: Run, name: str = "sgd") -> xr.DataArray:
        """(group, step): mean losses of both groups and of all images, in the window."""
        seen, (first, second) = run[name], self.sides(run, name)
        at = np.arange(seen["first"], seen["last"] + 1)
        losses = seen["losses"][at]
        rows = [losses[:, first].mean(1), losses[:, second].mean(1), losses.mean(1)]
        labels = {"group": ["first group", "second group", "all images"], "step": at}
        return xr.DataArray(np.array(rows), labels, name="mean loss (nats)")

    def matrix(self, run: Run, most: int = 40) -> xr.DataArray:
        """(whose, who): in the step in which the losses moved most, by the strongest images of the groups, by
        digit, and others; numbers are positions, the groups' bounds are in the attributes."""
        labels = run["sgd"]["labels"]
        first, second = (side[:most][np.argsort(labels[side[:most]], kind="stable")] for side in self.sides(run))
        rest = np.setdiff1d(np.arange(len(labels)), np.concatenate(self.sides(run)))[:most]
        order = np.concatenate([first, second, rest])
        values = run["sgd"]["matrix"]["largest"].values[np.ix_(order, order)]
        bounds = np.cumsum([len(first), len(second), len(rest)]).tolist()
        return xr.DataArray(
            values, {"whose": order, "who": order}, name="change of a loss (nats)", attrs={"bounds": bounds}
        )

    def projections(self) -> xr.DataArray:
        """(group, seed, look): the gradient of each group's mean loss along the sharpest direction, over its length."""
        rows = [r["projections"] for r in self.runs]
        count = min(map(len, rows))
        values = [
            [[p[side] / p[f"{side} length"] for p in row[:count]] for row in rows] for side in ("first", "second")
        ]
        labels = {"group": ["first group", "second group"], "seed": self.seeds, "look": np.arange(count)}
        return xr.DataArray(np.array(values), labels, name="cosine")

    def again(self) -> dict[str, xr.DataArray]:
        """What was trained again, by its name, steps counted from the beginning of the window: sharpness (change, seed,
        step) and mean loss (change, seed, step) of what is trained on; ascent and spikes (change, seed) of that loss."""
        names = list(self.runs[0]["trials"])
        labels = {"change": names, "seed": self.seeds}
        sharp = np.array([[r["trials"][n]["sharpness"] for r in self.runs] for n in names])
        losses = np.array([[r["trials"][n]["losses"] for r in self.runs] for n in names])
        looks = np.array(self.runs[0]["trials"][names[0]]["states"]) - self.runs[0]["sgd"]["first"]
        moved = {key: np.array([[unrest(v)[key] for v in row] for row in losses]) for key in ("ascent", "spikes")}
        steps = np.arange(losses.shape[-1])
        return {
            "sharpness": xr.DataArray(sharp, {**labels, "step": looks}, name="sharpness"),
            "loss": xr.DataArray(losses, {**labels, "step": steps}, name="mean loss (nats)"),
            **{key: xr.DataArray(v, labels, name=key) for key, v in moved.items()},
        }

    def planted(self) -> xr.DataArray:
        """(brightness, measure, seed): precision, recall and sides of what was found of the planted signal."""
        kinds = ("precision", "recall", "sides")
        values = np.array([[[p[k] for k in kinds] for p in r["planted"]] for r in self.everyone]).transpose(1, 2, 0)
        seeds = [r["seed"] for r in self.everyone]
        labels = {"brightness": list(self.setting.brightness), "measure": list(kinds), "seed": seeds}
        return xr.DataArray(values, labels, name="share")
