"""The settings of `bench_influence.py`: which network, how it is trained, on what, and what is asked of it."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent / "peers"))
from models import MODELS, loss

from attrib.studies import digits, modular, text

QUERIES = 20
LENGTH, FINE_TUNED = 32, 320  # characters of a passage; passages that the GPT is fine-tuned on
Data = tuple[Tensor, Tensor, Tensor, Tensor]  # x, y of the examples, then of the queries


@dataclass(frozen=True)
class Setting:
    """A network, how it is trained, on what.

    arguments: () -> those of the network. batch: examples of a step, None for all. warmup: steps. before: what the network
    went through before the training that is asked about; (network, seed) -> nothing.
    """

    model: str
    arguments: Callable[[], dict[str, Any]]
    optimizer: Callable[[Any], torch.optim.Optimizer]
    data: Callable[[], Data]
    steps: int
    batch: int | None = None
    warmup: int = 0
    before: Callable[[nn.Module, int], None] | None = None
    says: str = ""
    dtype: torch.dtype = torch.float64

    def network(self, seed: int) -> nn.Module:
        """As it is before the training that is asked about."""
        torch.manual_seed(seed)
        model = self.untrained()
        if self.before is not None:
            self.before(model, seed)
        return model

    def untrained(self) -> nn.Module:
        """Of the same architecture, to load states into."""
        model: nn.Module = MODELS[self.model](**self.arguments()).to(self.dtype)
        return model

    def batches(self, seed: int, count: int) -> list[Tensor]:
        if self.batch is None:
            return [torch.arange(count)] * self.steps
        rng, found = torch.Generator().manual_seed(seed), list[Tensor]()
        while len(found) < self.steps:
            found += torch.randperm(count, generator=rng).split(self.batch)
        return found[: self.steps]

    def schedule(self, optimizer: Any) -> Any:
        return torch.optim.lr_scheduler.LinearLR(optimizer, 0.05, total_iters=self.warmup)


def _digits() -> Data:
    data = digits.load(500)
    test = data.test[:QUERIES]
    return data.x[data.train].double(), data.y[data.train], data.x[test].double(), data.y[test]


@cache
def _characters() -> text.Text:
    return text.load(LENGTH, 600_000)


def _alphabet() -> dict[str, Any]:
    return {"vocabulary": len(_characters().alphabet), "length": LENGTH}


def _parts() -> tuple[Tensor, Tensor]:
    """Passages to pretrain on; and those of the last module, uuid, in random order."""
    count = len(_characters())
    last = torch.randperm(840, generator=torch.Generator().manual_seed(0)) + count - 840
    return torch.arange(count - 900), last


def _text() -> Data:
    data, (_, last) = _characters(), _parts()
    return *data.passages(last[:FINE_TUNED]), *data.passages(last[FINE_TUNED : FINE_TUNED + QUERIES])


def _pretrain(model: nn.Module, seed: int, steps: int = 600) -> None:
    data, (first, _) = _characters(), _parts()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    rng = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model, *data.passages(first[torch.randint(len(first), (32,), generator=rng)])).mean().backward()
        optimizer.step()
        schedule.step()


def _sums() -> Data:
    data = modular.ordered_pairs(23, 0.65, 0)
    test = data.test[torch.randperm(len(data.test), generator=torch.Generator().manual_seed(0))[:QUERIES]]
    return data.x[data.train], data.y[data.train], data.x[test], data.y[test]


def _sgd(p: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-3)


def _adamw(p: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(p, lr=3e-3, weight_decay=1e-2)


def _slow_adamw(p: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(p, lr=1e-3, weight_decay=0.1, betas=(0.9, 0.95))


def _grokking(p: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(p, lr=0.01, weight_decay=1.0, betas=(0.9, 0.98))


def _on_digits(name: str, activation: str, pooling: str = "", warmup: int = 0) -> Setting:
    """pooling: of a network with convolutions; without it has none."""
    optimizer = {"sgd": _sgd, "adamw": _adamw}[name]
    said = {"sgd": "SGD, lr 0.05, momentum 0.9, decay 1e-3", "adamw": "AdamW, lr 3e-3, decay 1e-2"}[name]
    says = f"500 digits of 8 x 8, 200 steps of 50; {said}" + (f", {warmup} steps of warm-up" if warmup else "")
    says += f"; pooling by the {pooling}" if pooling else ""
    arguments = {"activation": activation} | ({"pooling": pooling} if pooling else {})
    return Setting("Cnn" if pooling else "Mlp", lambda: arguments, optimizer, _digits, 200, 50, warmup, says=says)


def _on_sums(steps: int) -> Setting:
    says = f"343 of the 529 sums modulo 23, {steps} steps of all of them; AdamW, lr 0.01, decay 1"
    return Setting("Pairs", lambda: {"activation": "relu", "p": 23, "hidden": 64}, _grokking, _sums, steps, says=says)


_GPT = (
    f"pretrained on 16 800 passages of the standard library, fine-tuned on {FINE_TUNED} of uuid, 80 steps of 16; AdamW, lr "
    f"1e-3, decay 0.1, 10 steps of warm-up; float32"
)
SETTINGS = {
    **{
        f"{kind} {optimizer} {activation}": _on_digits(optimizer, activation, pooling)
        for activation in ("gelu", "relu")
        for kind, pooling in (("mlp", ""), ("cnn", "max"))
        for optimizer in ("sgd", "adamw")
    },
    "mlp adamw gelu warm-up": _on_digits("adamw", "gelu", warmup=20),
    "cnn sgd gelu smooth": _on_digits("sgd", "gelu", "mean"),
    "cnn adamw gelu smooth": _on_digits("adamw", "gelu", "mean", 20),
    "gpt": Setting("Gpt", _alphabet, _slow_adamw, _text, 80, 16, 10, _pretrain, _GPT, torch.float32),
    "sums before grokking": _on_sums(200),
    "sums after grokking": _on_sums(1000),
}
