"""ExampleGradients: shares by example, the first definition.

g_i = d loss_i / d theta, the batch and all. The truth is the loss vector's derivative (`along`), which asks nothing of
the model. The fast form reads the shares off where parameters meet data (`sites`), one backward pass to the sites and no g
made; it is used for the parameters for which it was proven equal on a batch of that kind (`assignment`, `forms`). Where
examples do not see each other a batch is worked through in slices that fit the cache, in memory that does not depend on its
size.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from ..batch import Batch
from ..budget import slice_bytes
from ..generators import generators, random_state
from ..kernels.factors import Dense, Factor
from ..losses import check_losses
from ..program import kind_of as kind_of_inputs
from .along import LossVector, random_weights
from .assignment import Assignment, Trace, calls_of, kind_of, ownership
from .definition import Gradients
from .directions import Directions
from .forms import Form, Forms
from .mapped import agree, rows_by_vmap
from .several import NotTogetherError, Several, at_once
from .terms import Reached, Term, contract, factors_of, names_of, sites_of, terms_at

log = logging.getLogger("attrib")

ROWS_BYTES = 32 << 20  # gradient rows held at once


class Passed(NamedTuple):
    """losses (B,); terms of all sites; of parameters at volatile ones how far off they are read; parameters that go along
    U."""

    losses: Tensor
    terms: list[Term]
    gaps: dict[str, Tensor]
    whole: list[str]


class ExampleGradients(Gradients):
    """Per-example gradients of `loss(model, *batch) -> (B,)`, one loss per example. Args: as of `Gradients`."""

    def _begin(self, slices: int | None) -> None:
        self.vector, self._several = LossVector(self._loss, self.layout), Several()
        self._forms = Forms(self._loss, self.vector, slices or slice_bytes(self.layout.size, self._loss.dtype.itemsize))

    def at(self, active: frozenset[str], factor: float = 1.0, buffers: Mapping[str, Tensor] | None = None) -> Self:
        other = super().at(active, factor, buffers)
        other._forms = self._forms.at(other.vector, other._loss)
        return other

    @property
    def coupled(self) -> bool:
        return self._forms.coupled

    def gradient(self, theta: Tensor, batch: Batch, weights: Tensor) -> tuple[Tensor, Tensor]:
        """(P,), batch, v (B,) -> losses (B,), the gradient of v . losses (P,): by backward passes, not by sites."""
        batch = Batch.of(batch)
        form = self._forms.of(theta, batch)
        losses: list[Tensor] = []
        sums, done = theta.new_zeros(self.layout.size), 0
        for part, fresh in self._forms.slices(form, batch):
            here = weights[done - fresh : done - fresh + part.size].clone()
            here[:fresh] = 0.0
            found, pulled = self.vector.gradient(theta, part, here)
            losses.append(found[fresh:])
            sums += self.layout.flatten(pulled.values())
            done += len(found) - fresh
        return torch.cat(losses), sums

    def contract(
        self, theta: Tensor, batch: Batch, directions: Tensor, groups: Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor]:
        batch = Batch.of(batch)
        form = self._forms.of(theta, batch)
        named = self.layout.unflatten(directions.to(theta.dtype))
        number = {name: k for k, name in enumerate(self.layout.names)}
        shape = len(number), len(directions), batch.size
        products = torch.zeros(shape, dtype=torch.float64, device=theta.device)
        losses: list[Tensor] = []
        several, done = Directions(self.layout.unflatten(directions), named, batch.size), 0
        for part, fresh in self._forms.slices(form, batch):
            start = None if form.bytes else generators()  # a batch that may be cut draws no numbers
            found, terms, whole = self._terms(theta, part, named, form)
            out = products[..., done - fresh : done - fresh + len(found)]
            out[..., :fresh] = 0.0  # they come again: the same sums
            for term in terms:
                if term.name not in whole:
                    out[number[term.name]] += several.contract(term)
            if whole:
                together = _together(whole, number, groups)
                with random_state(start):
                    along = self.vector.along(theta, part, named, together)[1]
                for g, names in enumerate(together):
                    out[number[names[0]]] = along[..., g]
            losses.append(found[fresh:])
            done += len(found) - fresh
        return torch.cat(losses), products.permute(1, 2, 0)

    def factors(self, theta: Tensor, batch: Batch) -> dict[str, list[Factor]]:
        batch = Batch.of(batch)
        form, start = self._forms.of(theta, batch), generators()
        if form.reason is not None:
            return self._written_out(theta, batch, list(self.layout.names), start, alone=not self.coarse)
        parameters = self.vector.parameters(theta)
        with self._loss.bound(parameters) as held:
            trace = self._forms.follow(held, batch)
            assignment = self._forms.assignment(theta, trace, batch, form)
            reached, gaps = _reached(trace, assignment)
        whole, at = {*assignment.whole, *self._forms.misread(gaps)}, sites_of(reached)
        out: dict[str, list[Factor]] = {}
        for name in self.layout.names:
            found = None if name in whole else factors_of(at.get(name, []), name, len(trace.losses))
            if found is not None:
                out[name] = found
        missing = [name for name in self.layout.names if name not in out]
        return out | self._written_out(theta, batch, missing, start, alone=form.few or not self.coarse)

    def watched(
        self, theta: Tensor, batch: Batch, trace: Trace, deltas: list[Tensor | None]
    ) -> dict[str, list[Factor]] | None:
        # None where the sites are not those of the loss, a parameter has no closed form, or which rows are whose has to be
        # read off this very batch
        form = self._forms.of(theta, batch)
        if form.reason is not None:
            return None
        assignment = self._forms.assignments.get(kind_of(trace))
        if assignment is None or assignment.calls != calls_of(trace) or assignment.whole or assignment.volatile:
            return None
        found = zip(trace.sites, assignment.readings, deltas, strict=True)
        reached = [(site, reading, d) for site, reading, d in found if d is not None and reading is not None]
        out: dict[str, list[Factor]] = {}
        at = sites_of(reached)
        for name in self.layout.names:
            factors = factors_of(at.get(name, []), name, len(trace.losses))
            if factors is None:
                return None
            out[name] = factors
        return out

    def rows_at_once(self) -> int:
        return max(1, ROWS_BYTES // (8 * max(1, self.layout.size)))

    # one traced pass

    def _terms(
        self, theta: Tensor, batch: Batch, directions: dict[str, Tensor], form: Form
    ) -> tuple[Tensor, list[Term], list[str]]:
        """Losses, terms of all sites, and the parameters that go along U; from a traced graph once there is one."""
        if form.reason is not None:
            return self.vector.values(theta, batch), [], self._moving
        function = self._pass(theta, batch, form)
        inputs = self._inputs(theta, directions, batch.tensors)
        run = function(inputs) if batch.numbers else self._programs(self._kind(inputs, batch), function, inputs)
        losses, terms, gaps, whole = run  # numbers may anneal
        return check_losses(losses, batch), terms, sorted({*whole, *self._forms.misread(gaps)})

    @property
    def _moving(self) -> list[str]:
        return [n for n in self.layout.names if n in self.active]

    def _inputs(self, theta: Tensor, directions: dict[str, Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
        """Of `_pass`."""
        parameters = [t.clone() for t in self.layout.unflatten(theta.detach()).values()]
        return [*parameters, *(directions[n] for n in self._moving), *self._loss.buffers.values(), *tensors]

    def _kind(self, inputs: Sequence[Tensor], batch: Batch) -> Any:
        return kind_of_inputs(inputs), self.active, batch.kind, self._factor

    def _pass(self, theta: Tensor, batch: Batch, form: Form) -> Callable[[Sequence[Tensor]], Passed]:
        """One traced pass, as a function of the tensors that it depends on."""
        count, moving, buffers = len(self.layout.names), self._moving, self._loss.buffers
        known: list[Assignment] = []  # from the call that comes before tracing

        def function(inputs: Sequence[Tensor]) -> Passed:
            named = zip(self.layout.names, inputs[:count], strict=True)
            parameters = {n: p.detach().requires_grad_(n in self.active) for n, p in named}
            along = dict(zip(moving, inputs[count : count + len(moving)], strict=True))
            last = count + len(moving) + len(buffers)
            given, written = batch.with_tensors(inputs[last:]), inputs[last - len(buffers) : last]
            with self._loss.bound(parameters, dict(zip(buffers, written, strict=True))) as held:
                trace = self._forms.follow(held, given, checked=not known)
                if not known:
                    known.append(self._forms.assignment(theta, trace, batch, form))
                (assignment,), size = known, len(trace.losses)
                along = {name: u for name, u in along.items() if name not in assignment.whole}
                reached, gaps = _reached(trace, assignment)
                found = [term for at in reached for term in terms_at(*at, along, size)]
            return Passed(trace.losses.detach(), found, gaps, list(assignment.whole))

        return function

    # several steps at once

    def steps_at_once(self, theta: Tensor, batch: Batch, queries: int, most: int) -> int:
        form = self._forms.of(theta, batch)
        if form.reason is not None or not form.bytes or batch.numbers or self._loss.buffers or self.coarse:
            return 1  # what draws numbers is not cut either
        if next(self._forms.slices(form, batch))[0].size < batch.size:
            return 1
        tensors = theta.element_size() * self.layout.size + 8 * batch.size * len(self.layout.names)
        return at_once(form.bytes * batch.size + queries * tensors, most)

    def contract_steps(
        self, theta: Tensor, batches: Sequence[Batch], directions: Tensor
    ) -> tuple[Tensor, Tensor] | None:
        batch, common = batches[-1], len(batches) == 1
        single, names = self._pass(theta[-1], batch, self._forms.of(theta[-1], batch)), self._moving
        number = {name: k for k, name in enumerate(self.layout.names)}

        def function(inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
            passed = single(inputs)
            if passed.gaps or passed.whole:
                raise NotTogetherError("what is had of a parameter depends on the batch")
            along = dict(zip(names, inputs[len(number) :], strict=False))
            zeros = torch.zeros(directions.shape[1], batch.size, dtype=torch.float64, device=theta.device)
            products = [zeros] * len(number)
            for term in passed.terms:
                products[number[term.name]] = products[number[term.name]] + contract(term, along[term.name])
            return passed.losses, torch.stack(products)

        tensors = (
            batch.tensors if common else [torch.stack(each) for each in zip(*(b.tensors for b in batches), strict=True)]
        )
        named = {name: u.contiguous() for name, u in self.layout.unflatten(directions.to(theta.dtype)).items()}
        inputs = self._inputs(theta, named, tensors)
        found = self._several((self._kind(inputs, batch), common), function, inputs, len(tensors) if common else 0)
        if found is None or not torch.isfinite(found[0]).all():
            return None
        losses, products = found
        return losses, products.permute(0, 2, 3, 1)

    # written out

    def _written_out(
        self, theta: Tensor, batch: Batch, names: list[str], start: Tensor, alone: bool
    ) -> dict[str, list[Factor]]:
        """The gradient of each example: all at once by vmap where that agrees with a backward pass, else one by one. alone:
        whether an example may be thought to have by itself the loss that it has in the batch, which the comparison does not
        tell where both sides are rounded to few bits."""
        out: dict[str, Tensor] = {}
        moving = [name for name in names if name in self.active]
        if moving and alone:
            parameters = self.vector.parameters(theta)
            with random_state(start):
                mapped = rows_by_vmap(self._loss, parameters, batch, moving)
            with random_state(start):
                weights = random_weights(batch.size, batch.size, theta, self.coarse)
                pulled = self.vector.gradient(theta, batch, weights)[1] if mapped else {}
            out |= {n: rows for n, rows in mapped.items() if agree(rows, pulled[n], weights, self.precision)}
        rest = [name for name in moving if name not in out]
        if rest:
            with random_state(start):
                rows = list(self.vector.rows(theta, batch, rest))
            out |= {name: torch.stack([r[name] for r in rows]) for name in rest}
        shapes = dict(zip(self.layout.names, self.layout.shapes, strict=True))
        return {n: [Dense(out[n] if n in out else theta.new_zeros(batch.size, *shapes[n]))] for n in names}


def _together(names: Sequence[str], number: dict[str, int], groups: Sequence[int] | None) -> list[list[str]]:
    """The names by the number of their group."""
    found: dict[int, list[str]] = {}
    for name in names:
        found.setdefault(number[name] if groups is None else groups[number[name]], []).append(name)
    return list(found.values())


def _reached(trace: Trace, assignment: Assignment) -> tuple[Reached, dict[str, Tensor]]:
    """The sites that the losses depend on and that split, each with its reading and the gradient of its output; and of the
    parameters at volatile ones, how far off the reading is in this batch: for weighted losses the gradient there must be
    that of their sum, each row times the weight of its example."""
    used = [
        n
        for n, s in enumerate(trace.sites)
        if assignment.readings[n] is not None and not names_of(s) <= set(assignment.whole)
    ]
    edges = [trace.sites[n].edge for n in used]
    volatile = [n for n in used if n in assignment.volatile]
    total = trace.losses.sum()
    deltas = torch.autograd.grad(total, edges, allow_unused=True, retain_graph=bool(volatile)) if edges else ()
    found: dict[int, Tensor | None] = dict(zip(used, deltas, strict=True))
    gaps: dict[str, Tensor] = {}
    if volatile:
        weights = random_weights(len(trace.losses), len(trace.losses), trace.losses, trace.coarse)
        again = torch.autograd.grad(
            (trace.losses * weights).sum(), [trace.sites[n].edge for n in volatile], allow_unused=True
        )
        for n, gap in ownership(trace, assignment, found, dict(zip(volatile, again, strict=True)), weights).items():
            for name in names_of(trace.sites[n]):
                gaps[name] = torch.maximum(gaps[name], gap) if name in gaps else gap
    reached = [
        (trace.sites[n], r, d) for n, d in found.items() if d is not None and (r := assignment.readings[n]) is not None
    ]
    return reached, gaps
