"""What the run is made of: the mean log-probability of held-out and of training pairs, and single held-out predictions,
attributed to layers, steps and training pairs."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...engine import attribute
from ...measure import Measurement
from ...phases import phases
from ...result import Result
from ...run import Run
from ..modular import Pairs
from ..recipe import cross_entropy
from .setting import Setting

HELD_OUT, TRAINED, SINGLE = 0, 1, 2  # queries: the two means, and the first of the single ones


def some(ids: Tensor, count: int) -> Tensor:
    """Evenly spaced ids."""
    chosen: Tensor = ids[:: max(1, len(ids) // count)][:count]
    return chosen


def account(setting: Setting, run: Run, model: nn.Module, pairs: Pairs, progress: bool) -> Result:
    """Queries: mean log-probability of held-out pairs, of training pairs, and of single held-out pairs, in nats."""
    means = torch.stack([some(ids, setting.explained) for ids in (pairs.test, pairs.train)])
    single = some(pairs.test, setting.queries)
    ids = torch.cat([means, single[:, None].expand(-1, setting.explained)])
    names = ("held-out pairs", "training pairs", *(pairs.describe(int(q)) for q in single))
    measurement = Measurement(_mean_log_prob, (pairs.x[ids], pairs.y[ids]), "log_prob", "nats", names)
    keep = [("step", "group"), ("example",)]
    return attribute(run, model, measurement, loss=cross_entropy, groups=setting.groups, keep=keep, progress=progress)


def _mean_log_prob(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """(Q, n, tokens), (Q, n) -> (Q,)."""
    outputs = F.log_softmax(model(x.flatten(0, 1)), -1)
    return outputs.gather(1, y.flatten()[:, None]).view(y.shape).mean(1)


def found_phases(result: Result, seed: int) -> dict[str, Any]:
    """Change points of the layers' timelines of the held-out log-probability, as numbers and as they are printed."""
    found = phases(result, HELD_OUT, seed=seed)
    return {
        "changes": [
            {"step": c.step, "low": c.low, "high": c.high, "p": c.p_value, "explained": c.explained}
            for c in found.changes
        ],
        "bounds": list(found.bounds),
        "text": str(found),
    }


def by_residue(pairs: Pairs, result: Result, queries: Sequence[int]) -> dict[str, Any]:
    """Mean contribution of the training pairs by (their sum - the query's sum) mod p, over the single queries.

    "shuffled" is the same with the sums of the training pairs shuffled among them: what chance looks like.
    """
    contributions = result.by("example").values[SINGLE:]  # (Q, N)
    sums = pairs.y[torch.from_numpy(result.by("example")["example"].values.copy())].numpy()
    shuffled = np.random.default_rng(0).permutation(sums)
    profiles = {}
    for name, own in (("profile", sums), ("shuffled", shuffled)):
        rows = []
        for query, values in zip(queries, contributions, strict=True):
            residue = (own - int(pairs.y[query])) % pairs.p
            rows.append(np.bincount(residue, values, pairs.p) / np.maximum(np.bincount(residue, minlength=pairs.p), 1))
        profiles[name] = np.mean(rows, 0)
    centred = profiles["profile"] - profiles["profile"].mean()
    power = np.abs(np.fft.rfft(centred))[1:] ** 2
    same = float(profiles["profile"][0])
    return {
        "profile": profiles["profile"].tolist(),
        "shuffled": profiles["shuffled"].tolist(),
        "power": (power / (power.sum() or 1.0)).tolist(),  # of frequencies 1 .. (p - 1) / 2
        "same": same,
        "others": float(np.mean(profiles["profile"][1:])),
        "spread": float(np.std(profiles["shuffled"])),
    }
