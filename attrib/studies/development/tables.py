"""The seeds beside each other, as labelled arrays: what figures and claims are made of."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import xarray as xr

from ...development import clusters, settled
from ...phases import onset
from . import planted
from .networks import LOOKS, Network, Setting

Run = Mapping[str, Any]  # what `study_seed` gives
GRID = np.linspace(0, 1, 41)  # of a run
ACTS = ("frozen", "suppressed")


class Tables:
    """Of one network, over all seeds; between: what `across` gives of them."""

    def __init__(self, setting: Setting, network: Network, found: Sequence[Run], between: Mapping[str, Any]) -> None:
        self.setting, self.network, self.everyone = setting, network, found
        self.runs = [r[network.name] for r in found]
        self.seeds = [r["seed"] for r in found]
        self.groups = list(network.groups)
        self.across = between

    # how it developed

    def looks(self) -> xr.DataArray:
        """(look, seed, share of the run)."""
        values = [
            [np.interp(GRID, np.array(r["curve"]["states"]) / r["steps"], r["curve"]["looks"][look]) for r in self.runs]
            for look in LOOKS
        ]
        labels = {"look": list(LOOKS), "seed": self.seeds, "share of the run": GRID}
        return xr.DataArray(np.array(values), labels, name="looks")

    def onsets(self) -> xr.DataArray:
        """(of, seed): the step at which the held-out accuracy and loss break, and the steps of the run."""
        rows = [[r["curve"]["onset"][k] for r in self.runs] for k in ("accuracy", "loss")]
        labels = {"of": ["held-out accuracy", "held-out loss", "steps"], "seed": self.seeds}
        return xr.DataArray(np.array([*rows, [r["steps"] for r in self.runs]], dtype=float), labels, name="step")

    def breakthrough(self) -> np.ndarray:
        """(seed,): the largest share of the whole rise of the held-out accuracy that falls within a tenth of the run."""
        found = []
        for r in self.runs:
            states, right = np.array(r["curve"]["states"]), np.array(r["curve"]["looks"]["held-out accuracy"])
            later = np.interp(states + 0.1 * r["steps"], states, right)
            found.append((later - right).max() / max(right.max() - right.min(), 1e-9))
        return np.array(found)

    # what the layers did

    def vestiges(self) -> xr.DataArray:
        """(measure, group, seed): gross, net, height and what is left of it, of the held-out margin."""
        names = ("gross", "net", "height", "left", "vestigial")
        values = np.array([[r["vestiges"][n] for r in self.runs] for n in names], dtype=float).transpose(0, 2, 1)
        return xr.DataArray(values, {"measure": list(names), "group": self.groups, "seed": self.seeds}, name="vestiges")

    def running(self) -> xr.DataArray:
        """(group, seed, share of the run): what each group's updates have made of the held-out margin so far."""
        values = []
        for r in self.runs:
            sums = r["result"].timeline()[0].transpose("group", "update_step").values.cumsum(1)
            at = (np.arange(sums.shape[1]) + 1) / r["steps"]
            values.append([np.interp(GRID, at, row) for row in sums])
        labels = {"group": self.groups, "seed": self.seeds, "share of the run": GRID}
        return xr.DataArray(np.array(values).swapaxes(0, 1), labels, name="change of the margin so far")

    def ablated(self) -> xr.DataArray:
        """(to, group, seed): change of the held-out loss with a group put to zero, or back to its first values, in
        nats."""
        names = list(self.runs[0]["ablated"])
        values = np.array(
            [[np.array(r["ablated"][n])[:, LOOKS.index("held-out loss")] for r in self.runs] for n in names]
        )
        labels = {"to": names, "group": self.groups, "seed": self.seeds}
        return xr.DataArray(values.swapaxes(1, 2), labels, name="change of the loss (nats)")

    # windows

    def windows(self) -> xr.Dataset:
        """(act, group, window, seed): `loss`, change of the final held-out loss in nats; `accuracy` likewise; `shift`, of
        the onset of the held-out accuracy, as a share of the run, later is positive; NaN where the window begins after the
        untouched onset, or the changed run has not half of the untouched rise, and so no onset to speak of."""
        count = self.setting.windows
        values = np.full((3, len(ACTS), len(self.groups), count, len(self.runs)), np.nan)
        for s, run in enumerate(self.runs):
            given, names = np.array(run["windows"]["looks"]), run["windows"]["changes"]
            width = max(1, len(run["windows"]["states"]) // 20)
            begun = [
                onset(row[:, LOOKS.index("held-out accuracy")], width, steps=run["windows"]["states"]) for row in given
            ]
            risen = np.ptp(given[:, :, LOOKS.index("held-out accuracy")], axis=1)
            for a, act in enumerate(ACTS):
                for g, group in enumerate(self.groups):
                    for w, (first, _) in enumerate(pairwise(run["windows"]["edges"])):
                        at = names.index(f"{act} {group} {first}")
                        change = given[at, -1] - given[0, -1]
                        values[:2, a, g, w, s] = change[
                            [LOOKS.index("held-out loss"), LOOKS.index("held-out accuracy")]
                        ]
                        if first < begun[0] and risen[at] >= 0.5 * risen[0]:
                            values[2, a, g, w, s] = (begun[at] - begun[0]) / run["steps"]
        edges = np.linspace(0, 1, count + 1)
        labels = {
            "act": list(ACTS), "group": self.groups, "window": [f"{a:.2g} to {b:.2g}" for a, b in pairwise(edges)],
            "seed": self.seeds,
        }  # fmt: skip
        return xr.Dataset(
            {name: (list(labels), v) for name, v in zip(("loss", "accuracy", "shift"), values, strict=True)}, labels
        )

    # lines

    def barriers(self, name: str = "barrier") -> xr.DataArray:
        """(point, other): of the held-out loss, in nats; points are "seed: share of the run"."""
        points = self.across["points"]
        values = np.array(self.across[name])
        return xr.DataArray(values, {"point": points, "other": points}, name=f"{name} (nats)")

    def clusters(self) -> xr.DataArray:
        """(point,): of no barrier above the setting's height."""
        return clusters(self.barriers(), self.setting.height)

    def settled(self) -> np.ndarray:
        """(seed,): the share of the run from which on its checkpoints are in one cluster with its last one; clusters of the
        run by itself."""
        found = []
        for seed in self.seeds:
            own = [f"{seed}: {share:g}" for share in self.setting.checkpoints]
            labels = clusters(self.barriers().sel(point=own, other=own), self.setting.height)
            found.append(float(str(settled(labels)).split(": ")[1]))
        return np.array(found)

    def ends(self, name: str = "barrier") -> np.ndarray:
        """(pairs of seeds,): barriers (or gaps) between the last states."""
        points = [f"{seed}: {self.setting.checkpoints[-1]:g}" for seed in self.seeds]
        found: np.ndarray = self.barriers(name).sel(point=points, other=points).values[np.triu_indices(len(points), 1)]
        return found

    def along(self) -> np.ndarray:
        """(seed, checkpoint): barriers between each checkpoint and the last state of its run."""
        rows = []
        for seed in self.seeds:
            points = [f"{seed}: {share:g}" for share in self.setting.checkpoints]
            rows.append(self.barriers().sel(point=points, other=points[-1]).values)
        return np.array(rows)

    def branches(self) -> xr.DataArray | None:
        """(share, seed): barrier of the held-out loss between the end of a run and that of its branch; None without."""
        if not self.runs[0]["branches"]:
            return None
        values = np.array([[b["barrier"] for b in r["branches"]] for r in self.runs]).T
        return xr.DataArray(
            values, {"branched at": list(self.setting.branches), "seed": self.seeds}, name="barrier (nats)"
        )

    # causes

    def similar(self) -> xr.Dataset | None:
        """(query, pair): rank correlation of the contributions of the examples between two seeds; `chance` (draw, query,
        pair) with the examples shuffled; None for one seed."""
        seen, chance = self.across["similar"], self.across["shuffled"]
        if seen is None:
            return None
        rows, columns = np.triu_indices(len(self.seeds), 1)
        pairs = [f"{self.seeds[i]}, {self.seeds[j]}" for i, j in zip(rows, columns, strict=True)]
        return xr.Dataset(
            {
                "similar": (("query", "pair"), seen[:, rows, columns]),
                "chance": (("draw", "query", "pair"), chance[:, :, rows, columns]),
            },
            {"query": np.arange(len(seen)), "pair": pairs, "draw": np.arange(len(chance))},
        )

    def dropped(self) -> xr.DataArray:
        """(kind, of, case): what leaving examples out did to a log-probability, measured and by the account, in nats; a
        case
        is a seed and a query."""
        kinds, of = ("largest", "random"), ("measured", "accounted")
        values = [[[d[o] for r in self.runs for d in r["dropped"] if d["kind"] == k] for o in of] for k in kinds]
        cases = np.arange(len(values[0][0]))
        return xr.DataArray(
            np.array(values), {"kind": list(kinds), "of": list(of), "case": cases}, name="change (nats)"
        )


class Planted:
    """The planted layer, over all seeds."""

    def __init__(self, found: Sequence[Run]) -> None:
        self.runs, self.seeds = [r["planted"] for r in found], [r["seed"] for r in found]
        self.groups = list(planted.GROUPS)

    def running(self) -> xr.DataArray:
        """(group, seed, step): what each branch's updates have made of the mean signed output so far."""
        values = np.array([[r["running"][g] for r in self.runs] for g in self.groups])
        steps = np.arange(values.shape[-1]) + 1
        return xr.DataArray(values, {"group": self.groups, "seed": self.seeds, "step": steps}, name="change so far")

    def vestiges(self) -> xr.DataArray:
        """(measure, group, seed)."""
        names = ("gross", "net", "height", "left", "vestigial")
        values = np.array([[r["vestiges"][n] for r in self.runs] for n in names], dtype=float).transpose(0, 2, 1)
        return xr.DataArray(values, {"measure": list(names), "group": self.groups, "seed": self.seeds}, name="vestiges")

    def causes(self) -> xr.DataArray:
        """(change, at, seed): the mean signed output at the turn and at the end, over that of the untouched run;
        ablation at
        the end alone."""
        names = [n for n in self.runs[0]["frozen"] if n != "untouched"]
        whole = np.array([r["frozen"]["untouched"] for r in self.runs])
        frozen = np.array([[r["frozen"][n] for r in self.runs] for n in names]) / whole
        ablated = np.array([[[np.nan, r["ablated"][g]] for r in self.runs] for g in self.groups]) / whole + 1
        labels = {"at": ["turn", "end"], "seed": self.seeds}
        changes = [*(f"frozen: {n}" for n in names), *(f"ablated: {g}" for g in self.groups)]
        values = np.concatenate([frozen, ablated]).swapaxes(1, 2)
        return xr.DataArray(values, {"change": changes, **labels}, name="signed output, of the untouched")
