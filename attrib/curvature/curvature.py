"""Curvature: products of the Hessian of a batch's weighted loss with several directions, exact or by Gauss-Newton.

    losses (B,)     along (Q, B) = <V_q, g_i>, g_i = d loss_i / d theta     hessian (Q, P) = H V_q, H of sum_i w_i loss_i

For several directions at once, as many as memory allows; where the losses of a part of the batch are what they are in the
batch, in slices of it; taped from the third call of a kind on. By what way is found out once of each kind of batch.
"""

import itertools
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..batch import Batch
from ..budget import slice_bytes
from ..errors import LossError
from ..functional import Functional
from ..generators import generators
from ..losses import first_line
from ..program import Programs, kind_of
from .point import Found, Named, Point
from .slices import Slices
from .ways import WAYS, Ways, check_right, lacking, restart

KINDS = tuple(WAYS)


class Products(NamedTuple):
    """losses (B,), or an objective (1,), in the compute type. along (Q, B): <V_q, g_i>, without the weights; hessian (Q, P):
    H V_q, zero where a parameter does not move; both float64."""

    losses: Tensor
    along: Tensor
    hessian: Tensor


class Curvature:
    """Products of the Hessian of a loss.

    Args:
        function: the loss bound to a model, one loss per example or an objective; the model is used in its mode.
        slices: bytes of what the calls of a forward pass return for the examples of a slice; None chooses.
        kind: "exact", or "gauss-newton": the curvature of the loss in what the model returns alone.

    Attributes:
        active: names of the parameters that have a gradient, all at first.

    Example:
        >>> curvature = Curvature(Functional(model, loss, run.layout, torch.float64))
        >>> products = curvature.products(run.vector(12), (x, y), torch.ones(24), run.vector(0)[None])
        >>> products.losses.shape, products.along.shape, products.hessian.shape
        (torch.Size([24]), torch.Size([1, 24]), torch.Size([1, 75]))
    """

    def __init__(self, function: Functional, slices: int | None = None, kind: str = "exact") -> None:
        if kind not in KINDS:
            raise ValueError(f"unknown curvature: got {kind!r}, expected one of {', '.join(map(repr, KINDS))}.")
        self.layout, self.kind, self.active = function.layout, kind, frozenset(function.layout.names)
        self._loss, self._factor, self._programs = function, 1.0, Programs()
        self._slices = Slices(slices or slice_bytes(self.layout.size, function.dtype.itemsize))
        self._ways = Ways(kind)

    def at(
        self, active: frozenset[str], factor: float = 1.0, buffers: Mapping[str, Tensor] | None = None
    ) -> "Curvature":
        """The same at a step where these parameters have a gradient and the model holds these buffers, of `factor` times the
        loss; what is learnt of it is shared."""
        other = copy(self)
        other.active, other._factor = active, factor
        other._loss = self._loss.times(factor).holding(buffers or {})
        return other

    def products(
        self,
        theta: Tensor,
        batch: Batch | Sequence[Any],
        weights: Tensor,
        directions: Tensor,
        coupled: bool = False,
        checked: bool = True,
    ) -> Products:
        """Every pass over the batch starts from the state of the generators at the call, and leaves them as one does.

        Args:
            theta: (P,). weights: (B,), of the losses; all the same of an objective. directions: (Q, P).
            coupled: whether the losses of the batch are known to depend on each other: then it is worked through whole.
            checked: whether the sum of `along`, weighted, is held against the gradient at every call; else, where each
                example has a loss, at the first of a kind, and the caller has a gradient to hold it against.

        Raises:
            LossError: the loss has no second derivative that torch knows, or takes nothing that the model returns.
        """
        batch, weights = Batch.of(batch), weights.to(theta)
        point = self._point(theta, batch, weights)
        plan = self._slices.of(point, len(directions), coupled)
        point = replace(point, checked=checked or not plan.each)
        once = plan.length == batch.size and plan.together == len(directions)
        start = None if once and not plan.draws else generators()
        along = theta.new_zeros(len(directions), batch.size, dtype=torch.float64)
        hessian = theta.new_zeros(len(directions), self.layout.size, dtype=torch.float64)
        losses: list[Tensor] = []
        done = 0
        for part, fresh in batch.cut(plan.length):
            at = slice(done - fresh, done - fresh + part.size)
            there = replace(point, batch=part, weights=weights[at].clone())
            there.weights[:fresh] = 0.0  # they come again
            for lo in range(0, len(directions), plan.together):
                few = slice(lo, lo + plan.together)
                found = self._found(there, directions[few].to(theta.dtype), start)
                along[few, at][:, : len(found.losses)] = found.along
                if found.hessian:
                    hessian[few] += self._flat(found.hessian)
            losses.append(found.losses[fresh:])
            done += part.size - fresh
        return _checked(Products(torch.cat(losses), along, hessian), weights)

    def _point(self, theta: Tensor, batch: Batch, weights: Tensor) -> Point:
        moving = tuple(name for name in self.layout.names if name in self.active)
        return Point(
            self._loss, self.layout.unflatten(theta.detach().clone()), moving, batch, weights, self._loss.buffers
        )

    def _flat(self, hessian: Named) -> Tensor:
        """Products by name as (Q, P)."""
        count = len(next(iter(hessian.values())))
        parts = [
            hessian[name].reshape(count, -1) if name in hessian else torch.zeros(count, part.stop - part.start)
            for name, part in self.layout.slices()
        ]
        return torch.cat(parts, 1)

    def _found(self, point: Point, directions: Tensor, start: Tensor | None) -> Found:
        """Of one slice and a few directions, all at once. start: what the generators are put to before each pass, and left
        at behind one; None where nothing is drawn."""
        named = self.layout.unflatten(directions)
        moving = {name: named[name] for name in point.moving}
        if not moving:
            losses = point.values()
            nothing = losses.new_zeros(len(directions), len(losses))
            return Found(losses, nothing, {}, nothing.sum(1))
        while True:
            way = self._ways.of(point, moving, start)
            restart(start)
            try:
                found = check_right(self._run(way, point, moving), point)
            except LossError:
                raise
            except RuntimeError as error:  # of an operation, or a part of the model, that was not met before
                if not self._ways.fail(point, way):
                    raise lacking([first_line(error)]) from error
            else:
                return found

    def _run(self, way: str, point: Point, directions: Named) -> Found:
        """From a taped graph once there is one."""
        parameters, buffers = [*point.parameters], [*point.buffers]
        cuts = np.cumsum([len(parameters), len(directions), 1, len(buffers)]).tolist()

        def function(inputs: Sequence[Tensor]) -> Found:
            parts = [inputs[a:b] for a, b in itertools.pairwise([0, *cuts, None])]
            there = Point(
                point.loss,
                dict(zip(parameters, parts[0], strict=True)),
                point.moving,
                point.batch.with_tensors(parts[4]),
                parts[2][0],
                dict(zip(buffers, parts[3], strict=True)),
                point.checked,
            )
            return self._ways.run(way, there, dict(zip(directions, parts[1], strict=True)))

        inputs = [*point.parameters.values(), *directions.values(), point.weights, *point.buffers.values()]
        inputs += point.batch.tensors
        if point.batch.numbers:  # they may anneal
            return function(inputs)
        found: Found = self._programs(
            (kind_of(inputs), way, point.moving, point.batch.kind, self._factor, point.checked), function, inputs
        )
        return found


def _checked(products: Products, weights: Tensor) -> Products:
    """Raise LossError where an objective has several weights."""
    losses = products.losses
    if len(losses) < len(weights) and not bool((weights == weights[0]).all()):
        raise LossError(
            f"an objective has one weight: got {len(weights)} that differ, of a loss that returned a single number. Return "
            f"per-example losses, or give all examples the same weight."
        )
    return products._replace(along=products.along[:, : len(losses)])
