"""A recorded step replayed over the whole parameter vector, and pulled back.

The hyper-parameters of a step are stored per parameter tensor, (K, H), because torch keeps age and activity per tensor.
Neighbouring tensors of one rule with equal rows are replayed together, as one slice; where the rule needs whole tensors, one
by one.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..kernels.recurrence import IDLE, Coefficients
from ..layout import Layout
from .frozen import read_off
from .rule import MOMENTUM, Rule, packed, unpacked
from .rules import Rules

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


class Replay:
    """Runs the rules over recorded gradients from a known state: one `step` per recorded step, in order.

    state: the accumulators before the next step, vectors (P,).
    """

    def __init__(self, rules: Rules, layout: Layout, state: dict[str, Tensor]) -> None:
        self.rules, self.layout, self.state = rules, layout, dict(state)

    def step(
        self, hyper: np.ndarray, gradient: Tensor, theta: Tensor, after: Tensor | None = None
    ) -> tuple[Segments, Tensor]:
        """Advance by one step: (K, H + 1), (P,), (P,) -> coefficients per segment, the update Delta (P,).

        after: the parameters after it, (P,), which a rule that is read off the update needs.
        """
        segments: Segments = []
        delta = torch.empty_like(theta)
        state = {key: torch.empty_like(value) for key, value in self.state.items()}
        for piece, tensors, row in pieces_of(self.rules, self.layout, hyper):
            rule, g, before = self.rules[tensors.start], gradient[piece], theta[piece]
            known = {key: value[piece] for key, value in self.state.items()}
            coefficients, moments = IDLE, known
            if row[-1] and rule.read_off:
                assert after is not None
                coefficients = read_off(g, after[piece] - before)
            elif row[-1]:
                options = {**rule.situation(dict(zip(rule.hyper, row, strict=False))), "low": self.rules.low}
                freeze = _freeze_whole if rule.whole else _freeze
                coefficients, moments = freeze(rule, options, known, g, before, self.layout.shapes[tensors.start])
            delta[piece], momentum = coefficients.apply(known[MOMENTUM], g, before)
            for key in state:
                state[key][piece] = moments.get(key, momentum if key == MOMENTUM else known[key])
            segments.append(Segment(piece, tensors, coefficients))
        self.state = state
        return segments, delta


def pieces_of(rules: Rules, layout: Layout, hyper: np.ndarray) -> Iterator[tuple[slice, slice, tuple[float, ...]]]:
    """Slices of neighbouring tensors whose rules and rows agree, cut where they are longer than the cache; or a tensor
    each."""
    owners = np.array(rules.owners)
    alone = np.array([rule.whole for rule in rules])
    cut = (hyper[1:] != hyper[:-1]).any(axis=1) | (owners[1:] != owners[:-1]) | alone[1:]
    for a, b in itertools.pairwise([0, *(np.flatnonzero(cut) + 1).tolist(), len(hyper)]):
        row = tuple(hyper[a].tolist())
        lo, hi = int(layout.bounds[a]), int(layout.bounds[b])
        size = hi - lo if alone[a] else CACHED
        for start in range(lo, hi, max(1, size)):
            yield slice(start, min(start + size, hi)), slice(a, b), row


def _freeze(
    rule: Rule, options: Any, known: dict[str, Tensor], g: Tensor, theta: Tensor, shape: Any
) -> tuple[Coefficients, dict[str, Tensor]]:
    return rule.freeze(options, known, g, theta)


def _freeze_whole(
    rule: Rule, options: Any, known: dict[str, Tensor], g: Tensor, theta: Tensor, shape: tuple[int, ...]
) -> tuple[Coefficients, dict[str, Tensor]]:
    """The same with a tensor and its accumulators in their shapes."""
    shapes = {key: accumulator(options, shape) for key, accumulator in rule.accumulators.items() if key in rule.moments}
    shapes[MOMENTUM] = shape
    held = {key: unpacked(known[key], its) for key, its in shapes.items() if its is not None}
    coefficients, after = rule.freeze(options, held, g.view(shape), theta.view(shape))
    return coefficients, {key: packed(value, g.numel()) for key, value in after.items()}


def carried(segments: Segments, momentum: Tensor, gradient: Tensor, theta: Tensor) -> Tensor:
    """The accumulator after a step that its coefficients make of that before it, (P,) each."""
    out = torch.empty_like(momentum)
    for segment in segments:
        here = segment.entries
        out[here] = segment.coefficients.apply(momentum[here], gradient[here], theta[here])[1]
    return out


def pullback(segments: Segments, carry: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """The transpose of a step over all its segments: (sensitivity to the momentum after it, Gbar), each (Q, P) -> (U,
    sensitivity to the momentum before it), new. A few queries at a time: vectors of many do not fit the cache."""
    sensitivity, before = torch.empty_like(gradient), torch.empty_like(carry)
    for segment in segments:
        at_once = max(1, CACHED // max(1, segment.entries.stop - segment.entries.start))
        for lo in range(0, len(carry), at_once):
            here = slice(lo, lo + at_once), segment.entries
            sensitivity[here], before[here] = segment.coefficients.transpose(carry[here], gradient[here])
    return sensitivity, before


def explained(rules: Rules, segments: Segments, update: Tensor) -> Tensor | None:
    """Which entries of an update the coefficients are to give, (P,); None for all."""
    if not rules.unmodelled:
        return None
    entries = torch.ones_like(update, dtype=torch.bool)
    for segment in segments:
        taken = segment.coefficients.apply_new
        if rules[segment.tensors.start].unmodelled and isinstance(taken, Tensor):
            entries[segment.entries] = taken != 0
    return entries


def step_bounds(
    rules: Rules, segments: Segments, update: Tensor, momentum: Tensor | None, gradient: Tensor, ends: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """What of an update (P,) is to be explained by its coefficients, and how well: see `checks.step_identity`. momentum:
    the accumulator before it (P,), None where it is not known; gradient (P,): what it saw; ends (2, P): the parameters
    before and after."""
    return explained(rules, segments, update), rounding_of(rules, segments, momentum, gradient, ends)


def rounding_of(
    rules: Rules, segments: Segments, momentum: Tensor | None, gradient: Tensor, ends: Tensor
) -> Tensor | None:
    """How far an update may be from what its coefficients make of the state before it, where the optimizer rounds to few
    bits at every operation: (P,), inf where that is not known; None where it does not. ends (2, P): theta and theta'.

    |replayed - real| <= u (n terms + 2 (|theta| + |theta'|)), u = eps / 2,

    terms = apply_old |z| + apply_new (|g| + coupled |theta|) of what is summed: each is rounded n times (`Rule.roundings`),
    the parameters where decay and where the update is taken off; a factor of 1 + n u for what is of second order. Below the
    smallest normal a rounding is by half of the smallest number instead. In bfloat16 that is next to nothing; in float16
    squares of gradients lie there, so of a rule with accumulators that are frozen nothing is said.
    """
    if rules.low is None:
        return None
    bound = torch.full_like(gradient, torch.inf)
    kind = torch.finfo(rules.low)
    unit, least = kind.eps / 2, kind.smallest_normal * kind.eps
    for segment in segments:
        rule, here, c = rules[segment.tensors.start], segment.entries, segment.coefficients
        count, squares = rule.roundings, rule.moments and rules.low == torch.float16
        if count is not None and momentum is not None and not squares:
            old, new, coupled = (torch.as_tensor(v).abs() for v in (c.apply_old, c.apply_new, c.coupled))
            g = gradient[here].abs() + coupled * ends[0, here].abs()
            terms = old * momentum[here].abs() + new * g
            edges = ends[:, here].abs().sum(0)
            smallest = count * least * (1 + old + new)
            bound[here] = unit * (1 + count * unit) * (count * terms + 2 * edges) + smallest
    return bound


def decay_rates(segments: Segments, tensors: int) -> np.ndarray:
    """(2, K): coupled and decoupled decay of each tensor, which add coupled <U, theta> - decoupled <Gbar, theta> to the
    measurement; 0 for one that is coupled entry by entry."""
    rates = np.zeros((2, tensors))
    for segment in segments:
        coupled = segment.coefficients.coupled
        rates[0, segment.tensors] = 0.0 if isinstance(coupled, Tensor) else coupled
        rates[1, segment.tensors] = segment.coefficients.decoupled
    return rates


def entrywise_decay(
    segments: Segments, layout: Layout, sensitivity: Tensor, theta: Callable[[], Tensor]
) -> Tensor | None:
    """<U, coupled theta> over each tensor, (Q, K), of decay that is coupled entry by entry; None where there is none.
    sensitivity: U, (Q, P). theta: gives (P,), asked for only where it is needed."""
    coupled = [(s.entries, s.coefficients.coupled) for s in segments if isinstance(s.coefficients.coupled, Tensor)]
    if not coupled:
        return None
    pulled, parameters = torch.zeros_like(sensitivity[0]), theta()
    for entries, rate in coupled:
        pulled[entries] = rate * parameters[entries].to(pulled)
    return torch.stack([sensitivity[:, part] @ pulled[part] for _, part in layout.slices()], 1)
