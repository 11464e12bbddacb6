"""A planted vestigial layer: a branch that is useful until a step, then made redundant by construction.

    out(x) = early(x) + late(x)        two small ReLU networks

Until step `turn` only `early` learns; from then on only `late` does, while `early` is decayed to nothing. What is
learned is the side of a hyperplane; the measurement, the mean signed output on held-out points, is linear in the two
branches, so what decay takes from `early` is not hidden by `late` standing in.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..recipe import train_recorded

GROUPS = {"early": ["early.*"], "late": ["late.*"]}
RATE, DECAY = 0.3, 0.3


class TwoBranches(nn.Module):
    def __init__(self, inputs: int = 8, hidden: int = 16) -> None:
        super().__init__()
        self.early, self.late = (
            nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, 1)) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        return (self.early(x) + self.late(x)).squeeze(-1)


def points(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """x (N, 8), y (N,) of +1 and -1, the side of a hyperplane that is the same for all seeds."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 8, generator=generator)
    normal = torch.randn(8, generator=torch.Generator().manual_seed(0))
    return x, (x @ normal).sign()


def loss(model: Any, x: Tensor, y: Tensor) -> Tensor:
    """(B,): logistic, in nats."""
    return F.softplus(-y * model(x))


def signed_output(seed: int) -> Any:
    """model -> (1,): the mean output towards the right side, on 256 points that are not trained on."""
    x, y = points(256, 10_000 + seed)

    def measure(model: Any) -> Tensor:
        return (y.to(next(iter(model.parameters())).dtype) * model(x)).mean()[None]

    return measure


def train(store: Path, steps: int = 300, turn: int = 150, seed: int = 0) -> TwoBranches:
    """Gradient descent on 128 points, recorded."""
    torch.manual_seed(seed)
    model = TwoBranches()
    branches = [list(branch.parameters()) for branch in (model.early, model.late)]
    optimizer = torch.optim.SGD([{"params": branches[0], "lr": RATE}, {"params": branches[1], "lr": 0.0}], lr=RATE)
    x, y = points(128, seed)

    def after(step: int) -> bool:
        if step == turn:
            early, late = optimizer.param_groups
            early["weight_decay"], late["lr"] = DECAY, RATE
        return False

    batches = ((torch.arange(len(x)), x, y) for _ in range(steps))
    train_recorded(model, optimizer, loss, batches, store, after_step=after, overwrite=True)
    return model
