"""The path integral by quadrature: Gbar = integral over a in [0, 1] of grad m(theta0 + a (theta1 - theta0)).

Sources: Domingos 2020 (arXiv 2012.00152); Bell et al. 2023, exact path kernel; the midpoint rule is the one of Eichin et
al. 2025 (ExPLAIND, arXiv 2505.20076). Gauss-Legendre is exact for polynomials of degree 2 nodes - 1. On networks with
kinks the integrand jumps, and no fixed rule is exact: see `Secant`.
"""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..errors import MeasurementError
from ..functional import mapped
from .query import PathGradient, Query

log = logging.getLogger("attrib")


class Quadrature:
    """Shared by the rules below, each of which gives `points()`: pairs of position in [0, 1] and weight."""

    def points(self) -> Iterator[tuple[float, float]]:
        raise NotImplementedError

    def bind(self, query: Query) -> Callable[[Tensor, Tensor], PathGradient]:
        with torch.enable_grad():
            named = {n: t.clone().requires_grad_() for n, t in query.named(query.example).items()}
            if not query.of_parameters(named, *query.batch).requires_grad:
                raise MeasurementError(
                    "the measurement has no gradient to integrate: got values that are detached from the parameters, "
                    "expected ones that are not. Take off torch.no_grad() and detach(), or pass path=attrib.Secant()."
                )
        gradient = gradients_side_by_side(query)
        single = gradients_one_by_one(query)
        side_by_side = _agree(query, gradient)

        def integrate(theta0: Tensor, theta1: Tensor) -> PathGradient:
            start, end = theta0.to(query.dtype), theta1.to(query.dtype)
            total: Tensor | float = 0.0
            for position, weight in self.points():
                total = total + weight * (gradient if side_by_side else single)(torch.lerp(start, end, position))
            assert isinstance(total, Tensor)
            return PathGradient(total, query.values(theta0), query.values(theta1))

        if not side_by_side:
            log.info("gradients of the measurement do not map over queries: one backward pass for each")
        return query.over_steps(integrate)


@dataclass(frozen=True)
class GaussLegendre(Quadrature):
    """Gauss-Legendre quadrature. `nodes`: gradients per step; 4 to 8 reach rounding on smooth networks."""

    nodes: int = 4

    def __post_init__(self) -> None:
        check_count("nodes", self.nodes)

    def points(self) -> Iterator[tuple[float, float]]:
        x, w = np.polynomial.legendre.leggauss(self.nodes)
        yield from zip(((x + 1) / 2).tolist(), (w / 2).tolist(), strict=True)


@dataclass(frozen=True)
class Midpoint(Quadrature):
    """The midpoint rule on equal cells. `nodes`: gradients per step."""

    nodes: int = 100

    def __post_init__(self) -> None:
        check_count("nodes", self.nodes)

    def points(self) -> Iterator[tuple[float, float]]:
        yield from (((k + 0.5) / self.nodes, 1 / self.nodes) for k in range(self.nodes))


def check_count(name: str, value: int) -> None:
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} is not a count: got {value!r}, expected an integer of at least 1.")


Gradient = Callable[[Tensor], Tensor]  # theta (P,) -> (Q, P)


def gradients_side_by_side(query: Query) -> Gradient:
    """The gradients of the queries, mapped over them."""

    def one(named: dict[str, Tensor], *row: Tensor) -> Tensor:
        return query.of_parameters(named, *(r[None] for r in row))[0]

    def by_rows(named: dict[str, Tensor]) -> dict[str, Tensor]:
        dims = (None, *(0 for _ in query.batch))
        return mapped(torch.func.grad(one), dims, query.at_once())(named, *query.batch)

    jacobian = torch.func.jacrev(query.of_parameters, chunk_size=query.at_once())

    def gradient(theta: Tensor) -> Tensor:
        named = query.named(theta)
        with query.bound(named):
            found = by_rows(named) if query.batch else jacobian(named)
        return torch.cat([found[name].reshape(query.count, -1) for name in query.layout.names], dim=1)

    return gradient


def gradients_one_by_one(query: Query) -> Gradient:
    """A backward pass for each query."""

    def gradient(theta: Tensor) -> Tensor:
        eye = torch.eye(query.count, dtype=query.dtype, device=theta.device)
        return torch.stack([query.gradient(theta, weights) for weights in eye])

    return gradient


def _agree(query: Query, gradient: Gradient) -> bool:
    """Whether gradients mapped over queries are torch's own. Some operations do not map, or map to something else: in torch
    2.13 the weight of prelu gets nothing."""
    theta = query.example.to(query.dtype)
    try:
        found = gradient(theta)
    except (RuntimeError, NotImplementedError) as error:
        log.debug("gradients do not map: %s", error)
        return False
    sizes = found.norm(dim=1)
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(query.count, generator=generator, dtype=torch.float64).to(found)
    weights = weights / torch.where(sizes > 0, sizes, 1.0)
    whole = query.gradient(theta, weights)
    gaps = ((weights @ found - whole)[part].norm() / max(whole[part].norm(), 1e-3) for _, part in query.layout.slices())
    return all(float(gap) <= torch.finfo(query.dtype).eps ** 0.5 for gap in gaps)
