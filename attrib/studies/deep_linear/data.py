"""What the networks learn: items as one-hot inputs, their features as targets; and the modes of what there is to learn.

Sigma_yx = U S V^T      (features, items); mode alpha: s_alpha, u_alpha, v_alpha
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

ITEMS = ("Canary", "Salmon", "Oak", "Rose")
FEATURES = {
    "Grow": (0, 1, 2, 3),
    "Move": (0, 1),
    "Roots": (2, 3),
    "Fly": (0,),
    "Swim": (1,),
    "Bark": (2,),
    "Petals": (3,),
}
# broad before detail: all, animals against plants, the two animals, the two plants
TOY_MODES = np.array([[1, 1, 1, 1], [1, 1, -1, -1], [1, -1, 0, 0], [0, 0, 1, -1]])


@dataclass(frozen=True)
class Items:
    """y (features, items) float64, and its modes, largest first: s (K,), u (features, K), v (items, K)."""

    y: np.ndarray
    s: np.ndarray
    u: np.ndarray
    v: np.ndarray

    @property
    def batch(self) -> tuple[Tensor, Tensor]:
        """x (items, items), the items one-hot, and their features (items, features)."""
        return torch.eye(self.y.shape[1], dtype=torch.float64), torch.from_numpy(self.y.T.copy())


def toy() -> Items:
    """Four items, seven features; singular values sqrt 7, sqrt 3, 1, 1."""
    y = np.array([[float(item in who) for item in range(len(ITEMS))] for who in FEATURES.values()])
    v = (TOY_MODES / np.linalg.norm(TOY_MODES, axis=1, keepdims=True)).T
    s = np.linalg.norm(y @ v, axis=0)
    return Items(y, s, y @ v / s, v)


def tree(depth: int, flip: float, features: int, rng: np.random.Generator) -> np.ndarray:
    """(features, 2^(depth - 1)): each feature is +1 or -1 at the root of a binary tree of so many levels, and changes sign
    with probability `flip` at every branch on the way down to a leaf; the leaves are the items (branching diffusion)."""
    values = rng.choice([-1.0, 1.0], size=(features, 1))
    for _ in range(depth - 1):
        values = np.repeat(values, 2, axis=1)
        values = np.where(rng.random(values.shape) < flip, -values, values)
    return values


def tree_items(values: np.ndarray, features: int) -> Items:
    """The first features of a tree, scaled so that the squares of the singular values are eigenvalues of the items'
    correlations."""
    y = values[:features] / np.sqrt(features)
    u, s, vt = np.linalg.svd(y, full_matrices=False)
    return Items(y, s, u, vt.T)


def branches(depth: int) -> np.ndarray:
    """(items, items): the level of the branch at which two leaves part, 0 at the root; depth - 1 for a leaf and itself."""
    leaves = np.arange(2 ** (depth - 1))
    paths = leaves[:, None] >> np.arange(depth - 2, -1, -1)  # (items, depth - 1): branch by branch
    return (paths[:, None] == paths[None]).cumprod(-1).sum(-1)


def contrasts(depth: int) -> list[np.ndarray]:
    """Orthonormal eigenvectors of the items' correlations, (items, M_l - M_(l-1)) for each level: all, halves against each
    other, quarters within each half, ..."""
    count = 2 ** (depth - 1)
    found = [np.ones((count, 1)) / np.sqrt(count)]
    for level in range(1, depth):
        size = count >> level
        blocks = [np.repeat([1.0, -1.0], size) / np.sqrt(2 * size)] * (1 << (level - 1))
        made = np.zeros((count, len(blocks)))
        for k, block in enumerate(blocks):
            made[2 * size * k : 2 * size * (k + 1), k] = block
        found.append(made)
    return found


def category(count: int, size: int, snr: float, q: float, rng: np.random.Generator) -> np.ndarray:
    """(count, count): features by items, 1 with probability q, and p > q where both are among the first `size`; less q, and
    with noise of variance 1 / count. p follows from snr = (p - q)^2 / (q (1 - q)) size^2 / count."""
    p = q + np.sqrt(snr * q * (1 - q) * count) / size
    chance = np.full((count, count), q)
    chance[:size, :size] = p
    found: np.ndarray = ((rng.random((count, count)) < chance) - q) / np.sqrt(count * q * (1 - q))
    return found
