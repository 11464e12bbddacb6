"""A step pulled back at two ends: exact for the difference of two runs, the derivative where they are one.

    (theta', z', v') - (theta, z, v) after the step  ->  the same before it, and the gradients' difference

    V           sensitivity to the gradient
    theta       (1 - decoupled) theta + coupled V          what the loss itself adds is the caller's
    options     where the ends have other options: the step at either end with those of the one, less with those of the other

A step whose options differ is pulled back with those of either end, and the mean taken: that is exact, too.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..errors import ReplayError
from ..functional import load_forward_mode
from ..kernels.recurrence import IDLE
from ..layout import Layout
from .replay import pieces_of
from .rule import MOMENTUM, Adjoint, End, Rule, State, mean
from .rules import Rules


@dataclass(frozen=True)
class Carried:
    """Sensitivities to the parameters, theta (Q, P), and to the accumulators by name, (Q, P) each; float64."""

    theta: Tensor
    state: State

    @classmethod
    def of(cls, rules: Rules, theta: Tensor) -> "Carried":
        """Of a state after which nothing is stepped."""
        return cls(theta, {name: torch.zeros_like(theta) for name in rules.state})

    @property
    def norms(self) -> np.ndarray:
        """(Q,): of the sensitivities to the parameters."""
        return self.theta.norm(dim=1).cpu().numpy()


@dataclass(frozen=True)
class Back:
    """gradient: V (Q, P). before: what is handed on, but for what the loss makes of V. options (Q, P): what other options
    did, entry by entry; None where they are the same."""

    gradient: Tensor
    before: Carried
    options: Tensor | None = None


def check_adjoints(rules: Rules) -> None:
    """Raise ReplayError where a rule has none."""
    for mover in rules.movers:
        if mover.rule.adjoint is None or rules.low is not None:
            raise ReplayError(
                f"the derivative through this optimizer was not derived: got {mover.name}"
                f"{'' if rules.low is None else ' of parameters in ' + str(rules.low)}, expected SGD, Adam or AdamW in "
                f"float32 or float64. Accounting is there for all: attrib.attribute."
            )


def pulled_back(
    rules: Rules, layout: Layout, hyper: tuple[np.ndarray, np.ndarray], ends: tuple[End, End], after: Carried
) -> Back:
    """hyper: (K, H + 1) of each end; after: the sensitivities to what the step leaves."""
    gradient, theta = torch.empty_like(after.theta), torch.empty_like(after.theta)
    state = {name: torch.empty_like(t) for name, t in after.state.items()}
    options: Tensor | None = None
    for piece, tensor, rows in _pieces(rules, layout, hyper):
        here = (slice(None), piece)
        rule, cut = rules[tensor], _cuts(ends, piece)
        carried = Carried(after.theta[here], {name: t[here] for name, t in after.state.items()})
        distinct = rows if rows[0] != rows[1] else rows[:1]
        found = [_one(rule, row, cut, carried) for row in distinct]
        gradient[here] = mean([v for v, _ in found])
        theta[here] = mean([c.theta for _, c in found])
        for name in state:
            state[name][here] = mean([c.state[name] for _, c in found])
        if len(distinct) == 2:
            options = torch.zeros_like(after.theta) if options is None else options
            options[here] = _by_options(rule, rows, cut, carried)
    return Back(gradient, Carried(theta, state), options)


def _pieces(
    rules: Rules, layout: Layout, hyper: tuple[np.ndarray, np.ndarray]
) -> Iterator[tuple[slice, int, tuple[Any, Any]]]:
    """Entries, a tensor that they are of, the row of each end."""
    width = hyper[0].shape[1]
    for piece, tensors, row in pieces_of(rules, layout, np.concatenate(hyper, 1)):
        yield piece, tensors.start, (row[:width], row[width:])


def _cuts(ends: tuple[End, End], piece: slice) -> tuple[End, End]:
    """The same one twice where the ends are."""
    first = _cut(ends[0], piece)
    return first, first if ends[0] is ends[1] else _cut(ends[1], piece)


def _cut(end: End, piece: slice) -> End:
    return End({name: t[piece] for name, t in end.state.items()}, end.gradient[piece], end.theta[piece])


def _one(rule: Rule, row: tuple[float, ...], ends: tuple[End, ...], after: Carried) -> tuple[Tensor, Carried]:
    """V, and what is handed on."""
    momentum, adjoint = after.state[MOMENTUM], Adjoint(IDLE, torch.zeros_like(after.theta), {})
    if row[-1]:
        assert rule.adjoint is not None
        adjoint = rule.adjoint(_situation(rule, row), ends[0], ends[1], after.theta, after.state)
    c = adjoint.coefficients.doubled()
    gradient, before = c.transpose(momentum, after.theta)
    gradient += adjoint.gradient
    theta = (1 - c.decoupled) * after.theta
    if isinstance(c.coupled, Tensor) or c.coupled:
        theta += c.coupled * gradient
    return gradient, Carried(theta, {**after.state, **adjoint.state, MOMENTUM: before})


def _by_options(rule: Rule, rows: tuple[Any, Any], ends: tuple[End, ...], after: Carried) -> Tensor:
    """(Q, p): the mean over the ends of what the second row's options do there that the first's do not."""
    total = torch.zeros_like(after.theta)
    for end in ends:
        (old, old_state), (new, new_state) = (_stepped(rule, row, end) for row in rows)
        total += after.theta * (new - old).double()
        for name, value in new_state.items():
            total += after.state[name] * (value - old_state[name]).double()
    return total / 2


def _stepped(rule: Rule, row: tuple[float, ...], end: End) -> tuple[Tensor, State]:
    """The update and the accumulators after it."""
    if not row[-1]:
        return torch.zeros_like(end.theta), end.state
    coefficients, moments = rule.freeze(_situation(rule, row), *end)
    update, momentum = coefficients.apply(end.state[MOMENTUM], end.gradient, end.theta)
    return update, {**end.state, **moments, MOMENTUM: momentum}


def pushed_forward(rules: Rules, layout: Layout, hyper: np.ndarray, end: End, tangent: End) -> tuple[Tensor, State]:
    """The derivative of a step along a change of all that it is made of: of the parameters and the accumulators after it,
    (P,) each float64. By forward mode through the rule itself, which shares nothing with its adjoint."""
    theta = tangent.theta.double().clone()
    state = {name: t.double().clone() for name, t in tangent.state.items()}
    load_forward_mode()
    for piece, tensors, row in pieces_of(rules, layout, hyper):
        with torch.no_grad(), forward_ad.dual_level():
            made = [_cut(e, piece) for e in (end, tangent)]
            dual = End(
                {name: _dual(t, made[1].state[name]) for name, t in made[0].state.items()},
                _dual(made[0].gradient, made[1].gradient),
                _dual(made[0].theta, made[1].theta),
            )
            update, after = _stepped(rules[tensors.start], row, dual)
            theta[piece] += _tangent(update)
            for name, value in after.items():
                state[name][piece] = _tangent(value)
    return theta, state


def _dual(primal: Tensor, tangent: Tensor) -> Tensor:
    return forward_ad.make_dual(primal.double(), tangent.double())


def _tangent(value: Tensor) -> Tensor:
    """Where a root of 0 does not move, torch's derivative is 0 times infinity."""
    found = forward_ad.unpack_dual(value)
    return torch.zeros_like(found.primal) if found.tangent is None else found.tangent.nan_to_num(0.0)


def _situation(rule: Rule, row: tuple[float, ...]) -> dict[str, Any]:
    return {**rule.situation(dict(zip(rule.hyper, row, strict=False))), "low": None}
