"""Handwritten digits: scikit-learn's 1797 real 8 x 8 images, a small ReLU network with convolutions and max pooling."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .recipe import cross_entropy, train_recorded


@dataclass(frozen=True)
class Digits:
    """x (N, 1, 8, 8) float32 in [0, 1], y (N,) int64; ids of the training and the test images."""

    x: Tensor
    y: Tensor
    train: Tensor
    test: Tensor


class DigitsCnn(nn.Module):
    """Two convolutions with max pooling, one hidden layer: 9 946 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1)
        self.hidden = nn.Linear(128, 32)
        self.output = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        return self.output(F.relu(self.hidden(x.flatten(1))))


def load(train: int = 1400, seed: int = 0) -> Digits:
    """The images that ship with scikit-learn, split at random."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    return Digits(x, torch.tensor(labels), order[:train], order[train:])


def train(data: Digits, store: Any, epochs: int = 8, seed: int = 0, **options: Any) -> DigitsCnn:
    """SGD with momentum 0.9, weight decay 5e-4, a one-cycle schedule, batches of 64; recorded to `store`."""
    torch.manual_seed(seed)
    model = DigitsCnn()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    batches = [b for _ in range(epochs) for b in data.train[torch.randperm(len(data.train))].split(64)]
    train_recorded(
        model,
        optimizer,
        cross_entropy,
        ((index, data.x[index], data.y[index]) for index in batches),
        store,
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=len(batches)),
        **options,
    )
    return model
