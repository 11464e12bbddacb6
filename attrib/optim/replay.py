"""From a torch optimizer to arrays, and a recorded step replayed over the whole parameter vector.

The hyper-parameters of a step are stored per parameter tensor, (K, H), because torch keeps age and activity per
tensor. Neighbouring tensors with equal rows are replayed together, as one slice.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..kernels import recurrence
from ..kernels.recurrence import IDLE, Coefficients
from ..layout import Layout
from .rule import Rule

Parts = list[tuple[slice, Coefficients]]


def read_hyper(rule: Rule, optimizer: torch.optim.Optimizer) -> np.ndarray:
    """(K, H + 1) float64: the rule's numbers for each parameter tensor before the step, and whether it takes part."""
    rows = []
    for group in optimizer.param_groups:
        for p in group["params"]:
            state: dict[str, Any] = optimizer.state.get(p, {})
            rows.append((*rule.read(group, state), float(p.grad is not None)))
    return np.array(rows, dtype=np.float64)


def read_state(rule: Rule, optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor]) -> dict[str, Tensor]:
    """The accumulators of all parameters as new vectors (P,), zeros where torch has made none yet."""
    return {
        key: torch.cat([_accumulator(optimizer.state.get(p, {}), key, p).detach().reshape(-1) for p in parameters])
        for key in rule.state
    }


def _accumulator(state: dict[str, Any], key: str, like: Tensor) -> Tensor:
    value = state.get(key)
    return torch.zeros_like(like) if value is None else value


class Replay:
    """Runs a rule over recorded gradients from a known state: one `step` per recorded step, in order.

    state: the accumulators before the next step, vectors (P,).
    """

    def __init__(self, rule: Rule, layout: Layout, state: dict[str, Tensor]) -> None:
        self.rule, self.layout, self.state = rule, layout, dict(state)

    def step(self, hyper: np.ndarray, gradient: Tensor, theta: Tensor) -> tuple[Parts, Tensor]:
        """Advance by one step: (K, H + 1), (P,), (P,) -> coefficients per slice, the update Delta (P,)."""
        parts: Parts = []
        delta = torch.empty_like(theta)
        after = {key: value.clone() for key, value in self.state.items()}
        for part, row in self._runs(hyper):
            coefficients = IDLE
            before = {key: value[part] for key, value in self.state.items()}
            if row[-1]:
                named = dict(zip(self.rule.hyper, row, strict=False))
                coefficients, moments = self.rule.freeze(named, before, gradient[part], theta[part])
                for key, value in moments.items():
                    after[key][part] = value
            momentum = before[self.rule.momentum]
            delta[part], after[self.rule.momentum][part] = recurrence.update(
                coefficients, momentum, gradient[part], theta[part]
            )
            parts.append((part, coefficients))
        self.state = after
        return parts, delta

    def _runs(self, hyper: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
        """Slices of neighbouring tensors whose rows agree."""
        starts = [0, *(np.flatnonzero((hyper[1:] != hyper[:-1]).any(axis=1)) + 1), len(hyper)]
        for a, b in itertools.pairwise(starts):
            yield slice(int(self.layout.bounds[a]), int(self.layout.bounds[b])), hyper[a]


def pullback(parts: Parts, carry: Tensor, path_gradient: Tensor) -> tuple[Tensor, Tensor]:
    """`kernels.recurrence.pullback` over all slices: (Q, P), (Q, P) -> sensitivity, carry before the step."""
    pieces = [recurrence.pullback(k, carry[:, part], path_gradient[:, part]) for part, k in parts]
    return torch.cat([u for u, _ in pieces], dim=1), torch.cat([c for _, c in pieces], dim=1)


def decay(parts: Parts, sensitivity: Tensor, path_gradient: Tensor, theta: Tensor) -> Tensor:
    """`kernels.recurrence.decay` over all slices: (Q, P)."""
    pieces = [recurrence.decay(k, sensitivity[:, s], path_gradient[:, s], theta[s]) for s, k in parts]
    return torch.cat(pieces, dim=1)
