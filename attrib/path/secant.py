"""The secant: a discrete gradient of the whole network, built operation by operation by the discrete chain rule.

Run the graph at theta0 and theta1, keep both sets of values, go backwards once: every operation sends a cotangent c of
y to cotangents c_i of its inputs with <c, y1 - y0> = sum_i <c_i, x_i1 - x_i0> exactly (`rules`). By induction the whole
satisfies <Gbar, theta1 - theta0> = m(theta1) - m(theta0), kinks or not, and tends to grad m as the ends meet.

Sources: Gonzalez 1996; McLachlan, Quispel, Robidoux 1999, for discrete gradients; the chain rule for them is ours.
The sum is exact for every rule set; the split differs from the path integral at second order in the step.
"""

import itertools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..functional import mapped
from .graph import Graph
from .measured import Measured, PathGradient, alike
from .quadrature import check_count

log = logging.getLogger("attrib")


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
    names, layout = measured.layout.names, measured.layout

    def function(*inputs: Tensor) -> Tensor:
        parameters = dict(zip(names, inputs[: len(names)], strict=True))
        values = measured.of_parameters(parameters, *(row[None] for row in inputs[len(names) :]))
        return values[0] if measured.batch else values

    def tensors(vector: Tensor) -> list[Tensor]:
        return list(layout.unflatten(vector.detach().to(measured.dtype)).values())

    graph = Graph(function, tensors(measured.example), [b[0] for b in measured.batch])

    def one(moving0: list[Tensor], moving1: list[Tensor], *row: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ends = graph.forward(moving0, moving1, row)
        start, end = ends.of(graph.output)
        return _join(graph.backward(torch.ones_like(start), ends)), start, end

    side_by_side = mapped(one, (None, None, *(0 for _ in measured.batch)), measured.at_once())
    maps = not measured.batch or measured.count == 1 or _maps(measured, one, side_by_side, tensors)

    def by_rows(theta0: Tensor, theta1: Tensor) -> PathGradient:
        """Queries side by side: one graph of a single row, mapped over the rows."""
        moving0, moving1 = tensors(theta0), tensors(theta1)
        if measured.count == 1:
            found = one(moving0, moving1, *(b[0] for b in measured.batch))
            return PathGradient(*(t.unsqueeze(0) for t in found))
        if not maps:
            rows = [one(moving0, moving1, *(b[q] for b in measured.batch)) for q in range(measured.count)]
            return PathGradient(*(torch.stack(parts) for parts in zip(*rows, strict=True)))
        return PathGradient(*side_by_side(moving0, moving1, *measured.batch))

    def by_cotangents(theta0: Tensor, theta1: Tensor) -> PathGradient:
        """Any measurement: one forward at each end, the backward sweep mapped over the queries."""
        ends = graph.forward(tensors(theta0), tensors(theta1), ())
        start, end = ends.of(graph.output)
        sweep = mapped(lambda c: _join(graph.backward(c, ends)), 0, measured.at_once())
        return PathGradient(sweep(torch.eye(measured.count, dtype=start.dtype, device=start.device)), start, end)

    return by_rows if measured.batch else by_cotangents


def _maps(
    measured: Measured, one: Callable[..., Any], side_by_side: Callable[..., Any], tensors: Callable[..., Any]
) -> bool:
    """Whether mapped queries have the vectors that they have by themselves: some of torch's rules do not map, or map to
    something else."""
    ends, two = [tensors(measured.example), tensors(measured.example * 1.01)], tuple(b[:2] for b in measured.batch)
    try:
        found = side_by_side(*ends, *two)[0][1]
    except RuntimeError as error:
        log.info("queries do not map (%s): one after the other", str(error).splitlines()[0])
        return False
    return alike(found, one(*ends, *(b[1] for b in two))[0])


def _join(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])
