"""A small GPT on the source text of Python's standard library, characters as tokens. Nothing is downloaded."""

import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .recipe import cross_entropy, train_recorded

MODULES = ("abc", "ast", "bisect", "copy", "csv", "dataclasses", "enum", "functools", "heapq", "json/decoder", "random",
           "statistics", "string", "textwrap", "typing", "uuid")  # fmt: skip


@dataclass(frozen=True)
class Text:
    """tokens (L,) int64 over `alphabet`; example i is the passage of `length` characters from character i * length."""

    tokens: Tensor
    alphabet: str
    length: int

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.length

    def passages(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """(B,) -> inputs and targets, (B, length) each."""
        at = ids[:, None] * self.length + torch.arange(self.length)
        return self.tokens[at], self.tokens[at + 1]

    def describe(self, index: int) -> str:
        """An example as its text."""
        at = index * self.length
        return "".join(self.alphabet[t] for t in self.tokens[at : at + self.length + 1])


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        split = (b, t, self.heads, c // self.heads)
        q, k, v = (z.view(split).transpose(1, 2) for z in self.qkv(self.norm1(x)).split(c, 2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(b, t, c))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Gpt(nn.Module):
    """Embedding, learned positions, blocks with LayerNorm and GELU, the head tied to the embedding."""

    def __init__(self, vocabulary: int, length: int = 64, width: int = 64, heads: int = 4, layers: int = 2) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(torch.zeros(length, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        nn.init.normal_(self.tokens.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        h = self.tokens(x) + self.positions[: x.shape[1]]
        for block in self.blocks:
            h = block(h)
        return F.linear(self.norm(h), self.tokens.weight)


def load(length: int = 64, characters: int = 400_000) -> Text:
    """Standard-library modules of the running Python, joined; at most so many characters, ASCII only."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    text = "\n".join((folder / f"{name}.py").read_text(encoding="utf-8") for name in MODULES)
    text = text.encode("ascii", "ignore").decode()[:characters]
    alphabet = "".join(sorted(set(text)))
    number = {c: n for n, c in enumerate(alphabet)}
    return Text(torch.tensor([number[c] for c in text]), alphabet, length)


def train(data: Text, store: Any, steps: int = 200, batch: int = 32, seed: int = 0, **options: Any) -> Gpt:
    """AdamW with weight decay 0.1 and a cosine schedule on random passages; recorded to `store`.

    The last tenth of the passages is held out.
    """
    torch.manual_seed(seed)
    model = Gpt(len(data.alphabet), data.length)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1, betas=(0.9, 0.95))
    count = len(data) * 9 // 10
    indices = [torch.randint(0, count, (batch,)) for _ in range(steps)]
    train_recorded(
        model,
        optimizer,
        cross_entropy,
        ((index, *data.passages(index)) for index in indices),
        store,
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, steps),
        **options,
    )
    return model
