"""What a sweep asks: how much the measurement depends on the gradient of every step. The sweep does not know which question.

    prepare     what needs no later step: anywhere, several steps at once
    scan        U_s, the sensitivity to the gradient of step s, from that to all that follows: in order, on the caller
    terms       what of the steps is no example's: anywhere
    inherited   what was there before the first step

A new question is one class with these methods: see `Accounting`. `scan` gives the next adjoint and changes none.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from .layout import Layout
from .steps import Steps


@dataclass(frozen=True)
class Adjoint:
    """Sensitivity of the measurement to what a step hands on: state (Q, P), to the accumulator that is linear in the
    gradients; theta (Q, P), to the parameters, None where it starts afresh at every step."""

    state: Tensor
    theta: Tensor | None = None


class Traced(NamedTuple):
    """sensitivity: U (n, Q, P) float64, of n steps. prepared: what else `terms` needs."""

    sensitivity: Tensor
    prepared: Any = None


class Products(NamedTuple):
    """<U, v> over each parameter tensor, (n, Q, K) each, for v the parameters before the step, the recorded gradient of the
    examples, and that of the penalty where there was one."""

    theta: np.ndarray
    gradient: np.ndarray
    penalty: np.ndarray | None = None


@dataclass(frozen=True)
class Terms:
    """What n steps add that is no example's, by name. rows (n, Q, K); states: at both ends of each step, (n, Q) twice; sums
    (n, Q); gaps (n,) and failures: of identities; seen (n, Q): the size of what was measured, whose rounding is in all, or
    None."""

    rows: dict[str, np.ndarray] = field(default_factory=dict)
    states: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    sums: dict[str, np.ndarray] = field(default_factory=dict)
    gaps: dict[str, np.ndarray] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    seen: np.ndarray | None = None

    def seen_at(self, n: int) -> np.ndarray | float:
        """(Q,) of the n-th step; 0 where nothing was measured."""
        return 0.0 if self.seen is None else self.seen[n]


def along_tensors(layout: Layout, vectors: Tensor, along: Callable[[slice], Sequence[Tensor]]) -> np.ndarray:
    """vectors (n, Q, P) times V others, over each parameter tensor: (V, n, Q, K). along: some entries of a tensor -> V times
    (n, p), float64."""
    sums: list[Any] = [0.0] * len(layout.names)
    for k, part in layout.pieces():
        sums[k] = sums[k] + torch.stack([dots(vectors[..., part], v) for v in along(part)])
    return torch.stack(sums, 3).cpu().numpy()


def dots(vectors: Tensor, others: Tensor) -> Tensor:
    """(n, Q, p), (n, p) -> (n, Q). Of one query each product is a matrix of a row, which no library is fast at."""
    if vectors.shape[1] == 1:
        return (vectors * others.unsqueeze(1)).sum(2)
    return (vectors @ others.unsqueeze(2)).squeeze(2)


class Sensitivity(Protocol):
    """Pickles, so that a worker can prepare. at_once: steps best taken together."""

    @property
    def at_once(self) -> int: ...

    def begin(self) -> Adjoint:
        """What stands after the last step."""
        ...

    def prepare(self, steps: Steps) -> Any:
        """What needs no adjoint."""
        ...

    def scan(self, steps: Steps, prepared: Any, adjoint: Adjoint) -> tuple[Traced, Adjoint]:
        """U of the steps, and the adjoint before the first of them."""
        ...

    def terms(self, steps: Steps, traced: Traced, products: Products) -> Terms:
        """What is no example's."""
        ...

    def inherited(self, steps: Steps, adjoint: Adjoint) -> np.ndarray:
        """(Q, K): what was there before the first of the steps."""
        ...
