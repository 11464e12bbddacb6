"""The queries of a measurement, by the graph that holds for them.

A graph of one row holds for every row of which the model reads the same while it is traced (`if mask.all(): mask = None`):
padded queries and others are two kinds. It is compared with the model's own value of each of them.
"""

import logging
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..functional import mapped
from .graph import Graph
from .measured import Measured

log = logging.getLogger("attrib")


class Kind(NamedTuple):
    """graph: of a row. queries: their positions (n,). batch: their rows, (n, ...) each."""

    graph: Graph
    queries: Tensor
    batch: tuple[Tensor, ...]

    def rows(self) -> list[tuple[Tensor, ...]]:
        return list(zip(*self.batch, strict=True))

    def values(self, moving: list[Tensor], at_once: int | None) -> Tensor:
        """(n,), of the parameters."""
        if len(self.queries) > 1:
            try:
                found: Tensor = mapped(self.graph.value, (None, 0), at_once)(moving, self.batch)
                return found
            except RuntimeError as error:
                log.debug("a graph does not map: %s", error)
        return torch.stack([self.graph.value(moving, row) for row in self.rows()])


def tensors_of(measured: Measured, theta: Tensor) -> list[Tensor]:
    """(P,) -> the parameters."""
    return list(measured.layout.unflatten(theta.detach().to(measured.dtype)).values())


def graph_of(measured: Measured) -> Graph:
    """Of all queries together: their batch, if any, is constant in it."""

    def function(*moving: Tensor) -> Tensor:
        return measured.of_parameters(dict(zip(measured.layout.names, moving, strict=True)), *measured.batch)

    return Graph(function, tensors_of(measured, measured.example), [])


def kinds_of(measured: Measured) -> list[Kind]:
    """The kinds of a measurement with a batch; none where a query by itself is not what it is among the others.

    Raises:
        UntraceableModelError: of some query there is no graph.
    """
    moving, kinds, left = tensors_of(measured, measured.example), list[Kind](), list(range(measured.count))
    bound = torch.finfo(measured.dtype).eps ** 0.5 * (1 + measured.first.abs().max())
    while left:
        kind = _kind(measured, moving, left)
        gaps = (kind.values(moving, measured.at_once()) - measured.at_example[kind.queries]).abs()
        if not bool((gaps <= bound).all()):
            log.info("queries of the measurement depend on each other: they are taken together")
            return []
        kinds.append(kind)
        done = set(kind.queries.tolist())
        left = [q for q in left if q not in done]
    if len(kinds) > 1:
        log.info("the model reads values of its inputs: %d graphs for %d queries", len(kinds), measured.count)
    return kinds


def _kind(measured: Measured, moving: Sequence[Tensor], left: Sequence[int]) -> Kind:
    """That of the first query that is left."""

    def function(*inputs: Tensor) -> Tensor:
        parameters = dict(zip(measured.layout.names, inputs[: len(moving)], strict=True))
        return measured.of_parameters(parameters, *(row[None] for row in inputs[len(moving) :]))[0]

    def row(q: int) -> list[Tensor]:
        return [b[q] for b in measured.batch]

    graph = Graph(function, moving, row(left[0]))
    alike = [q for q in left if q == left[0] or graph.fits(row(q))]
    queries = torch.tensor(alike, device=measured.example.device)
    return Kind(graph, queries, tuple(b[queries] for b in measured.batch))
