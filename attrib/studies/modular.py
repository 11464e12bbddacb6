"""Modular addition: all pairs (a, b) modulo p, learned from a part of them.

Two settings: a small MLP that generalises in about 1500 steps, and the one-layer transformer of ExPLAIND (arXiv 2505.20076,
read off the authors' code: 89 024 parameters at p = 113).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from .recipe import cross_entropy, train_recorded

GENERALISED = 0.995  # of the pairs right


@dataclass(frozen=True)
class Pairs:
    """x (N, tokens) int64, y (N,) int64: sums modulo p. `train` and `test` are disjoint ids into both."""

    x: Tensor
    y: Tensor
    train: Tensor
    test: Tensor
    p: int

    def describe(self, index: int) -> str:
        """An example as its equation."""
        a, b = self.operands(index)
        return f"{a} + {b} = {int(self.y[index])}"

    def operands(self, index: int) -> tuple[int, int]:
        row = self.x[index].tolist()
        return (row[0], row[1]) if len(row) == 2 else (row[2], row[0])


class PairMlp(nn.Module):
    """Both numbers embedded, concatenated, one hidden ReLU layer, no biases. At p = 31: 13 152 parameters."""

    def __init__(self, p: int, width: int = 32, hidden: int = 128) -> None:
        super().__init__()
        self.embedding = nn.Embedding(p, width)
        self.hidden = nn.Linear(2 * width, hidden, bias=False)
        self.output = nn.Linear(hidden, p, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(F.relu(self.hidden(self.embedding(x).flatten(1))))


class Head(nn.Module):
    """One bias-free encoder serves as query, key and value; no mask."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.encoder = nn.Linear(width, inner, bias=False)
        self.decoder = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        e = self.encoder(x)
        weights = F.softmax(e @ e.transpose(1, 2) / e.shape[-1] ** 0.5, -1)
        return self.decoder(weights @ e)


class PairTransformer(nn.Module):
    """ExPLAIND's network on tokens (b, +, a, =): no positions, no residual around attention."""

    def __init__(self, p: int = 113, width: int = 64, heads: int = 4, hidden: int = 512) -> None:
        super().__init__()
        self.embedding = nn.Embedding(p + 2, width)
        self.heads = nn.ModuleList(Head(width, width // heads) for _ in range(heads))
        self.linear1 = nn.Linear(width, hidden)
        self.linear2 = nn.Linear(hidden, width)
        self.decoder = nn.Linear(width, p + 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        embedded = self.embedding(x) * self.embedding.embedding_dim**0.5
        h = torch.stack([head(embedded) for head in self.heads]).sum(0)
        y = h + F.relu(self.linear2(F.relu(self.linear1(h))))
        return self.decoder(y[:, -1])


# The layer groups of all figures of the paper, for `attrib.attribute(groups=...)`.
TRANSFORMER_GROUPS = {
    "embedding": ["embedding.*"],
    "attention encoders": ["heads.*.encoder.*"],
    "attention decoders": ["heads.*.decoder.*"],
    "linear1": ["linear1.*"],
    "linear2": ["linear2.*"],
    "decoder": ["decoder.*"],
}


def ordered_pairs(p: int, share: float, seed: int) -> Pairs:
    """All p^2 ordered pairs as two tokens; `share` of them are for training."""
    numbers = torch.arange(p)
    x = torch.cartesian_prod(numbers, numbers)
    return _split(x, x.sum(1) % p, int(share * p * p), p, seed)


def unordered_pairs(p: int = 113, train: int = 4000, seed: int = 43) -> Pairs:
    """All pairs a <= b as tokens (b, +, a, =): 6441 at p = 113."""
    a, b = torch.triu_indices(p, p)
    x = torch.stack([b, torch.full_like(a, p), a, torch.full_like(a, p + 1)], 1)
    return _split(x, (a + b) % p, train, p, seed)


def _split(x: Tensor, y: Tensor, train: int, p: int, seed: int) -> Pairs:
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    return Pairs(x, y, order[:train].sort().values, order[train:].sort().values, p)


def accuracy(model: nn.Module, pairs: Pairs, ids: Tensor) -> float:
    with torch.no_grad():
        return float((model(pairs.x[ids]).argmax(-1) == pairs.y[ids]).float().mean())


class Look(NamedTuple):
    """A network at a step: accuracies of the training and the held-out pairs, and their mean losses in nats."""

    step: int
    train: float
    test: float
    train_loss: float
    test_loss: float


def look(model: nn.Module, pairs: Pairs, step: int) -> Look:
    found = []
    with torch.no_grad():
        for ids in (pairs.train, pairs.test):
            outputs, y = model(pairs.x[ids]), pairs.y[ids]
            found.append((float((outputs.argmax(-1) == y).float().mean()), float(F.cross_entropy(outputs, y))))
    (train, train_loss), (test, test_loss) = found
    return Look(step, train, test, train_loss, test_loss)


def train_until_generalised(
    pairs: Pairs,
    store: Any,
    limit: int = 4000,
    seed: int = 0,
    progress: bool = True,
    *,
    build: Callable[[int], nn.Module] = PairMlp,
    lr: float = 0.01,
    weight_decay: float = 1.0,
    every: int = 20,
    beyond: float = 0.0,
    **options: Any,
) -> tuple[nn.Module, list[Look]]:
    """Full batch AdamW (betas 0.9 and 0.98) until GENERALISED of the held-out pairs are right, recorded to `store`. The
    defaults are the quick setting.

    Args:
        build: p -> the network. every: steps between two looks. beyond: how much longer to train, a share of the steps
            that it took.

    Returns:
        The model, and what was seen.
    """
    torch.manual_seed(seed)
    model = build(pairs.p)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay, betas=(0.9, 0.98))
    x, y = pairs.x[pairs.train], pairs.y[pairs.train]
    seen = [look(model, pairs, 0)]
    bar = tqdm(total=limit, desc="train", unit="step", delay=2, disable=not progress)

    def watch(step: int) -> bool:
        bar.update()
        if step % every:
            return False
        seen.append(look(model, pairs, step))
        first = next((s.step for s in seen if s.test >= GENERALISED), None)
        return first is not None and step >= first * (1 + beyond)

    with bar:
        batches = ((pairs.train, x, y) for _ in range(limit))
        train_recorded(model, optimizer, cross_entropy, batches, store, after_step=watch, **options)
    return model, seen
