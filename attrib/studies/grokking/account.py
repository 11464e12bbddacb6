"""What the run is made of: the mean log-probability of held-out and of training pairs, and single held-out predictions,
attributed to layers, steps and training pairs."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...attribute import attribute
from ...measure import Measurement
from ...phases import phases
from ...result import Result
from ...run import Run
from ..modular import Pairs
from ..recipe import cross_entropy
from .setting import Setting

SHUFFLES = 200
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


def by_residue(pairs: Pairs, result: Result, queries: Sequence[int], keys: Sequence[int]) -> dict[str, Any]:
    """Mean contribution of the training pairs by (their sum - the query's sum) mod p, over the single queries.

    "apart": the same of pairs of the same sum that share no number with the query. "spread": standard deviation of the
    profile where the sums of the training pairs are shuffled among them. "cyclic": share of the profile's spectrum in the
    key frequencies, and "p" that share's p value among the shuffles.
    """
    contributions = result.by("example").values[SINGLE:]  # (Q, N)
    ids = result.by("example")["example"].values
    sums = pairs.y.numpy()[ids]
    shuffles = (np.random.default_rng(seed).permutation(sums) for seed in range(SHUFFLES))
    found, *chance = [_profile(contributions, own, pairs.y.numpy()[queries], pairs.p) for own in (sums, *shuffles)]
    shares = np.array([_power(profile)[np.array(keys) - 1].sum() for profile in (found, *chance)])
    apart = [
        values[(sums == int(pairs.y[query])) & _apart(pairs, ids, query)]
        for query, values in zip(queries, contributions, strict=True)
    ]
    return {
        "profile": found.tolist(),
        "power": _power(found).tolist(),
        "same": float(found[0]),
        "apart": float(np.concatenate(apart).mean()),
        "others": float(found[1:].mean()),
        "spread": float(np.mean([profile.std() for profile in chance])),
        "cyclic": float(shares[0]),
        "p": float((1 + (shares[1:] >= shares[0]).sum()) / len(shares)),
    }


def _profile(contributions: np.ndarray, sums: np.ndarray, wanted: np.ndarray, p: int) -> np.ndarray:
    """(Q, N), (N,), (Q,) -> (p,)."""
    rows = []
    for values, sum_ in zip(contributions, wanted, strict=True):
        residue = (sums - sum_) % p
        rows.append(np.bincount(residue, values, p) / np.maximum(np.bincount(residue, minlength=p), 1))
    found: np.ndarray = np.mean(rows, 0)
    return found


def _power(profile: np.ndarray) -> np.ndarray:
    """(p,) -> shares of the frequencies 1 .. (p - 1) / 2 in its spectrum."""
    power = np.abs(np.fft.rfft(profile - profile.mean()))[1:] ** 2
    return power / (power.sum() or 1.0)


def _apart(pairs: Pairs, ids: np.ndarray, query: int) -> np.ndarray:
    """(N,): whether a training pair shares no number with the query; the query turned round shares both."""
    own = set(pairs.operands(query))
    return np.array([not own & set(pairs.operands(int(i))) for i in ids])
