"""The records that go into a capture and come out of it, all frozen."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from ..autocast import Autocast
from ..batch import Batch
from ..checks import Draws, Reduction
from ..gradients.stored import Described
from ..kernels.factors import Factor
from .listen import Heard

Arrays = dict[str, np.ndarray]  # of a step, by name, (B, ...) each
Factors = dict[str, list[Factor]]  # of each parameter the factors that sum to its shares


@dataclass(frozen=True)
class CaptureOptions:
    """kind: what is stored of the shares. check_every: the identities are checked at the first steps and every so many.
    penalty: model -> scalar, what of the loss is no example's. remainder: what becomes of what p.grad holds beyond the
    shares, "refuse" or "account". shares: what a share is, "example" or "rows"."""

    kind: str
    check_every: int
    penalty: Callable[[nn.Module], Tensor] | None = None
    remainder: str = "refuse"
    shares: str = "example"


@dataclass(frozen=True)
class Announced:
    """A pass that the gradient of a step is made of: its batch, and the state of the generators when it was announced; None
    where that was after the pass; original: the caller's own tensors, of which the batch is a copy."""

    batch: Batch
    random: Tensor | None = None
    original: Batch | None = None

    @property
    def steady(self) -> bool:
        """Whether the caller's tensors still hold what they did when the batch was announced."""
        return self.original is None or all(map(torch.equal, self.batch.tensors, self.original.tensors))


@dataclass(frozen=True)
class Settled:
    """What the steps so far have shown of the loop; nothing before the first.

    forwards: how many forward passes of the model follow an announced batch, by its tree; None where that differs. late:
    whether the random numbers of a loss start from the state before its forward pass, not from that when it was announced.
    described, shapes: of stored factors what they are, and of one example each array's shape. autocast: what the loss is
    computed under. coupled: whether a batch was met whose losses depend on each other.
    """

    reduction: Reduction = field(default_factory=Reduction)
    draws: Draws = field(default_factory=Draws)
    forwards: dict[str, int | None] = field(default_factory=dict)
    late: bool = False
    described: Described | None = None
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    autocast: Autocast | None = None
    coupled: bool = False


@dataclass(frozen=True)
class Step:
    """A step about to be made. theta (P,); gradient (P,), p.grad as the optimizer is going to see it; active: names of the
    parameters that have one. buffers: those that training changes, as they were when the step began. elsewhere: what other
    processes heard, whose passes are the last ones."""

    number: int
    theta: Tensor
    gradient: Tensor
    active: frozenset[str]
    passes: tuple[Announced, ...]
    settled: Settled
    buffers: Mapping[str, Tensor] = field(default_factory=dict)
    elsewhere: tuple[Heard, ...] = ()

    @property
    def sizes(self) -> tuple[int, ...]:
        """Of the passes."""
        return tuple(announced.batch.size for announced in self.passes)


@dataclass(frozen=True)
class Captured:
    """What there is to record of a step.

    scales: share = scale * gradient of the example's loss, of each pass; NaN where it is not known. factor_scales: share =
    factor_scale * stored factor. shares: the arrays to be stored. penalty: its part of the gradient (P,). random: the
    generators' state before each pass, (bytes,) uint8, where the loss draws numbers. log: the mean loss and the identities,
    where they were checked. settled: for the next step.
    """

    scales: np.ndarray
    factor_scales: np.ndarray
    shares: Arrays
    penalty: Tensor | None
    random: list[np.ndarray | None]
    log: dict[str, float]
    settled: Settled
