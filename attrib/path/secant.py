"""The secant: a discrete gradient of the whole network, built operation by operation by the discrete chain rule.

Run the graph at theta0 and theta1, keep both sets of values, go backwards once: every operation sends a cotangent c of
y to cotangents c_i of its inputs with <c, y1 - y0> = sum_i <c_i, x_i1 - x_i0> exactly (`rules`). By induction the whole
satisfies <Gbar, theta1 - theta0> = m(theta1) - m(theta0), kinks or not, and tends to grad m as the ends meet.

Sources: Gonzalez 1996; McLachlan, Quispel, Robidoux 1999, for discrete gradients; the chain rule for them is ours.
The sum is exact for every rule set; the split differs from the path integral at second order in the step.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..functional import mapped
from .kinds import Kind, graph_of, kinds_of, tensors_of
from .measured import Measured, PathGradient, alike, warn_once
from .quadrature import check_count


@dataclass(frozen=True)
class Secant:
    """The discrete chain rule on `substeps` equal pieces of the step, averaged.

    Complete for every number of substeps; the split tends to the path integral as they grow.
    """

    substeps: int = 1

    def __post_init__(self) -> None:
        check_count("substeps", self.substeps)

    def bind(self, measured: Measured) -> Callable[[Tensor, Tensor], PathGradient]:
        secant = _trace(measured)

        if self.substeps == 1:
            return measured.over_steps(secant)

        def gradient(theta0: Tensor, theta1: Tensor) -> PathGradient:
            points = [torch.lerp(theta0.to(measured.dtype), theta1.to(measured.dtype), k / self.substeps)
                      for k in range(self.substeps + 1)]  # fmt: skip
            pieces = [secant(a, b) for a, b in itertools.pairwise(points)]
            mean = sum(p.gradient for p in pieces[1:]) + pieces[0].gradient
            return PathGradient(mean / self.substeps, pieces[0].start, pieces[-1].end)

        return measured.over_steps(gradient)


def _trace(measured: Measured) -> Callable[[Tensor, Tensor], PathGradient]:
    kinds = kinds_of(measured) if measured.batch else []
    if not kinds:
        return _by_cotangents(measured)
    parts = [_side_by_side(measured, kind) for kind in kinds]
    if len(parts) == 1:
        return parts[0]
    order = torch.cat([kind.queries for kind in kinds]).argsort()

    def by_kinds(theta0: Tensor, theta1: Tensor) -> PathGradient:
        found = [part(theta0, theta1) for part in parts]
        return PathGradient(*(torch.cat(values)[order] for values in zip(*found, strict=True)))

    return by_kinds


def _side_by_side(measured: Measured, kind: Kind) -> Callable[[Tensor, Tensor], PathGradient]:
    """One graph of a single row, mapped over the rows."""
    graph, batch = kind.graph, kind.batch

    def one(moving0: list[Tensor], moving1: list[Tensor], *row: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ends = graph.forward(moving0, moving1, row)
        start, end = ends.of(graph.output)
        return _join(graph.backward(torch.ones_like(start), ends)), start, end

    over = mapped(one, (None, None, *(0 for _ in batch)), measured.at_once())
    maps = len(kind.queries) > 1 and _maps(measured, batch, one, over)

    def by_rows(theta0: Tensor, theta1: Tensor) -> PathGradient:
        moving = tensors_of(measured, theta0), tensors_of(measured, theta1)
        if maps:
            return PathGradient(*over(*moving, *batch))
        found = [one(*moving, *row) for row in kind.rows()]
        return PathGradient(*(torch.stack(parts) for parts in zip(*found, strict=True)))

    return by_rows


def _by_cotangents(measured: Measured) -> Callable[[Tensor, Tensor], PathGradient]:
    """Any measurement: one forward at each end, the backward sweep mapped over the queries."""
    graph = graph_of(measured)

    def together(theta0: Tensor, theta1: Tensor) -> PathGradient:
        ends = graph.forward(tensors_of(measured, theta0), tensors_of(measured, theta1), ())
        start, end = ends.of(graph.output)
        sweep = mapped(lambda c: _join(graph.backward(c, ends)), 0, measured.at_once())
        return PathGradient(sweep(torch.eye(measured.count, dtype=start.dtype, device=start.device)), start, end)

    return together


def _maps(measured: Measured, batch: tuple[Tensor, ...], one: Callable[..., Any], over: Callable[..., Any]) -> bool:
    """Whether mapped queries have the vectors that they have by themselves: some of torch's rules do not map, or map to
    something else."""
    ends = [tensors_of(measured, measured.example * scale) for scale in (1.0, 1.01)]
    two = tuple(b[:2] for b in batch)
    try:
        found = over(*ends, *two)[0][1]
    except RuntimeError as error:
        warn_once("queries do not map and are taken one after the other: %s", str(error).splitlines()[0])
        return False
    return alike(found, one(*ends, *(b[1] for b in two))[0])


def _join(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])
