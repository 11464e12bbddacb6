"""From a torch optimizer to arrays, and a recorded step replayed over the whole parameter vector.

The hyper-parameters of a step are stored per parameter tensor, (K, H), because torch keeps age and activity per
tensor. Neighbouring tensors with equal rows are replayed together, as one slice.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..kernels.recurrence import IDLE, Coefficients
from ..layout import Layout
from .rule import Rule

CACHED = 1 << 16  # entries worked on at once, to stay in the cache


class Segment(NamedTuple):
    """Neighbouring tensors with equal numbers, or a piece of them: a slice of the entries P, one of the tensors K that it
    lies in, and the coefficients of their step."""

    entries: slice
    tensors: slice
    coefficients: Coefficients

    def to(self, device: torch.device) -> "Segment":
        return self._replace(coefficients=self.coefficients.to(device))


Segments = list[Segment]


def read_hyper(rule: Rule, optimizer: torch.optim.Optimizer) -> np.ndarray:
    """(K, H + 1) float64: the rule's numbers for each parameter tensor before the step, and whether it takes part."""
    rows = []
    for group in optimizer.param_groups:
        values = rule.values(group)
        for p in group["params"]:
            rows.append((*values, rule.age(optimizer.state.get(p, {})), float(p.grad is not None)))
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

    def step(self, hyper: np.ndarray, gradient: Tensor, theta: Tensor) -> tuple[Segments, Tensor]:
        """Advance by one step: (K, H + 1), (P,), (P,) -> coefficients per segment, the update Delta (P,)."""
        segments: Segments = []
        delta = torch.empty_like(theta)
        after = {key: torch.empty_like(value) for key, value in self.state.items()}
        for piece, tensors, row in self._pieces(hyper):
            before = {key: value[piece] for key, value in self.state.items()}
            coefficients, moments = IDLE, before
            if row[-1]:
                named = dict(zip(self.rule.hyper, row, strict=False))
                options = {**self.rule.options(named), "age": named["age"]}
                coefficients, moments = self.rule.freeze(options, before, gradient[piece], theta[piece])
            for key in self.rule.moments:
                after[key][piece] = moments.get(key, before[key])
            delta[piece], after[self.rule.momentum][piece] = coefficients.apply(
                before[self.rule.momentum], gradient[piece], theta[piece]
            )
            segments.append(Segment(piece, tensors, coefficients))
        self.state = after
        return segments, delta

    def _pieces(self, hyper: np.ndarray) -> Iterator[tuple[slice, slice, tuple[float, ...]]]:
        """Slices of neighbouring tensors whose rows agree, cut where they are longer than the cache."""
        starts = [0, *(np.flatnonzero((hyper[1:] != hyper[:-1]).any(axis=1)) + 1), len(hyper)]
        for a, b in itertools.pairwise(starts):
            row = tuple(hyper[a].tolist())
            lo, hi = int(self.layout.bounds[a]), int(self.layout.bounds[b])
            for start in range(lo, hi, CACHED):
                yield slice(start, min(start + CACHED, hi)), slice(int(a), int(b)), row


def pullback(segments: Segments, carry: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """The transpose of a step over all its segments: (sensitivity to the momentum after it, Gbar), each (Q, P) -> (U,
    sensitivity to the momentum before it), new. A few queries at a time: vectors of many do not fit the cache."""
    sensitivity, before = torch.empty_like(gradient), torch.empty_like(carry)
    for segment in segments:
        at_once = max(1, CACHED // (segment.entries.stop - segment.entries.start))
        for lo in range(0, len(carry), at_once):
            here = slice(lo, lo + at_once), segment.entries
            sensitivity[here], before[here] = segment.coefficients.transpose(carry[here], gradient[here])
    return sensitivity, before


def decay_rates(segments: Segments, tensors: int) -> np.ndarray:
    """(2, K): coupled and decoupled decay of each tensor, which add coupled <U, theta> - decoupled <Gbar, theta> to the
    measurement."""
    rates = np.zeros((2, tensors))
    for segment in segments:
        rates[:, segment.tensors] = [[segment.coefficients.coupled], [segment.coefficients.decoupled]]
    return rates
