"""The networks of `bench_influence.py`, in plain torch: both environments build them from here.

Every network maps a batch to logits (B, classes), or (B, T, classes); a query is the log-probability of its target.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU}


class Mlp(nn.Module):
    """8 x 8 digits, one hidden layer: 3 010 parameters."""

    def __init__(self, activation: str) -> None:
        super().__init__()
        self.hidden, self.output = nn.Linear(64, 40), nn.Linear(40, 10)
        self.activation = ACTIVATIONS[activation]()

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.activation(self.hidden(x.flatten(1))))


class Cnn(nn.Module):
    """8 x 8 digits, two convolutions, each with pooling by the maximum or the mean: 1 898 parameters."""

    def __init__(self, activation: str, pooling: str = "max") -> None:
        super().__init__()
        self.pool = {"max": F.max_pool2d, "mean": F.avg_pool2d}[pooling]
        self.first, self.second = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 16, 3, padding=1)
        self.output = nn.Linear(64, 10)
        self.activation = ACTIVATIONS[activation]()

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.activation(self.first(x)), 2)
        x = self.pool(self.activation(self.second(x)), 2)
        return self.output(x.flatten(1))


class Pairs(nn.Module):
    """Two numbers modulo p, embedded, one hidden layer, no biases: 6 304 parameters at p = 23."""

    def __init__(self, activation: str, p: int, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(p, 32)
        self.hidden, self.output = nn.Linear(64, hidden, bias=False), nn.Linear(hidden, p, bias=False)
        self.activation = ACTIVATIONS[activation]()

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.activation(self.hidden(self.embedding(x).flatten(1))))


class Layer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        q, k, v = (z.view(b, t, self.heads, -1).transpose(1, 2) for z in self.qkv(self.norm1(x)).split(c, 2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(b, t, c))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Gpt(nn.Module):
    """Characters, one layer of width 32, the head untied: some 20 000 parameters."""

    def __init__(self, vocabulary: int, length: int, width: int = 32) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Parameter(torch.zeros(length, width))
        self.layer, self.norm = Layer(width, 2), nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.layer(self.tokens(x) + self.positions[: x.shape[1]])))


MODELS = {"Mlp": Mlp, "Cnn": Cnn, "Pairs": Pairs, "Gpt": Gpt}


def losses_of(logits: Tensor, y: Tensor) -> Tensor:
    """(B,): cross-entropy in nats, of sequences its mean over the positions."""
    losses = F.cross_entropy(logits.movedim(-1, 1), y, reduction="none")
    return losses.reshape(len(y), -1).mean(1)


def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return losses_of(model(x), y)
