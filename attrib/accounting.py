"""Accounting: what every step of the realised path did to the measurement.

    Gbar_s                       path gradient: <Gbar_s, Delta_s> = m(theta_{s+1}) - m(theta_s)
    U_s, carry                   the update pulled back: sensitivity of m(theta_T) to the gradient of step s
    decay, timeline              what weight decay and a penalty did; what the step's update did
    buffers                      what the step's change of the running statistics did: <Gbar_s, b_{s+1} - b_s>, Gbar_s and
                                 the measurement being those of (theta, b)
    what is left of the carry, times the momentum before the first step: inherited

The adjoint of theta starts afresh at every step, so the path gradients of all steps can be had at once; only the carry, the
sensitivity to the momentum, has to be gone through in order.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .buffers import at_owners, with_buffers
from .layout import Layout
from .optim import Segments, decay_rates, entrywise_decay, explained, pullback
from .path import Limit, Measured, Path, PathGradient, limit_bound, limit_gap
from .sensitivity import Adjoint, Products, Terms, Traced, along_tensors
from .steps import Steps

LIMIT_STEPS = 2  # that the limit is looked at, side by side


class Along(NamedTuple):
    """Of n steps <V, v> over each tensor (n, Q, K), for v the change of the parameters, the replayed update, the parameters,
    and the change less the update where the rule explains it; and sum_p |V_p theta_p| (n, Q), which times eps bounds what
    rounding of the stored parameters can do."""

    moved: np.ndarray
    replayed: np.ndarray
    theta: np.ndarray
    off: np.ndarray
    leverage: np.ndarray


class Prepared(NamedTuple):
    """Of n steps: the vectors (n, Q, P) float64 that are pulled back, Gbar, None once they are; the coefficients of the
    updates; what goes along the vectors, None where they are not known yet; the measurement at both ends
    (n, Q); the rates of decay (n, 2, K); where it was looked at, the limit; and what decay that is coupled entry by entry
    added, (n, Q, K); missed (n, P): see `Steps`, and what it adds along the carry, (n, Q, K); and where training changes
    buffers b, <Gbar_b, their change> (n, Q, K)."""

    vectors: Tensor | None
    coefficients: list[Segments]
    along: Along | None
    start: np.ndarray
    end: np.ndarray
    rates: np.ndarray
    limit: Limit | None
    entrywise: np.ndarray | None = None
    missed: Tensor | None = None
    along_carry: np.ndarray | None = None
    buffers: np.ndarray | None = None


class Pulled(NamedTuple):
    """sensitivity: U (n, Q, P) of n steps; carry (Q, P): to the accumulator before them; entrywise (n, Q, K): what decay
    that is coupled entry by entry added, along_carry: what the accumulators missed; None for nothing."""

    sensitivity: Tensor
    carry: Tensor
    entrywise: np.ndarray | None
    along_carry: np.ndarray | None

    @property
    def left(self) -> dict[str, Any]:
        """What of a `Prepared` is other once its vectors are pulled back."""
        return {"coefficients": [], "missed": None, "entrywise": self.entrywise, "along_carry": self.along_carry}


@dataclass(frozen=True)
class Accounting:
    """m(theta_b) - m(theta_a) along the realised path.

    measured: the measurement. path: how a change of it is written through the update. limit_before: the state at whose step
    it is seen to that the path tends to the gradient; None for nowhere. unmodelled: whether updates may hold more than what
    their rule makes of the gradients; that is a row of its own then, on the step that moved the parameters.
    """

    measured: Measured
    path: Path
    limit_before: int | None = None
    unmodelled: bool = False

    def __reduce__(self) -> tuple[Any, ...]:
        return Accounting, (self.measured, self.path, self.limit_before, self.unmodelled)

    @cached_property
    def _integrate(self) -> Callable[[Tensor, Tensor], PathGradient]:
        return self.path.bind(self.measured)

    @property
    def at_once(self) -> int:
        return self.measured.steps_at_once()

    def begin(self) -> Adjoint:
        size = self.measured.count, self.measured.parameters.size
        return Adjoint(torch.zeros(size, dtype=torch.float64, device=self.measured.example.device))

    def prepare(self, steps: Steps) -> Prepared:
        states = with_buffers(steps.theta, steps.buffers).to(self.measured.example.device)
        limit = self.limit(steps, states)
        path = self.integrated(states)
        vectors, buffers = self.parted(path.gradient.double(), steps)
        along = along_updates(self.measured.parameters, vectors, steps)
        coefficients = [segments for segments, _ in steps.updates]
        start, end = (t.double().cpu().numpy() for t in (path.start, path.end))
        rates, missed = self.rates(coefficients), steps.missed
        return Prepared(vectors, coefficients, along, start, end, rates, limit, missed=missed, buffers=buffers)

    def scan(self, steps: Steps, prepared: Prepared, adjoint: Adjoint) -> tuple[Traced, Adjoint]:
        assert prepared.vectors is not None
        pulled = self.pulled(steps, prepared, prepared.vectors, adjoint.state)
        left = prepared._replace(vectors=None, **pulled.left)
        return Traced(pulled.sensitivity, left), Adjoint(pulled.carry)

    def terms(self, steps: Steps, traced: Traced, products: Products) -> Terms:
        p: Prepared = traced.prepared
        assert p.along is not None
        return self.summed(steps, p.along, p.along.moved, p, products)

    def inherited(self, steps: Steps, adjoint: Adjoint) -> np.ndarray:
        return over_tensors(self.measured.parameters, adjoint.state * steps.momentum.to(adjoint.state.device))

    # what a sensitivity of the same optimizers shares

    def integrated(self, states: Tensor) -> PathGradient:
        """Of the steps between n + 1 states, as many at once as are best."""
        backwards = []
        for stop in range(len(states) - 1, 0, -self.at_once):
            several = states[max(0, stop - self.at_once) : stop + 1]
            backwards.append(self._integrate(several[:-1], several[1:]))
        if len(backwards) == 1:
            return backwards[0]
        return PathGradient(*map(torch.cat, zip(*backwards[::-1], strict=True)))

    def parted(self, vectors: Tensor, steps: Steps) -> tuple[Tensor, np.ndarray | None]:
        """Vectors (n, Q, P + E): those along the parameters, (n, Q, P), and what the buffers' changes do along the rest,
        (n, Q, K), each at the tensor that it stands with; None where no buffer moves."""
        layout, buffers = self.measured.parameters, self.measured.buffers
        if not buffers.names:
            return vectors, None
        moved = steps.buffers.double().diff(dim=0).to(vectors.device)
        each = over_tensors(buffers, vectors[..., layout.size :] * moved[:, None])
        return vectors[..., : layout.size].contiguous(), at_owners(layout, buffers, each)

    def pulled(self, steps: Steps, prepared: Prepared, vectors: Tensor, carry: Tensor) -> "Pulled":
        """vectors (n, Q, P), through the updates of the steps and what follows, carry (Q, P)."""
        backwards, decays, missed = [], [], []
        for n in reversed(range(len(prepared.coefficients))):
            here = [segment.to(carry.device) for segment in prepared.coefficients[n]]
            if prepared.missed is not None:
                missed.append(over_tensors(self.measured.parameters, carry * prepared.missed[n].to(carry)))
            sensitivity, carry = pullback(here, carry, vectors[n])
            backwards.append(sensitivity)
            decays.append(entrywise_decay(here, self.measured.parameters, sensitivity, partial(_before, steps, n)))
        several = torch.stack(backwards[::-1]) if len(backwards) > 1 else backwards[0][None]
        return Pulled(several, carry, _stacked(decays[::-1]), np.stack(missed[::-1]) if missed else None)

    def limit(self, steps: Steps, states: Tensor) -> Limit | None:
        """Where it is due, at the last of the states (n + 1, P)."""
        if steps.range.stop != self.limit_before:
            return None
        at = min(len(states) - 1, self.at_once, LIMIT_STEPS)
        return limit_gap(self.measured, self._integrate, states[-at - 1 :])

    def rates(self, coefficients: list[Segments]) -> np.ndarray:
        """Of decay, (n, 2, K)."""
        return np.stack([decay_rates(segments, len(self.measured.parameters.names)) for segments in coefficients])

    def summed(self, steps: Steps, along: Along, timeline: np.ndarray, prepared: Prepared, products: Products) -> Terms:
        """along: what goes along the vectors that are pulled back. timeline (n, Q, K): the changes of the measurement."""
        p, eps = prepared, torch.finfo(steps.theta.dtype).eps
        decay = p.rates[:, None, 0] * products.theta - p.rates[:, None, 1] * along.theta
        decay = decay if p.entrywise is None else decay + p.entrywise
        decay = decay if products.penalty is None else decay + products.penalty
        timeline = timeline if p.buffers is None else timeline + p.buffers
        off, moved, changed = along.moved - along.replayed, np.abs(along.moved).sum(2), np.abs(timeline).sum(2)
        # each gap relative to the gross size of what is summed, so that cancellation does not blow it up
        gross = changed + np.abs(p.start) + np.abs(p.end)
        rows = {"decay": decay, "timeline": timeline}
        sums = {"gross": np.abs(decay).sum(2), "rounding": off.sum(2), "spacing": eps * along.leverage}
        if p.buffers is not None:
            rows["buffers"] = p.buffers
            sums["gross"] = sums["gross"] + np.abs(p.buffers).sum(2)
        step = relative(np.abs(along.off).max(2), np.maximum(moved, eps**0.5 * along.leverage))
        off = off if p.along_carry is None else off + p.along_carry
        if self.unmodelled:  # what no rule explains, rounding among it, is a row
            rows["update_remainder"] = off
            if steps.block.trajectory.rules.low is not None:  # and all of it is rounding
                step = np.full(len(off), np.nan)
            zeros = np.zeros_like(moved)
            sums = {"gross": sums["gross"] + np.abs(off).sum(2), "rounding": zeros, "spacing": zeros}
        measurement = relative(np.abs(timeline.sum(2) - (p.end - p.start)), gross)
        terms = Terms(
            rows=rows,
            states={"curve": (p.start, p.end)},
            sums=sums,
            gaps={"step": step, "measurement": measurement},
            seen=np.abs(p.start) + np.abs(p.end),
        )
        return terms if p.limit is None else self._with_limit(terms, p.limit)

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


def along_updates(layout: Layout, vectors: Tensor, steps: Steps) -> Along:
    """V (n, Q, P), of the n steps."""
    theta = steps.theta.to(vectors.device)
    update = torch.stack([delta for _, delta in steps.updates]).to(vectors.device)
    rules = steps.block.trajectory.rules
    updates = steps.updates if rules.unmodelled and rules.low is None else []
    masks = [explained(rules, segments, delta) for segments, delta in updates]
    mask = torch.stack([m for m in masks if m is not None]).to(vectors.device) if masks else None

    def along(part: slice) -> list[Tensor]:
        states = theta[:, part].double()
        change, replayed = states[1:] - states[:-1], update[:, part].double()
        some = [] if mask is None else [(change - replayed) * mask[:, part]]
        return [change, replayed, states[:-1], *some]

    leverage = vectors.new_zeros(vectors.shape[:2])
    for _, part in layout.slices():
        leverage += (vectors[..., part].abs() @ theta[:-1, part].double().abs().unsqueeze(2)).squeeze(2)
    moved, replayed, before, *some = along_tensors(layout, vectors, along)
    return Along(moved, replayed, before, some[0] if some else moved - replayed, leverage.cpu().numpy())


def _before(steps: Steps, n: int) -> Tensor:
    return steps.theta[n]


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
