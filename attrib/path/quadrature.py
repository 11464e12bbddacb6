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

from ..errors import MeasurementError, UntraceableModelError
from ..functional import mapped
from .kinds import kinds_of, tensors_of
from .measured import Measured, PathGradient, warn_once

log = logging.getLogger("attrib")


class Quadrature:
    """Shared by the rules below, each of which gives `points()`: pairs of position in [0, 1] and weight."""

    def points(self) -> Iterator[tuple[float, float]]:
        raise NotImplementedError

    def bind(self, measured: Measured) -> Callable[[Tensor, Tensor], PathGradient]:
        with torch.enable_grad():
            named = {n: t.clone().requires_grad_() for n, t in measured.named(measured.example).items()}
            if not measured.of_parameters(named, *measured.batch).requires_grad:
                raise MeasurementError(
                    "the measurement has no gradient to integrate: got values that are detached from the parameters, "
                    "expected ones that are not. Take off torch.no_grad() and detach(), or pass path=attrib.Secant()."
                )
        gradient = _gradients(measured)

        def integrate(theta0: Tensor, theta1: Tensor) -> PathGradient:
            start, end = theta0.to(measured.dtype), theta1.to(measured.dtype)
            total: Tensor | float = 0.0
            for position, weight in self.points():
                total = total + weight * gradient(torch.lerp(start, end, position))
            assert isinstance(total, Tensor)
            return PathGradient(total, measured.values(theta0), measured.values(theta1))

        return measured.over_steps(integrate)


@dataclass(frozen=True)
class GaussLegendre(Quadrature):
    """Gauss-Legendre quadrature of the path integral: exact for polynomials of degree 2 nodes - 1, in smooth networks to
    rounding with 4 to 8 nodes; on kinks, as of ReLU, the sum misses some of the change, which is the residual.

    Args:
        nodes: gradients per step.

    Raises:
        ValueError: no count.

    Example:
        >>> result = attrib.attribute(run, model, measurement, loss=loss, path=attrib.GaussLegendre(8))
        >>> result.gap("measurement") < 1e-9
        True
    """

    nodes: int = 4

    def __post_init__(self) -> None:
        check_count("nodes", self.nodes)

    def points(self) -> Iterator[tuple[float, float]]:
        x, w = np.polynomial.legendre.leggauss(self.nodes)
        yield from zip(((x + 1) / 2).tolist(), (w / 2).tolist(), strict=True)


@dataclass(frozen=True)
class Midpoint(Quadrature):
    """The midpoint rule on equal cells, that of Eichin et al. 2025 (arXiv 2505.20076); what it misses is the residual.

    Args:
        nodes: cells, gradients per step.

    Raises:
        ValueError: no count.

    Example:
        >>> result = attrib.attribute(run, model, measurement, loss=loss, path=attrib.Midpoint(50))
        >>> bool(abs(result.residual).max() < 1e-4)
        True
    """

    nodes: int = 100

    def __post_init__(self) -> None:
        check_count("nodes", self.nodes)

    def points(self) -> Iterator[tuple[float, float]]:
        yield from (((k + 0.5) / self.nodes, 1 / self.nodes) for k in range(self.nodes))


def check_count(name: str, value: int) -> None:
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} is not a count: got {value!r}, expected an integer of at least 1.")


Gradient = Callable[[Tensor], Tensor]  # theta (P,) -> (Q, P)


def gradients_side_by_side(measured: Measured) -> Gradient:
    """The gradients of the queries, mapped over them."""

    def one(named: dict[str, Tensor], *row: Tensor) -> Tensor:
        return measured.of_parameters(named, *(r[None] for r in row))[0]

    def by_rows(named: dict[str, Tensor]) -> dict[str, Tensor]:
        dims = (None, *(0 for _ in measured.batch))
        return mapped(torch.func.grad(one), dims, measured.at_once())(named, *measured.batch)

    jacobian = torch.func.jacrev(measured.of_parameters, chunk_size=measured.at_once())

    def gradient(theta: Tensor) -> Tensor:
        named = measured.named(theta)
        with measured.bound(named):
            found = by_rows(named) if measured.batch else jacobian(named)
        return torch.cat([found[name].reshape(measured.count, -1) for name in measured.layout.names], dim=1)

    return gradient


def gradients_of_graphs(measured: Measured) -> Gradient:
    """The gradients of the graphs of a query's kind, mapped over the queries: where the model reads values of its inputs.

    Raises:
        UntraceableModelError: there are none.
    """
    kinds = kinds_of(measured) if measured.batch else []
    if not kinds:
        raise UntraceableModelError("the queries of the measurement are taken together")
    order = torch.cat([kind.queries for kind in kinds]).argsort()

    def gradient(theta: Tensor) -> Tensor:
        moving, parts = tensors_of(measured, theta), []
        for kind in kinds:
            over = mapped(torch.func.grad(kind.graph.value), (None, 0), measured.at_once())
            parts.append(torch.cat([g.flatten(1) for g in over(moving, kind.batch)], 1))
        return torch.cat(parts)[order]

    return gradient


def gradients_one_by_one(measured: Measured) -> Gradient:
    """A backward pass for each query, through its own row where there is one."""

    parts = measured.parts(1) if measured.batch else []  # measured when they are made: outside of whatever traces

    def gradient(theta: Tensor) -> Tensor:
        eye = torch.eye(measured.count, dtype=measured.dtype, device=theta.device)
        if not measured.batch:
            return torch.stack([measured.gradient(theta, weights) for weights in eye])
        return torch.stack([part.gradient(theta, eye[:1, 0]) for part in parts])

    return gradient


def _gradients(measured: Measured) -> Gradient:
    """The first way that gives torch's own."""
    for way in (gradients_side_by_side, gradients_of_graphs):
        try:
            gradient = way(measured)
        except UntraceableModelError as error:
            log.debug("gradients go by no graph: %s", error)
        else:
            if _agree(measured, gradient):
                return gradient
    warn_once("gradients of the measurement do not map over its queries: one backward pass for each")
    return gradients_one_by_one(measured)


def _agree(measured: Measured, gradient: Gradient) -> bool:
    """Whether gradients mapped over queries are torch's own. Some operations do not map, or map to something else: in torch
    2.13 the weight of prelu gets nothing."""
    theta = measured.example.to(measured.dtype)
    try:
        found = gradient(theta)
    except (RuntimeError, NotImplementedError) as error:
        log.debug("gradients do not map: %s", error)
        return False
    sizes = found.norm(dim=1)
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(measured.count, generator=generator, dtype=torch.float64).to(found)
    weights = weights / torch.where(sizes > 0, sizes, 1.0)
    whole = measured.gradient(theta, weights)
    gaps = (
        (weights @ found - whole)[part].norm() / max(whole[part].norm(), 1e-3) for _, part in measured.layout.slices()
    )
    return all(float(gap) <= torch.finfo(measured.dtype).eps ** 0.5 for gap in gaps)
