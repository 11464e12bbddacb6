"""Accounting for an averaged copy of the model, such as an exponential moving average: exact, on the path of the average.

    a_{s+1} = a_s + c_s (theta_{s+1} - a_s)                  the average; c_s is 1 where it copies, 0 where it stands still
    e_s     = theta_s - a_s                                  how far the parameters are from it
    a_{s+1} - a_s = c_s (e_s + Delta_s),   e_{s+1} = (1 - c_s) (e_s + Delta_s)

    <Gbar_s, a_{s+1} - a_s> = m(a_{s+1}) - m(a_s)            the path gradient between two states of the average
    H_s     = c_s Gbar_s + (1 - c_s) H_{s+1}                 sensitivity of m(a_T) to the update of step s, in the place
                                                             of Gbar_s where the optimizer's update is pulled back
    <H_a, e_a>                                               what the parameters were ahead of it before the first step a of
                                                             a window: with the momentum from before, `inherited`

The average is linear in the updates, so all terms add up as they do without it. `timeline` is what each move of the average
itself did. States of the average are kept in float64: an average of float32 numbers is none. Buffers that training changes
are the model's own at every state.
"""

from dataclasses import dataclass
from functools import cached_property
from math import isqrt
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .accounting import Accounting, Prepared, along_updates, over_tensors
from .buffers import with_buffers
from .measure import Average
from .run import Run
from .sensitivity import Adjoint, Products, Terms, Traced, along_tensors
from .steps import Steps


class Averages:
    """The states a_0 .. a_stop of the average of a run, which starts as its parameters do.

    They are followed forwards; those before some blocks are kept, as many as there are blocks between two of them.
    """

    def __init__(self, run: Run, average: Average, stop: int, kept: dict[int, Tensor] | None = None) -> None:
        self._run, self._average, self._stop = run, average, stop
        self._size = run.trajectory.block
        self._spacing = self._size * max(1, isqrt(-(-stop // self._size)))
        self._kept = kept  # (P,) each, by the step that they stand before
        self._near: dict[int, Tensor] = {}  # before every block from one that is kept to the next
        self._states: tuple[int, Tensor] | None = (
            None  # of the last block that was asked for: its first step, (n + 1, P)
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return Averages, (self._run, self._average, self._stop, self._anchors)

    @property
    def count(self) -> int:
        """States held at once, at most."""
        near = self._spacing // self._size + 1
        return self._size + 1 + near + -(-self._stop // self._spacing) + 1

    @property
    def last(self) -> Tensor:
        """(P,): at `stop`."""
        return self._anchors[self._stop]

    def at(self, steps: Steps) -> Tensor:
        """(n + 1, P): from the first of the steps on."""
        block = steps.block
        if self._states is None or self._states[0] != block.first:
            states = [self._before(block.first)]
            for n, theta in enumerate(block.theta[1:]):
                states.append(self._moved(states[-1], theta, block.first + n + 1))
            self._states = block.first, torch.stack(states)
        return self._states[1][steps.range.start - block.first : steps.range.stop - block.first + 1]

    def weights(self, steps: Steps) -> list[float]:
        """c of each step."""
        return [self._average.weight(step + 1) for step in steps.range]

    @cached_property
    def _anchors(self) -> dict[int, Tensor]:
        if self._kept is not None:
            return self._kept
        state = self._run.vector(0).double()
        found = {0: state}
        for first in range(0, self._stop, self._spacing):
            *_, state = self._followed(state, first, min(first + self._spacing, self._stop)).values()
            found[min(first + self._spacing, self._stop)] = state
        return found

    def _before(self, first: int) -> Tensor:
        if first not in self._near:
            anchor = first - first % self._spacing
            self._near = self._followed(self._anchors[anchor], anchor, min(anchor + self._spacing, self._stop))
        return self._near[first]

    def _followed(self, state: Tensor, first: int, stop: int) -> dict[int, Tensor]:
        """From before a block to before each of the next, and `stop`."""
        found = {first: state}
        for at in range(first, stop, self._size):
            until = min(at + self._size, stop)
            for n, theta in enumerate(self._run.trajectory.states(at, until)[1:]):
                state = self._moved(state, theta, at + n + 1)
            found[until] = state
        return found

    def _moved(self, state: Tensor, theta: Tensor, number: int) -> Tensor:
        return state.lerp(theta.double(), self._average.weight(number))


@dataclass(frozen=True)
class Averaged:
    """m(a_b) - m(a_a) along the path of an average. accounting: of the same measurement and path."""

    accounting: Accounting
    averages: Averages

    @property
    def at_once(self) -> int:
        return self.accounting.at_once

    def begin(self) -> Adjoint:
        state = self.accounting.begin().state
        return Adjoint(state, torch.zeros_like(state))

    def prepare(self, steps: Steps) -> tuple[Prepared, np.ndarray]:
        """The path gradients between the states of the average, and its own moves along them (n, Q, K)."""
        measured = self.accounting.measured
        states = with_buffers(self.averages.at(steps), steps.buffers).to(measured.example.device)
        path = self.accounting.integrated(states)
        vectors, buffers = self.accounting.parted(path.gradient, steps)
        (timeline,) = along_tensors(measured.parameters, vectors, lambda part: [states[1:, part] - states[:-1, part]])
        coefficients = [segments for segments, _ in steps.updates]
        start, end = (t.double().cpu().numpy() for t in (path.start, path.end))
        limit, rates = self.accounting.limit(steps, states), self.accounting.rates(coefficients)
        missed = steps.missed
        return Prepared(vectors, coefficients, None, start, end, rates, limit, missed=missed, buffers=buffers), timeline

    def scan(self, steps: Steps, prepared: Any, adjoint: Adjoint) -> tuple[Traced, Adjoint]:
        p, timeline = prepared
        through, backwards = adjoint.theta, []
        assert through is not None
        for vectors, weight in reversed(list(zip(p.vectors, self.averages.weights(steps), strict=True))):
            through = weight * vectors + (1 - weight) * through
            backwards.append(through)
        vectors = torch.stack(backwards[::-1])
        pulled = self.accounting.pulled(steps, p, vectors, adjoint.state)
        later = p._replace(vectors=vectors, **pulled.left)
        return Traced(pulled.sensitivity, (later, timeline)), Adjoint(pulled.carry, through)

    def terms(self, steps: Steps, traced: Traced, products: Products) -> Terms:
        p, timeline = traced.prepared
        along = along_updates(self.accounting.measured.parameters, p.vectors, steps)
        return self.accounting.summed(steps, along, timeline, p, products)

    def inherited(self, steps: Steps, adjoint: Adjoint) -> np.ndarray:
        assert adjoint.theta is not None
        ahead = (steps.theta[0].double() - self.averages.at(steps)[0]).to(adjoint.theta.device)
        layout = self.accounting.measured.parameters
        return self.accounting.inherited(steps, adjoint) + over_tensors(layout, adjoint.theta * ahead)
