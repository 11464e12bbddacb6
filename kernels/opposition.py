"""Who helps and who harms whom: opposing pairs and groups of a matrix of contributions between examples.

    K_ij     what example j contributed to the loss of example i
    S        -(K + K^T) / 2                      help: positive where the two lower each other's loss
    pair     K_ij, K_ji > 0 > K_ii, K_jj: each lowers its own loss and raises the other's
             score -S_ij / sqrt(S_ii S_jj), 0 where they do not oppose; 1: each undoes for the other what it does for itself
    groups   a vector x of -1, 0, 1 with a large x^T S x / x^T x: members of a side help each other and harm the other side
             strength x^T S x / x^T x; opposition 4 c / x^T S x with c the harm between the sides, 1 for two equal sides

The vector is rounded from each of the leading eigenvectors of S: its entries in order of size, cut where the quotient is
largest. Of those with both sides and an opposition of LEAST or more, the strongest is taken, its members are left out, and
so on.

Exact for the pairs. For the groups a relaxation: the best of all ternary vectors is not guaranteed. Source: the
rounding is that of spectral partitioning (Trevisan 2012 for signed cuts); the scores are ours.
"""

from typing import NamedTuple

import numpy as np

VECTORS = 8  # leading eigenvectors that are rounded
LEAST = 0.5


class Opposed(NamedTuple):
    """first, second: positions of the members of the two sides, strongest first. strength: help a member, in the units of
    the matrix. opposition: 0 to about 1."""

    first: np.ndarray
    second: np.ndarray
    strength: float
    opposition: float

    @property
    def members(self) -> np.ndarray:
        return np.concatenate([self.first, self.second])


def help_between(contributions: np.ndarray) -> np.ndarray:
    """K (N, N) -> S (N, N)."""
    found: np.ndarray = -(contributions + contributions.T) / 2
    return found


def opposing_pairs(contributions: np.ndarray) -> np.ndarray:
    """K (N, N) -> scores (N, N), symmetric, 0 on the diagonal."""
    own = np.maximum(-np.diag(contributions), 0.0)
    size = np.sqrt(np.outer(own, own))
    harm = np.where((contributions > 0) & (contributions.T > 0), -help_between(contributions), 0.0)
    found: np.ndarray = np.divide(harm, size, out=np.zeros_like(harm), where=size > 0)
    return found


def opposing_groups(help_: np.ndarray, count: int = 1) -> list[Opposed]:
    """S (N, N) -> at most `count` pairs of groups that share no member; fewer where there are none."""
    left = np.arange(len(help_))
    found: list[Opposed] = []
    while len(found) < count and len(left) > 1:
        best = _strongest(help_[np.ix_(left, left)])
        if best is None:
            break
        found.append(best._replace(first=left[best.first], second=left[best.second]))
        left = np.setdiff1d(left, found[-1].members)
    return found


def _strongest(help_: np.ndarray) -> Opposed | None:
    _, vectors = np.linalg.eigh(help_)
    rounded = [_rounded(help_, vector) for vector in vectors[:, ::-1][:, :VECTORS].T]
    fit = [r for r in rounded if len(r.first) and len(r.second) and r.opposition >= LEAST]
    return max(fit, key=lambda r: r.strength, default=None)


def _rounded(help_: np.ndarray, vector: np.ndarray) -> Opposed:
    order = np.argsort(-np.abs(vector), kind="stable")
    signs = np.where(vector[order] < 0, -1.0, 1.0)
    signed = help_[np.ix_(order, order)] * np.outer(signs, signs)
    sums = np.tril(signed, -1).sum(1) * 2 + np.diag(signed)  # what each adds to x^T S x when it comes in
    quotients = np.cumsum(sums) / np.arange(1, len(order) + 1)
    size = int(np.argmax(quotients)) + 1
    first, second = (order[:size][signs[:size] == sign] for sign in (1.0, -1.0))
    whole = quotients[size - 1] * size
    harm = -help_[np.ix_(first, second)].sum()
    return Opposed(first, second, float(quotients[size - 1]), float(4 * harm / whole) if whole > 0 else 0.0)
