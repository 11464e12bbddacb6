"""RowGradients: shares by rows, the second definition.

g_i is the part of the gradient of a scalar objective that flows through the rows of example i. It sums to the gradient of
any objective, coupled or not, and is that of the example's own loss where losses are independent. The batch is worked
through whole.
"""

import logging
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..batch import Batch
from ..generators import generators, random_state
from ..kernels.factors import Dense, Factor
from ..losses import check_finite
from ..program import kind_of as kind_of_inputs
from .assignment import Trace, calls_of
from .definition import Gradients
from .directions import Directions
from .owners import Owners
from .terms import Reached, Term, factors_of, sites_of, terms_at
from .through import RowVector, flowed

log = logging.getLogger("attrib")


class RowGradients(Gradients):
    """Shares by rows of `loss(model, *batch)`, one loss per example (B,), or a scalar: then the objective, (1,), stands
    where losses do. Args: as of `Gradients`; slices: of no account."""

    coupled = True  # a batch is never cut

    def _begin(self, slices: int | None) -> None:
        self.vector = RowVector(self._loss, self.layout)
        self._volatile, self._said = set[Any](), set[str]()

    def gradient(self, theta: Tensor, batch: Batch, weights: Tensor) -> tuple[Tensor, Tensor]:
        losses, found = self.vector.gradient(theta, Batch.of(batch), weights)
        return losses, self.layout.flatten(found.values())

    def contract(
        self, theta: Tensor, batch: Batch, directions: Tensor, groups: Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor]:
        # all tensors are told apart, whatever their groups
        batch, start = Batch.of(batch), generators()
        named = self.layout.unflatten(directions.to(theta.dtype))
        number = {name: k for k, name in enumerate(self.layout.names)}
        shape = len(number), len(directions), batch.size
        products = torch.zeros(shape, dtype=torch.float64, device=theta.device)
        losses, terms, slow = self._terms(theta, batch, named)
        several = Directions(self.layout.unflatten(directions), named, batch.size)
        for term in terms:
            products[number[term.name]] += several.contract(term)
        if slow:
            with random_state(start):
                along = self.vector.along(theta, batch, named, [[name] for name in slow])[1]
            for g, name in enumerate(slow):
                products[number[name]] = along[..., g]
        return losses, products.permute(1, 2, 0)

    def factors(self, theta: Tensor, batch: Batch) -> dict[str, list[Factor]]:
        batch, start = Batch.of(batch), generators()
        with self.vector.flow(theta, batch) as flow:
            found = self._factored(flow.reached, flow.owners, batch.size)
        missing = [name for name in self.layout.names if name not in found]
        if missing:
            with random_state(start):
                rows = list(self.vector.rows(theta, batch, missing))
            found |= {name: [Dense(torch.stack([row[name] for row in rows]))] for name in missing}
        return {name: found[name] for name in self.layout.names}

    def watched(
        self, theta: Tensor, batch: Batch, trace: Trace, deltas: list[Tensor | None]
    ) -> dict[str, list[Factor]] | None:
        owners = self.vector.known(trace)
        if owners is None or owners.calls != calls_of(trace):
            return None
        found = self._factored(owners.reached(trace, deltas), owners, batch.size)
        return found if len(found) == len(self.layout.names) else None

    def rows_at_once(self) -> int:
        """All: a batch is not cut."""
        return sys.maxsize

    def _factored(self, reached: Reached, owners: Owners, size: int) -> dict[str, list[Factor]]:
        """Of the parameters that have closed forms at all their sites."""
        at, out = sites_of(reached), {}
        for name in self.layout.names:
            found = None if name in owners.slow else factors_of(at.get(name, []), name, size)
            if found is not None:
                out[name] = found
        return out

    def _terms(
        self, theta: Tensor, batch: Batch, directions: dict[str, Tensor]
    ) -> tuple[Tensor, list[Term], list[str]]:
        """Losses, terms of all sites, and the parameters that go by the truth; from a traced graph once there is one."""
        moving, count = [n for n in self.layout.names if n in self.active], len(self.layout.names)
        buffers = self._loss.buffers
        known: list[Owners] = []  # from the call that comes before tracing

        def function(inputs: Sequence[Tensor]) -> tuple[Tensor, list[Term], list[str]]:
            named = zip(self.layout.names, inputs[:count], strict=True)
            parameters = {n: p.detach().requires_grad_(n in self.active) for n, p in named}
            along = dict(zip(moving, inputs[count : count + len(moving)], strict=True))
            last = count + len(moving) + len(buffers)
            given, written = batch.with_tensors(inputs[last:]), inputs[last - len(buffers) : last]
            with self._loss.bound(parameters, dict(zip(buffers, written, strict=True))) as held:
                trace = self.vector.follow(held, given, checked=not known)
                if not known:
                    known.append(self.vector.owners(theta, batch, trace))
                (owners,) = known
                along = {name: u for name, u in along.items() if name not in owners.slow}
                flow = flowed(trace, owners)
                found = [term for at in flow.reached for term in terms_at(*at, along, batch.size)]
            return trace.losses.detach(), found, sorted(owners.slow)

        parameters = [t.clone() for t in self.layout.unflatten(theta.detach()).values()]
        inputs = [*parameters, *(directions[n] for n in moving), *buffers.values(), *batch.tensors]
        kind = kind_of_inputs(inputs), self.active, batch.kind, self._factor
        anew = batch.numbers or kind in self._volatile  # numbers may anneal, owners change
        losses, terms, slow = function(inputs) if anew else self._programs(kind, function, inputs)
        if known and known[0].volatile and kind not in self._volatile:
            self._volatile.add(kind)
            log.warning(
                "row shares are slow: rows are placed by what the batch holds, or meet before the last parameter, so that "
                "whose they are is read in every batch anew: %d passes forward",
                2 * (batch.size - 1).bit_length() + 1,
            )
        self._note(slow)
        return check_finite(losses), terms, slow

    def _note(self, slow: Sequence[str]) -> None:
        """Once, what is slow."""
        if new := [name for name in slow if name not in self._said]:
            self._said.update(new)
            log.warning(
                "the row shares of %d of %d tensors are slow, first of %r: they are not had from the layers in closed form, "
                "but call by call, for one example at a time",
                *(len(new), len(self.layout.names), new[0]),
            )
