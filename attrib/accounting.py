"""Accounting: what every step of the realised path did to the measurement.

    Gbar_s                       path gradient: <Gbar_s, Delta_s> = m(theta_{s+1}) - m(theta_s)
    U_s, carry                   the update pulled back: sensitivity of m(theta_T) to the gradient of step s
    decay, timeline              what weight decay and a penalty did; what the step's update did
    what is left of the carry, times the momentum before the first step: inherited

The adjoint of theta starts afresh at every step, so the path gradients of all steps can be had at once; only the carry, the
sensitivity to the momentum, has to be gone through in order.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .layout import Layout
from .optim import Segments, decay_rates, entrywise_decay, pullback
from .path import Limit, Measured, Path, PathGradient, limit_bound, limit_gap
from .sensitivity import Adjoint, Products, Terms, Traced, along_tensors
from .steps import Steps

LIMIT_STEPS = 2  # that the limit is looked at, side by side


class Prepared(NamedTuple):
    """Of n steps: Gbar (n, Q, P) float64, None once it is pulled back; the coefficients of the updates; <Gbar, v> over each
    tensor (n, Q, K) for v the change of the parameters, the replayed update, the parameters; the measurement at both ends
    and sum_p |Gbar_p theta_p|, which times eps bounds what rounding of the stored parameters can do, (n, Q); the rates of
    decay (n, 2, K); where it was looked at, the limit; and what decay that is coupled entry by entry added, (n, Q, K)."""

    vectors: Tensor | None
    coefficients: list[Segments]
    moved: np.ndarray
    replayed: np.ndarray
    along_theta: np.ndarray
    start: np.ndarray
    end: np.ndarray
    leverage: np.ndarray
    rates: np.ndarray
    limit: Limit | None
    entrywise: np.ndarray | None = None


@dataclass(frozen=True)
class Accounting:
    """m(theta_b) - m(theta_a) along the realised path.

    measured: the measurement. path: how a change of it is written through the update. limit_before: the state at whose step
    it is seen to that the path tends to the gradient; None for nowhere.
    """

    measured: Measured
    path: Path
    limit_before: int | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return Accounting, (self.measured, self.path, self.limit_before)

    @cached_property
    def _integrate(self) -> Callable[[Tensor, Tensor], PathGradient]:
        return self.path.bind(self.measured)

    @property
    def at_once(self) -> int:
        return self.measured.steps_at_once()

    def begin(self) -> Adjoint:
        size = self.measured.count, self.measured.layout.size
        return Adjoint(torch.zeros(size, dtype=torch.float64, device=self.measured.example.device))

    def prepare(self, steps: Steps) -> Prepared:
        theta = steps.theta.to(self.measured.example.device)
        limit = self._limit(theta) if steps.range.stop == self.limit_before else None
        path = self._integrated(theta)
        vectors, layout = path.gradient.double(), self.measured.layout
        update = torch.stack([delta for _, delta in steps.updates]).to(theta.device)

        def along(part: slice) -> list[Tensor]:
            states = theta[:, part].double()
            return [states[1:] - states[:-1], update[:, part].double(), states[:-1]]

        moved, replayed, along_theta = along_tensors(layout, vectors, along)
        leverage = torch.zeros_like(path.start, dtype=torch.float64)
        for _, part in layout.slices():
            leverage += (vectors[..., part].abs() @ theta[:-1, part].double().abs().unsqueeze(2)).squeeze(2)
        coefficients = [segments for segments, _ in steps.updates]
        rates = np.stack([decay_rates(segments, len(layout.names)) for segments in coefficients])
        start, end, lever = (t.double().cpu().numpy() for t in (path.start, path.end, leverage))
        return Prepared(vectors, coefficients, moved, replayed, along_theta, start, end, lever, rates, limit)

    def scan(self, steps: Steps, prepared: Prepared, adjoint: Adjoint) -> tuple[Traced, Adjoint]:
        carry, backwards, decays = adjoint.state, [], []
        assert prepared.vectors is not None
        for vectors, segments in zip(reversed(prepared.vectors), reversed(prepared.coefficients), strict=True):
            here = [s.to(carry.device) for s in segments]
            sensitivity, carry = pullback(here, carry, vectors)
            backwards.append(sensitivity)
            theta = steps.theta[len(prepared.coefficients) - len(backwards)]
            decays.append(entrywise_decay(here, self.measured.layout, sensitivity, theta))
        several = torch.stack(backwards[::-1]) if len(backwards) > 1 else backwards[0][None]
        entrywise = _stacked(decays[::-1])
        return Traced(several, prepared._replace(vectors=None, coefficients=[], entrywise=entrywise)), Adjoint(carry)

    def terms(self, steps: Steps, traced: Traced, products: Products) -> Terms:
        p: Prepared = traced.prepared
        eps = torch.finfo(steps.theta.dtype).eps
        decay = p.rates[:, None, 0] * products.theta - p.rates[:, None, 1] * p.along_theta
        decay = decay if p.entrywise is None else decay + p.entrywise
        decay = decay if products.penalty is None else decay + products.penalty
        off, moved = p.moved - p.replayed, np.abs(p.moved).sum(2)
        # each gap relative to the gross size of what is summed, so that cancellation does not blow it up
        gross = moved + np.abs(p.start) + np.abs(p.end)
        terms = Terms(
            rows={"decay": decay, "timeline": p.moved},
            states={"curve": (p.start, p.end)},
            sums={"gross": np.abs(decay).sum(2), "rounding": off.sum(2), "spacing": eps * p.leverage},
            gaps={
                "step": relative(np.abs(off).max(2), np.maximum(moved, eps**0.5 * p.leverage)),
                "measurement": relative(np.abs(p.moved.sum(2) - (p.end - p.start)), gross),
            },
            seen=np.abs(p.start) + np.abs(p.end),
        )
        return terms if p.limit is None else self._with_limit(terms, p.limit)

    def inherited(self, steps: Steps, adjoint: Adjoint) -> np.ndarray:
        return over_tensors(self.measured.layout, adjoint.state * steps.momentum.to(adjoint.state.device))

    def _integrated(self, theta: Tensor) -> PathGradient:
        """Of the steps between n + 1 states, as many at once as are best."""
        backwards = []
        for stop in range(len(theta) - 1, 0, -self.at_once):
            states = theta[max(0, stop - self.at_once) : stop + 1]
            backwards.append(self._integrate(states[:-1], states[1:]))
        if len(backwards) == 1:
            return backwards[0]
        return PathGradient(*map(torch.cat, zip(*backwards[::-1], strict=True)))

    def _limit(self, theta: Tensor) -> Limit:
        at = min(len(theta) - 1, self.at_once, LIMIT_STEPS)
        return limit_gap(self.measured, self._integrate, theta[-at - 1 :])

    def _with_limit(self, terms: Terms, limit: Limit) -> Terms:
        gaps = np.full(len(terms.gaps["step"]), np.nan)
        gaps[-1] = limit.gap
        failures = {}
        if limit.tensor is not None:
            failures["limit"] = (
                f"the path does not tend to the gradient of the measurement: got a gap of {limit.gap:.3g}, expected "
                f"at most {limit_bound(self.measured.dtype):.1g}, at query {limit.query}, parameter {limit.tensor!r}. An "
                f"operation of the measurement has a wrong derivative under this path: try another, such as "
                f"path=attrib.GaussLegendre(nodes=4)."
            )
        return replace(terms, gaps={**terms.gaps, "limit": gaps}, failures=failures)


def _stacked(decays: list[Tensor | None]) -> np.ndarray | None:
    """(n, Q, K), zeros at the steps without one; None where no step has one."""
    some = next((d for d in decays if d is not None), None)
    if some is None:
        return None
    return torch.stack([torch.zeros_like(some) if d is None else d for d in decays]).cpu().numpy()


def over_tensors(layout: Layout, values: Tensor) -> np.ndarray:
    """(..., P) -> (..., K): summed over each parameter tensor."""
    sizes = np.diff(layout.bounds).tolist()
    return torch.stack([part.sum(-1) for part in values.split(sizes, -1)], -1).cpu().numpy()


def relative(difference: np.ndarray, gross: np.ndarray) -> np.ndarray:
    """Largest |difference| over the gross size, (..., Q) each, over the queries."""
    return np.max(difference / np.where(gross > 0, gross, 1.0), axis=-1)
