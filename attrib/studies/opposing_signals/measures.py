"""How two groups of examples move, from the losses of all examples at every state (T + 1, N)."""

from collections.abc import Mapping
from typing import Any

import numpy as np

SPIKE = 0.1  # of the mean loss
MEASURES = ("data", "gross", "correlation", "opposite", "flips", "calm")  # of `movement`


def movement(losses: np.ndarray, first: np.ndarray, second: np.ndarray) -> dict[str, float]:
    """By the names of MEASURES.

    data, gross: the groups' share of all examples, and of the sum of |change of each loss| over the steps. correlation: of
    the changes of the two mean losses. opposite: share of the steps in which one rises and the other falls. flips: share in
    which the first group's change has the other sign than in the step before. calm: median over steps of |change of the
    mean loss| over the mean |change of a loss|.
    """
    changes = np.diff(losses, axis=0)
    a, b, both = changes[:, first].mean(1), changes[:, second].mean(1), np.concatenate([first, second])
    sizes = np.abs(changes).mean(1)
    return {
        "data": len(both) / changes.shape[1],
        "gross": float(np.abs(changes[:, both]).sum() / np.abs(changes).sum()),
        "correlation": float(np.corrcoef(a, b)[0, 1]) if a.std() > 0 and b.std() > 0 else float("nan"),
        "opposite": float((np.sign(a) * np.sign(b) < 0).mean()),
        "flips": float((np.sign(a[1:]) * np.sign(a[:-1]) < 0).mean()),
        "calm": float(np.median(np.abs(changes.mean(1)) / np.where(sizes > 0, sizes, 1.0))),
    }


def controls(
    losses: np.ndarray, first: np.ndarray, second: np.ndarray, own: np.ndarray, draws: int = 200, seed: int = 0
) -> dict[str, list[dict[str, float]]]:
    """The same of groups of these sizes among the others: drawn at random, and of those most alike in gradient norm, by
    their own contribution `own` (N,), drawn into two sides at random. None where there are not as many others."""
    rng, members = np.random.default_rng(seed), np.concatenate([first, second])
    others = np.setdiff1d(np.arange(losses.shape[1]), members)
    pools = {"random": others, "matched in gradient norm": matched(own, members)}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in pools}
    for name, pool in pools.items():
        for _ in range(draws if len(pool) >= len(first) + len(second) else 0):
            order = rng.permutation(pool)
            found[name].append(movement(losses, order[: len(first)], order[len(first) : len(first) + len(second)]))
    return found


def matched(own: np.ndarray, members: np.ndarray) -> np.ndarray:
    """As many others as there are members, or as there are, each the nearest in `own` that is not taken yet."""
    left = list(np.setdiff1d(np.arange(len(own)), members))
    found = []
    for member in members[np.argsort(-own[members], kind="stable")][: len(left)]:
        found.append(left.pop(int(np.argmin(np.abs(own[left] - own[member])))))
    return np.array(found, dtype=int)


def unrest(mean: np.ndarray) -> dict[str, float]:
    """Of a mean loss (T,): how much it rose in all, and in how many steps by a tenth or more."""
    rises = np.maximum(np.diff(mean), 0.0)
    return {"ascent": float(rises.sum()), "spikes": float((rises > SPIKE * mean[:-1]).sum())}


def recovered(found: Mapping[str, Any], truth: tuple[list[int], list[int]]) -> dict[str, float]:
    """Precision and recall of the members of both sides, and the share of those found that stand on the side of their
    class (whichever way round is better)."""
    sides, true = [set(found["first"]), set(found["second"])], [set(t) for t in truth]
    members, whole = sides[0] | sides[1], true[0] | true[1]
    hits = members & whole
    agree = max(len(sides[0] & true[k]) + len(sides[1] & true[1 - k]) for k in (0, 1))
    return {
        "precision": len(hits) / len(members) if members else 0.0,
        "recall": len(hits) / len(whole),
        "sides": agree / len(hits) if hits else 0.0,
    }
