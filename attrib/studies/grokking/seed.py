"""Everything that is done with one seed: train, recorded; look, explain, exchange. Each part once, kept in the folder."""

from typing import Any

import numpy as np

from ...phases import onset
from ...result import Result, open_result
from ...run import Run, open_run
from ..modular import GENERALISED, train_until_generalised
from ..parts import SeedParts
from .account import account, by_residue, found_phases, some
from .fourier import everywhere, frequencies, key_frequencies, progress
from .grafts import Grafts
from .pruning import importance, pruned, within_layers
from .setting import Setting

STATES = 40  # at which the network is looked into
TOLERANCE = 1e-5  # float32 replay of float32 training, of the gross size


def study_seed(setting: Setting, parts: SeedParts) -> dict[str, Any]:
    """All parts of a seed, JSON, and its result under "result". Of a run that did not generalise the training alone."""
    seed, pairs = parts.seed, setting.pairs(parts.seed)
    found: dict[str, Any] = {"seed": seed}
    found["training"] = parts.part("training", "train, recorded", lambda: _train(setting, parts))
    if found["training"]["generalised"] is None:
        return found
    run = open_run(parts.folder / "run.zarr")
    found["steps"] = run.steps
    found["progress"] = parts.part("progress", "restricted and excluded loss", lambda: _progress(setting, seed, run))
    found["account"] = parts.part("account", "explain", lambda: _account(setting, parts, run))
    result = open_result(parts.folder / "result.zarr")
    found["phases"] = parts.part("phases", "find phases", lambda: found_phases(result, seed))
    found["result"] = Result(result.dataset.load())
    queries, keys = some(pairs.test, setting.queries).tolist(), found["progress"]["keys"]
    found["residues"] = parts.part("residues", "who carries", lambda: by_residue(pairs, found["result"], queries, keys))
    grafts = Grafts(setting, run, pairs, parts, found["training"]["generalised"])
    found["swaps"] = parts.part(
        "swaps", "swap layers", lambda: grafts.swaps(np.linspace(0, run.steps, 25).astype(int).tolist())
    )
    found["pruning"] = parts.part("pruning", "prune", lambda: _pruning(setting, seed, run))
    parts.say(f"   seed {seed}: transplants")
    found["transplants"] = grafts.transplants()
    parts.say(f"   seed {seed}: re-insertions")
    found["reinsertions"] = grafts.reinsertions()
    parts.say(f"   seed {seed}: controls")
    found["controls"] = grafts.controls()
    return found


def _train(setting: Setting, parts: SeedParts) -> dict[str, Any]:
    _, seen = train_until_generalised(
        setting.pairs(parts.seed), parts.folder / "run.zarr", setting.limit, parts.seed,
        build=setting.build, lr=setting.lr, weight_decay=setting.weight_decay, every=setting.every,
        beyond=setting.beyond, overwrite=True, **setting.record,
    )  # fmt: skip
    first = {
        name: next((look.step for look in seen if getattr(look, column) >= GENERALISED), None)
        for name, column in (("memorised", "train"), ("generalised", "test"))
    }
    steps = np.array([look.step for look in seen])
    breaks = {
        f"{name} onset": int(steps[onset(np.array([getattr(look, column) for look in seen]), max(1, len(seen) // 20))])
        for name, column in (("memorisation", "train"), ("generalisation", "test"))
        if len(seen) > 2
    }
    return {"curve": [list(look) for look in seen], **first, **breaks}


def _progress(setting: Setting, seed: int, run: Run) -> dict[str, Any]:
    pairs, model = setting.pairs(seed), setting.build(setting.p)
    run.load(model, run.steps)
    keys = key_frequencies(frequencies(everywhere(setting, model).neurons))
    rows = []
    for state in np.unique(np.linspace(0, run.steps, STATES).astype(int)).tolist():
        run.load(model, state)
        rows.append({"step": state, **progress(setting, model, pairs, keys)})
    return {"keys": keys, "rows": rows}


def _account(setting: Setting, parts: SeedParts, run: Run) -> dict[str, Any]:
    pairs, model = setting.pairs(parts.seed), setting.build(setting.p)
    run.load(model, run.steps)
    result = account(setting, run, model, pairs, progress=True)
    ledger = result.check(TOLERANCE)
    result.save(parts.folder / "result.zarr", overwrite=True)
    gross = result.dataset["gross"].values
    queries = some(pairs.test, setting.queries).tolist()
    return {
        "ledger": str(ledger),
        "residual": float(np.abs(result.residual.values).max()),
        "relative": float(np.abs(result.residual.values / gross).max()),
        "queries": [pairs.describe(q) for q in queries],
    }


def _pruning(setting: Setting, seed: int, run: Run) -> Any:
    pairs, model = setting.pairs(seed), setting.build(setting.p)
    scores = {"contribution": importance(setting, run, model, pairs), "magnitude": run.vector(run.steps).abs()}
    layered = {f"{name}, in each tensor": within_layers(run, score) for name, score in scores.items()}
    return pruned(run, model, pairs, {**scores, **layered})
