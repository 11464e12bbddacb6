"""Progress measures of Nanda et al. 2023 ("Progress measures for grokking via mechanistic interpretability"), over all p^2
pairs (a, b):

    F_k          share of the neurons' variance in cos and sin of k a, k b and their products, (k, k), with k = 1 .. (p-1)/2
    restricted   loss of the logits' mean and their cos(k (a + b)), sin(k (a + b)) of the key frequencies k alone
    excluded     loss of the logits without those
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..modular import Pairs
from .setting import Setting

KEY = 0.05  # of the neurons' variance makes a frequency a key frequency, where that is twice an even share or more


@dataclass(frozen=True)
class Everywhere:
    """logits (p, p, C) and rectified neurons (p, p, H) of all pairs (a, b)."""

    logits: Tensor
    neurons: Tensor


def everywhere(setting: Setting, model: nn.Module) -> Everywhere:
    """Run the network over all pairs."""
    numbers = torch.arange(setting.p)
    a, b = torch.meshgrid(numbers, numbers, indexing="ij")
    seen: list[Tensor] = []
    hook = model.get_submodule(setting.neurons).register_forward_hook(lambda module, given, out: seen.append(out))
    try:
        with torch.no_grad():
            logits = model(setting.tokens(a.flatten(), b.flatten(), setting.p))
    finally:
        hook.remove()
    neurons = F.relu(seen[0] if seen[0].dim() == 2 else seen[0][:, -1])
    return Everywhere(*(t.view(setting.p, setting.p, -1).double() for t in (logits, neurons)))


def frequencies(neurons: Tensor) -> np.ndarray:
    """(p, p, H) -> F_k, ((p - 1) / 2,); sums to at most 1."""
    p = len(neurons)
    power = torch.fft.fft2(neurons, dim=(0, 1)).abs().square().sum(2)
    power[0, 0] = 0
    total = float(power.sum()) or 1.0
    k = torch.arange(1, (p - 1) // 2 + 1)
    plus, minus = k, p - k
    alone = power[plus, 0] + power[minus, 0] + power[0, plus] + power[0, minus]
    both = power[plus, plus] + power[plus, minus] + power[minus, plus] + power[minus, minus]
    found: np.ndarray = ((alone + both) / total).numpy()
    return found


def key_frequencies(shares: np.ndarray) -> list[int]:
    """k with F_k of KEY and of twice an even share at least, the largest in any case; largest first."""
    order, least = np.argsort(-shares, kind="stable"), max(KEY, 2 / len(shares))
    return [int(k) + 1 for k in order if shares[k] >= least] or [int(order[0]) + 1]


def restrict(logits: Tensor, keys: list[int]) -> Tensor:
    """(p, p, C) -> (p, C): of each sum a + b, the part of the logits in the key frequencies, without the mean."""
    p = len(logits)
    numbers = torch.arange(p)
    sums = (numbers[:, None] + numbers) % p
    by_sum = torch.zeros(p, logits.shape[2], dtype=logits.dtype).index_add_(0, sums.flatten(), logits.flatten(0, 1)) / p
    angle = 2 * torch.pi / p * numbers[:, None].double() * torch.tensor(keys)
    waves = torch.cat([angle.cos(), angle.sin()], 1)  # (p, 2 K), orthogonal, of square norm p / 2
    return waves @ (waves.T @ by_sum) * (2 / p)


def progress(setting: Setting, model: nn.Module, pairs: Pairs, keys: list[int]) -> dict[str, Any]:
    """Restricted loss of the held-out pairs, excluded loss of the training pairs, in nats, and F_k."""
    found = everywhere(setting, model)
    part, mean = restrict(found.logits, keys), found.logits.mean((0, 1))
    losses = {}
    for name, ids in (("restricted", pairs.test), ("excluded", pairs.train)):
        a, b = torch.tensor([pairs.operands(int(i)) for i in ids]).T
        y = pairs.y[ids]
        logits = mean + part[y] if name == "restricted" else found.logits[a, b] - part[y]
        losses[name] = float(F.cross_entropy(logits, y))
    return {**losses, "frequencies": frequencies(found.neurons).tolist()}
