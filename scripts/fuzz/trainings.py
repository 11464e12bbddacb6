"""Small training runs that between them use all that a store can hold, and the loop that records them.

Whatever the loop draws, it draws from the global generators, so that a run that is gone on with shows whether they were put
back. Model and parameters are made anew for it, from another seed.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attrib

STEPS = 5
LENGTH, INPUTS, WIDTH, CLASSES, EXAMPLES = 3, 3, 4, 2, 10


class Net(nn.Module):
    """Two layers over the mean of rows of inputs, with a buffer and a frozen parameter, and dropout."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(INPUTS, WIDTH), nn.Linear(WIDTH, CLASSES)
        self.register_buffer("gain", torch.linspace(0.5, 1.5, WIDTH))
        self.shift = nn.Parameter(torch.linspace(-0.1, 0.1, CLASSES), requires_grad=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.dropout(torch.tanh(self.first(x.mean(1))) * self.gain)) + self.shift


def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y, reduction="none")


def penalty(model: nn.Module) -> Tensor:
    return 0.01 * sum(p.square().sum() for p in model.parameters() if p.requires_grad)


def momentum(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.01)


def adamw(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.02, weight_decay=0.1, betas=(0.8, 0.9))


@dataclass(frozen=True)
class Training:
    """sizes: of the batches, in turn; lengths: rows of the inputs, in turn. named: examples have names. options: of
    `attrib.record`. early: the run ends without being closed."""

    capture: str
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer]
    sizes: tuple[int, ...] = (4,)
    lengths: tuple[int, ...] = (1,)
    named: bool = False
    dropout: float = 0.0
    penalty: Callable[[nn.Module], Tensor] | None = None
    dtype: torch.dtype = torch.float64
    options: dict[str, Any] = field(default_factory=lambda: {"block": 2})
    early: bool = False

    def model(self) -> Net:
        return Net(self.dropout).to(self.dtype)

    def begin(self, store: Path, seed: int, **options: Any) -> attrib.Recorder:
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002 - the global one is what loops draw from
        model = self.model()
        asked = {**self.options, "penalty": self.penalty, **options}
        trained = [p for p in model.parameters() if p.requires_grad]
        return attrib.record(self.optimizer(trained), model, loss, store, self.capture, **asked)

    def go_on(self, recorder: attrib.Recorder, steps: int) -> None:
        """Train until so many steps are recorded, with a learning rate that falls."""
        x, y = data(self.dtype)
        for step in range(recorder.steps, steps):
            for group in recorder.param_groups:
                group["lr"] = recorder.defaults["lr"] * 0.9**step
            index = torch.randperm(EXAMPLES)[: self.sizes[step % len(self.sizes)]]
            noise = random.random() * np.random.rand() if step % 3 == 2 else 0.0  # noqa: NPY002
            batch = x[index, : self.lengths[step % len(self.lengths)]] + noise, y[index]
            recorder.zero_grad()
            total = loss(recorder.model, *batch).mean()
            (total if self.penalty is None else total + self.penalty(recorder.model)).backward()
            recorder.step([f"example {n}" for n in index.tolist()] if self.named else index, *batch)

    def record(self, store: Path, seed: int, steps: int = STEPS, **options: Any) -> None:
        """A whole run, or one that ended early."""
        recorder = self.begin(store, seed, **options)
        self.go_on(recorder, steps)
        if self.early:
            recorder.__exit__(ValueError, ValueError("ended early"), None)
        else:
            recorder.close()

    def attribute(self, run: attrib.Run, **options: Any) -> attrib.Result:
        x, y = data(self.dtype)
        with_loss = {"loss": loss} if self.capture == "replay" else {}
        measurement = attrib.measure.log_prob(x[:2, :1], y[:2])
        model = self.model().eval()
        run.load(model, run.steps)
        return attrib.attribute(run, model, measurement, progress=False, **with_loss, **options)


def data(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(EXAMPLES, LENGTH, INPUTS, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.randint(0, CLASSES, (EXAMPLES,), generator=generator)


GROWING = (3, 3, 5, 4, 7, 6, 9, 2)
TRAININGS = {
    "replay": Training("replay", momentum, GROWING, lengths=(1, 1, 3, 2), dropout=0.3),
    "replay, few states": Training(
        "replay", adamw, named=True, penalty=penalty, options={"block": 2, "states_every": 4}
    ),
    "gradients": Training("gradients", adamw, GROWING, dtype=torch.float32, penalty=penalty),
    "factors": Training("factors", momentum, (4, 3), dropout=0.3),
    "ended early": Training(
        "gradients", momentum, (4, 3), named=True, dropout=0.3, options={"block": None}, early=True
    ),
}
