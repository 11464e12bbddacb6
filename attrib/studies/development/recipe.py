"""Everything done with one seed, network by network, and what is done between the seeds.

1. Trained, recorded, looked at along the way: curves and their onset.
2. Explained by layer and example: what each layer built up and tore down.
3. Ablated at the end; frozen, and suppressed, in every window of the run.
4. Branched: the same run, gone on with other batches from some state; is it in the same basin at the end?
5. The examples that raised a prediction most, left out: the measured change beside the accounted one.
6. A planted vestigial layer.
Between the seeds: lines between all checkpoints, and whether a prediction owes to the same examples.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from ...attribute import attribute
from ...development import ablate, connectivity, evaluate, similarity, vestiges, what_if
from ...intervention import Drop, Freeze, Intervention, Suppress, replay
from ...phases import onset
from ...result import Result, open_result
from ...run import Run, open_run
from ..parts import Parts, SeedParts
from ..recipe import cross_entropy
from . import planted
from .networks import LOOKS, Network, Setting

TOLERANCE = 1e-5  # float32 replay of float32 training, of the gross size
SHUFFLES = 20
TURN = 0.5  # of the planted network's steps


@dataclass(frozen=True)
class OtherBatches(Intervention):
    """From the start of the replay on, batches of the same size drawn anew."""

    run: Run
    x: Tensor
    y: Tensor
    seed: int

    def batch(self, step: int, batch: Any) -> Any:
        size = len(batch[0])
        rng = np.random.default_rng([self.seed, step])
        ids = np.sort(rng.choice(self.run.examples, size, replace=False))
        return ids, (self.x[torch.from_numpy(ids)], self.y[torch.from_numpy(ids)])

    def describe(self) -> dict[str, Any]:
        return {"kind": "OtherBatches", "seed": self.seed}


def study_seed(setting: Setting, parts: SeedParts) -> dict[str, Any]:
    """All parts of a seed, by the name of the network: JSON, "run" and "result"."""
    found: dict[str, Any] = {"seed": parts.seed}
    for network in setting.networks():
        found[network.name] = _developed(setting, parts, network)
    found["planted"] = parts.part("planted", "a planted vestigial layer", lambda: _planted(setting, parts))
    return found


def _developed(setting: Setting, parts: SeedParts, network: Network) -> dict[str, Any]:
    name, store, place = (
        network.name,
        parts.folder / f"{network.name}.zarr",
        parts.folder / f"{network.name} result.zarr",
    )
    done = parts.part(name, f"{name}: train, explain", lambda: _explained(setting, parts.seed, network, store, place))
    run, model = open_run(store), network.build()
    found = {**done, "run": run, "steps": run.steps, "result": Result(open_result(place).dataset.load())}
    found["curve"] = parts.part(f"{name} curve", f"{name}: look", lambda: _curve(setting, network, run, model))
    found["vestiges"] = _vestiges(found["result"])
    found["ablated"] = parts.part(f"{name} ablated", f"{name}: ablate", lambda: _ablated(network, run, model))
    found["windows"] = parts.part(
        f"{name} windows", f"{name}: freeze and suppress", lambda: _windows(setting, network, run, model)
    )
    found["branches"] = parts.part(
        f"{name} branches", f"{name}: branch", lambda: _branches(setting, parts, network, run, model)
    )
    found["dropped"] = parts.part(
        f"{name} dropped",
        f"{name}: leave examples out",
        lambda: _dropped(setting, network, run, model, found["result"], parts.seed),
    )
    return found


def _explained(setting: Setting, seed: int, network: Network, store: Path, place: Path) -> dict[str, Any]:
    model = network.train(seed, store)
    keep = [("step", "group"), ("example",)]
    queries = network.queries(setting.queries)
    result = attribute(
        open_run(store), model, queries, loss=cross_entropy, groups=network.groups, keep=keep, progress=False
    )
    ledger = result.check(TOLERANCE)
    result.save(place, overwrite=True)
    return {"ledger": str(ledger)}


def _states(run: Run, count: int) -> list[int]:
    found: list[int] = np.unique(np.linspace(0, run.steps, count + 1).astype(int)).tolist()
    return found


def _curve(setting: Setting, network: Network, run: Run, model: Any) -> dict[str, Any]:
    """Looks along the run, and the steps at which the held-out accuracy and loss break."""
    found = evaluate(run, model, network.looks, _states(run, setting.curve))
    right, loss = found.isel(query=LOOKS.index("held-out accuracy")), found.isel(query=LOOKS.index("held-out loss"))
    width = max(1, len(found) // 20)
    return {
        "states": found["state"].values.tolist(),
        "looks": {look: found.isel(query=k).values.tolist() for k, look in enumerate(LOOKS)},
        "onset": {"accuracy": onset(right, width), "loss": onset(-loss, width)},
    }


def _vestiges(result: Result) -> dict[str, Any]:
    """Of the held-out margin, by group."""
    found = vestiges(result, 0)
    names = ("gross", "net", "height", "left", "step", "vestigial")
    return {"group": [str(g) for g in found["group"].values], **{n: found[n].values.tolist() for n in names}}


def _ablated(network: Network, run: Run, model: Any) -> dict[str, Any]:
    """Change of the looks at the end with a group at zero, or back at its first values."""
    cases = {"zero": None, "first values": 0}
    return {
        name: ablate(run, model, network.looks, network.groups, to=to).values.tolist() for name, to in cases.items()
    }


def _windows(setting: Setting, network: Network, run: Run, model: Any) -> dict[str, Any]:
    """Each group frozen, or pulled to zero, in each window: the looks along the changed runs, beside the untouched."""
    edges = np.linspace(0, run.steps, setting.windows + 1).astype(int).tolist()
    changes: dict[str, Intervention] = {}
    for first, stop in itertools.pairwise(edges):
        for group, patterns in network.groups.items():
            changes[f"frozen {group} {first}"] = Freeze(patterns, slice(first, stop))
            changes[f"suppressed {group} {first}"] = Suppress(patterns, network.pull, slice(first, stop))
    states = _states(run, setting.curve // 2)
    found = what_if(
        run, changes, network.looks, model=model, loss=cross_entropy, states=states, progress=False
    )  # fmt: skip
    return {
        "edges": edges,
        "states": states,
        "changes": found["change"].values.tolist(),
        "looks": found.values.tolist(),
    }


def _branches(setting: Setting, parts: SeedParts, network: Network, run: Run, model: Any) -> list[dict[str, float]]:
    """Where every batch is all examples there are no others to go on with; else the barrier of the held-out loss between the
    ends, in nats."""
    if len(run.index(0)) == len(run.examples):
        return []
    rows = []
    for share in setting.branches:
        start = round(share * run.steps)
        store = parts.folder / f"{network.name} from {start}.zarr"
        other = OtherBatches(run, network.x, network.y, parts.seed)
        child = replay(run, start, other, model=model, loss=cross_entropy, store=store, overwrite=True, progress=False)
        ends = {"run": (run, run.steps), "branch": (child, child.steps)}
        found = connectivity(ends, model, network.held_out_loss, setting.positions, progress=False)
        barrier = float(found["barrier"].sel(point="run", other="branch").isel(query=0))
        rows.append({"share": share, "start": start, "barrier": barrier})
    return rows


def _dropped(
    setting: Setting, network: Network, run: Run, model: Any, result: Result, seed: int
) -> list[dict[str, Any]]:
    """For single queries: the examples that raised them most, and as many at random, left out from the start; the
    change of the log-probability, and what the account says they contributed."""
    given, rng = result.by("example"), np.random.default_rng(seed)
    queries, rows = network.queries(setting.queries), []
    for q in range(2, 2 + setting.asked):
        order = np.argsort(-given.values[q], kind="stable")
        chosen = {
            "largest": order[: setting.dropped],
            "random": rng.permutation(len(order))[: setting.dropped],
        }
        ids = given["example"].values
        changes = {name: Drop(ids[which].tolist()) for name, which in chosen.items()}
        found = what_if(
            run, changes, queries.select([q]), model=model, loss=cross_entropy, progress=False
        )[:, -1, 0]  # fmt: skip
        for name, which in chosen.items():
            change = float(found.sel(change=name) - found.sel(change="untouched"))
            rows.append(
                {"query": q, "kind": name, "measured": change, "accounted": -float(given.values[q, which].sum())}
            )
    return rows


def _planted(setting: Setting, parts: SeedParts) -> dict[str, Any]:
    """What the account calls vestigial, and what ablation and freezing say."""
    steps, store = setting.planted_steps, parts.folder / "planted.zarr"
    turn = round(TURN * steps)
    model = planted.train(store, steps, turn, parts.seed)
    run, asked = open_run(store), planted.signed_output(parts.seed)
    result = attribute(run, model, asked, loss=planted.loss, groups=planted.GROUPS, progress=False)
    seen = vestiges(result)
    changes = {
        f"{group} {said}": Freeze(patterns, window)
        for group, patterns in planted.GROUPS.items()
        for said, window in (
            ("always", slice(0, None)),
            ("before the turn", slice(0, turn)),
            ("after it", slice(turn, None)),
        )
    }
    found = what_if(run, changes, asked, model=model, loss=planted.loss, states=[turn, steps], progress=False)[..., 0]
    return {
        "ledger": str(result.check(TOLERANCE)),
        "turn": turn,
        "vestiges": _vestiges(result),
        "running": {str(g): seen["running"].sel(group=g).values.tolist() for g in seen["group"].values},
        "ablated": dict(
            zip(planted.GROUPS, ablate(run, model, asked, planted.GROUPS)[:, 0].values.tolist(), strict=True)
        ),
        "frozen": {str(c): found.sel(change=c).values.tolist() for c in found["change"].values},
    }


# between the seeds


def across(setting: Setting, found: Sequence[Mapping[str, Any]], parts: Parts, network: Network) -> dict[str, Any]:
    """Lines between checkpoints of all seeds, (point, other); similarity of what single predictions owe to the
    examples, (query, seed, seed), and of the same with the examples shuffled."""
    points = {
        f"{r['seed']}: {share:g}": (r[network.name]["run"], round(share * r[network.name]["steps"]))
        for r in found
        for share in setting.checkpoints
    }

    def lines() -> dict[str, Any]:
        seen = connectivity(points, network.build(), network.held_out_loss, setting.positions)
        return {name: seen[name].isel(query=0).values.tolist() for name in ("barrier", "gap")}

    return {
        "points": list(points),
        **parts.part(f"between/{network.name} {len(found)} seeds", lines),
        **_similar(found, network),
    }


def _similar(found: Sequence[Mapping[str, Any]], network: Network) -> dict[str, Any]:
    results = {str(r["seed"]): r[network.name]["result"] for r in found}
    if len(results) < 2:
        return {"similar": None, "shuffled": None}
    single = {name: r.select(range(2, r.dataset.sizes["query"])) for name, r in results.items()}
    seen = similarity(single, "example", kind="rank").values
    rng, chance = np.random.default_rng(0), []
    for _ in range(SHUFFLES):
        mixed = {name: _shuffled(r, rng) for name, r in single.items()}
        chance.append(similarity(mixed, "example", kind="rank").values)
    return {"similar": seen, "shuffled": np.array(chance)}


def _shuffled(result: Result, rng: np.random.Generator) -> Result:
    given = result.by("example")
    order = rng.permutation(given.sizes["example"])
    mixed = given.isel(example=order).assign_coords(example=given["example"].values)
    return Result(xr.Dataset({"contribution_example": mixed.drop_vars("query_name", errors="ignore")}))
