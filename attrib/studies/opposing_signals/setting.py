"""Digits at the edge of stability: the images, plain or with a planted signal, and how much is done with them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import digits, frame

CLASSES = (3, 8)  # of the planted signal


@dataclass(frozen=True, kw_only=True)
class Setting(frame.Setting):
    """images: that are trained on, all of them at every step; lr, steps: of gradient descent. every: states between two
    looks at the sharpness. window: steps from where the sharpness passes 2 / lr: of the first half it is told who
    changed whose loss, and groups follow; how they move is judged in the second. shuffled_steps,
    shuffled_every: of the run with shuffled labels, which takes longer to get there. adam_lr: of the Adam run;
    adam_steps: told apart in it, with `lead` steps of momentum. retrain: steps that are trained again from the
    beginning of the window with examples left out or down-weighted. planted_images, planted: images in all, and with a
    bright corner in each of two classes; brightness: of the corner, the brightest pixel of an image being 1;
    planted_steps: of training; planted_window: steps from the middle on."""

    images: int = 500
    lr: float = 0.1
    steps: int = 400
    every: int = 10
    window: int = 100
    shuffled_steps: int = 1400
    shuffled_every: int = 50
    adam_lr: float = 0.002
    adam_steps: int = 8
    lead: int = 15
    retrain: int = 100
    planted_images: int = 300
    planted: int = 8
    brightness: tuple[float, ...] = (10.0, 5.0)
    planted_steps: int = 200
    planted_window: int = 40


_ABOUT = "scikit-learn's digits, a network with two convolutions (9 946 parameters), full-batch gradient descent"
SETTINGS = {
    "quick": Setting(name="quick", about=_ABOUT, seeds=3),
    "toy": Setting(
        name="toy",
        about=f"{_ABOUT}; few images and steps: to see that everything runs, not to learn from",
        seeds=1,
        images=60,
        lr=0.2,
        steps=80,
        window=20,
        shuffled_steps=80,
        shuffled_every=20,
        adam_steps=3,
        lead=3,
        retrain=12,
        planted_images=60,
        planted=4,
        brightness=(10.0,),
        planted_steps=60,
        planted_window=10,
    ),
}


def images(count: int, seed: int, shuffled: bool = False) -> tuple[Tensor, Tensor]:
    """x (N, 1, 8, 8), y (N,) of so many of the training digits; `shuffled`: with labels of each other."""
    data, generator = digits.load(), torch.Generator().manual_seed(seed)
    ids = data.train[torch.randperm(len(data.train), generator=generator)[:count]].sort().values
    y = data.y[ids]
    return data.x[ids], y[torch.randperm(count, generator=generator)] if shuffled else y


def planted(count: int, each: int, brightness: float, seed: int) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Images of which some of two classes share a bright corner: a strong signal that says nothing of the class. Also the
    positions of those images, of either class."""
    x, y = images(count, seed)
    marked = [(y == c).nonzero()[:each, 0] for c in CLASSES]
    for where in marked:
        x[where, 0, :2, :2] = brightness
    return x, y, (marked[0], marked[1])
