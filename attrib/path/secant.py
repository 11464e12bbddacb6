"""The secant: a discrete gradient of the whole network, built operation by operation by the discrete chain rule.

Run the graph at theta0 and theta1, keep both sets of values, go backwards once: every operation sends a cotangent c of
y to cotangents c_i of its inputs with <c, y1 - y0> = sum_i <c_i, x_i1 - x_i0> exactly (`rules`). By induction the whole
satisfies <Gbar, theta1 - theta0> = m(theta1) - m(theta0), kinks or not, and tends to grad m as the ends meet.

A sweep meets every state twice, as the end of one step and as the start of the next: what the graph gave there is kept.

Sources: Gonzalez 1996; McLachlan, Quispel, Robidoux 1999, for discrete gradients; the chain rule for them is ours.
The sum is exact for every rule set; the split differs from the path integral at second order in the step.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..functional import mapped
from ..kernels.memory import stacked
from ..program import Programs, kind_of
from .kinds import Kind, graph_of, kinds_of, tensors_of
from .measured import Measured, PathGradient, alike, warn_once
from .quadrature import check_count


@dataclass(frozen=True)
class Secant:
    """A discrete gradient (McLachlan, Quispel, Robidoux 1999) of the whole network, by a discrete chain rule: what it sends
    back times the update is the change of the measurement, exactly, kinks or not.

    Args:
        substeps: equal pieces of a step, which are averaged. The sum is exact for every number of them; the split tends to
            the path integral as they grow, from which one step differs at second order.

    Raises:
        ValueError: no count.

    Example:
        >>> result = attrib.attribute(run, model, measurement, loss=loss, path=attrib.Secant(substeps=2))
        >>> bool(abs(result.residual).max() < 1e-12)
        True
    """

    substeps: int = 1

    def __post_init__(self) -> None:
        check_count("substeps", self.substeps)

    def bind(self, measured: Measured) -> Callable[[Tensor, Tensor], PathGradient]:
        chain = _trace(measured)

        def gradient(theta0: Tensor, theta1: Tensor) -> PathGradient:
            count, after, pieces = self.substeps, chain.values(theta1), []
            for k in reversed(range(count)):
                first, last = (_point(measured, theta0, theta1, n / count) for n in (k, k + 1))
                before = chain.values(first)
                pieces.append(chain.between(first, last, before, after))
                after = before
            if count == 1:
                return pieces[0]
            mean = sum(p.gradient for p in pieces[1:]) + pieces[0].gradient
            return PathGradient(mean / count, pieces[-1].start, pieces[0].end)

        over = measured.over_steps(gradient)
        together = self.substeps > 1 or measured.steps_at_once() > 1
        return over if together else _Keeping(chain, over, Programs() if measured.traces else _as_it_is)


def _point(measured: Measured, theta0: Tensor, theta1: Tensor, share: float) -> Tensor:
    """Between the ends."""
    if share in (0.0, 1.0):
        return theta1 if share else theta0
    return torch.lerp(theta0.to(measured.dtype), theta1.to(measured.dtype), share)


class _Chain(NamedTuple):
    """The chain rule in two halves. values: of a state (P,), what the graph gives there, a tree of tensors; between:
    theta0, theta1, the values at both -> the path gradient."""

    values: Callable[[Tensor], Any]
    between: Callable[[Tensor, Tensor, Any, Any], PathGradient]


class _Keeping:
    """One step at a time, with the values at its start kept for the step before, which ends there. `over` takes several."""

    def __init__(
        self, chain: _Chain, over: Callable[[Tensor, Tensor], PathGradient], run: Callable[[Any, Any, Any], Any]
    ) -> None:
        self._chain, self._over, self._run = chain, over, run
        self._theta: Tensor | None = None  # the state whose values are kept
        self._values: Any = None

    def __call__(self, theta0: Tensor, theta1: Tensor) -> PathGradient:
        if theta0.dim() > 1:
            if len(theta0) > 1:
                return self._over(theta0, theta1)
            return PathGradient(*(t[None] for t in self(theta0[0], theta1[0])))
        if self._theta is None or self._theta.dtype != theta1.dtype or not torch.equal(self._theta, theta1):
            self._values = self._run(kind_of([theta1]), lambda given: self._chain.values(*given), [theta1])
        last, spec = tree_flatten(self._values)

        def step(given: Sequence[Tensor]) -> tuple[PathGradient, Any]:
            before, after = self._chain.values(given[0]), tree_unflatten(list(given[2:]), spec)
            return self._chain.between(given[0], given[1], before, after), before

        found, self._values = self._run(kind_of([theta0, theta1]), step, [theta0, theta1, *last])
        self._theta = theta0.clone()
        return found


def _as_it_is(kind: Any, function: Callable[[Sequence[Tensor]], Any], inputs: Sequence[Tensor]) -> Any:
    return function(inputs)


def _trace(measured: Measured) -> _Chain:
    kinds = kinds_of(measured) if measured.batch else []
    if not kinds:
        return _by_cotangents(measured)
    parts = [_side_by_side(measured, kind) for kind in kinds]
    if len(parts) == 1:
        return parts[0]
    order = torch.cat([kind.queries for kind in kinds]).argsort()

    def between(theta0: Tensor, theta1: Tensor, first: list[Any], last: list[Any]) -> PathGradient:
        found = [part.between(theta0, theta1, *ends) for part, *ends in zip(parts, first, last, strict=True)]
        return PathGradient(*(torch.cat(values)[order] for values in zip(*found, strict=True)))

    return _Chain(lambda theta: [part.values(theta) for part in parts], between)


def _side_by_side(measured: Measured, kind: Kind) -> _Chain:
    """One graph of a single row, mapped over the rows."""
    graph, batch = kind.graph, kind.batch

    def one(moving: Sequence[Any], kept: Sequence[Any], *row: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ends = graph.ends(moving, row, kept)
        start, end = ends.of(graph.output)
        return _join(graph.backward(torch.ones_like(start), ends)), start, end

    rows = [0] * len(batch)
    values_over = mapped(lambda moving, *row: graph.values(moving, row), (None, *rows), measured.at_once())
    over = mapped(one, (None, 0, *rows), measured.at_once())
    maps = len(kind.queries) > 1 and _maps(measured, kind, one, over, values_over)

    def values(theta: Tensor) -> list[Any]:
        moving = tensors_of(measured, theta)
        return values_over(moving, *batch) if maps else [graph.values(moving, row) for row in kind.rows()]

    def between(theta0: Tensor, theta1: Tensor, first: list[Any], last: list[Any]) -> PathGradient:
        moving = tensors_of(measured, theta0), tensors_of(measured, theta1)
        if maps:
            return PathGradient(*over(moving, (first, last), *batch))
        found = [one(moving, kept, *row) for *kept, row in zip(first, last, kind.rows(), strict=True)]
        return PathGradient(*(stacked(parts) for parts in zip(*found, strict=True)))

    return _Chain(values, between)


def _by_cotangents(measured: Measured) -> _Chain:
    """Any measurement: one forward at each end, the backward sweep mapped over the queries."""
    graph = graph_of(measured)

    def between(theta0: Tensor, theta1: Tensor, *kept: list[Any]) -> PathGradient:
        ends = graph.ends((tensors_of(measured, theta0), tensors_of(measured, theta1)), (), kept)
        start, end = ends.of(graph.output)
        sweep = mapped(lambda c: _join(graph.backward(c, ends)), 0, measured.at_once())
        return PathGradient(sweep(torch.eye(measured.count, dtype=start.dtype, device=start.device)), start, end)

    return _Chain(lambda theta: graph.values(tensors_of(measured, theta), ()), between)


def _maps(
    measured: Measured, kind: Kind, one: Callable[..., Any], over: Callable[..., Any], values: Callable[..., Any]
) -> bool:
    """Whether mapped queries have the vectors that they have by themselves: some of torch's rules do not map, or map to
    something else."""
    moving = [tensors_of(measured, measured.example * scale) for scale in (1.0, 1.01)]
    two, row = tuple(b[:2] for b in kind.batch), tuple(b[1] for b in kind.batch)
    try:
        found = over(moving, [values(m, *two) for m in moving], *two)[0][1]
    except RuntimeError as error:
        warn_once("queries do not map and are taken one after the other: %s", str(error).splitlines()[0])
        return False
    return alike(found, one(moving, [kind.graph.values(m, row) for m in moving], *row)[0])


def _join(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])
