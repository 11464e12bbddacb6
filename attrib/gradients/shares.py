"""Shares of the examples of a batch in its gradient: their total, their products with directions, their rows.

    total     sum_i g_i                   (P,)         one backward pass
    contract  <U_q, g_{i,k}>              (Q, B, K)    K parameter tensors; one backward pass to the sites, no g made
    rows      g_i                         (B, P)       materialised
    factors   g_i                                      in the form the layers give it

with g_i = d loss_i / d theta. Examples do not see each other, so a batch is worked through in slices whose activations fit
the cache: faster than the whole at once, and in memory that does not depend on its size.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..budget import slice_bytes
from ..errors import CoupledExamplesError
from ..functional import Functional
from ..kernels.factors import Dense, Factor
from ..layout import Layout
from ..program import Programs
from ..program import kind_of as kind_of_inputs
from .checks import check_losses, refuse_coupling
from .plan import Plan, Probe, Trace, calls_of, close, direction_like, few, kind_of, make_plan
from .sites import SiteTracer
from .terms import Reached, Term, contract, factors_of, names_of, rows_of, terms_at

log = logging.getLogger("attrib")

ROWS_BYTES = 32 << 20  # gradient rows held at once


class Shares:
    """Per-example gradients of `loss(model, *batch) -> (B,)`.

    active: names of the parameters that have a gradient at the step; the others' shares are zero. May be set between calls.

    Args:
        loss: called with the model and a batch; returns one loss per example.
        model: used as it is; parameters are given with each call.
        layout: the parameters that are trained.
        dtype: compute type.
        slices: bytes of what the calls of a forward pass return for the examples of a slice; None chooses.
    """

    def __init__(
        self,
        loss: Callable[..., Tensor],
        model: nn.Module,
        layout: Layout,
        dtype: torch.dtype,
        slices: int | None = None,
    ) -> None:
        refuse_coupling(model)
        self._slice_bytes = slices or slice_bytes(layout.size, dtype.itemsize)
        self.layout = layout
        self._loss = Functional(model, loss, layout, dtype)
        self.active = frozenset(layout.names)
        self._plans: dict[Any, Plan] = {}
        self._programs = Programs()
        self._bytes: float | None = None  # of activations per example

    def total(self, theta: Tensor, batch: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
        """(P,), batch -> losses (B,), sum of all shares (P,)."""
        parameters = self._parameters(theta)
        moving = {n: p for n, p in parameters.items() if p.requires_grad}
        losses: list[Tensor] = []
        sums: dict[str, Tensor] = {n: torch.zeros_like(p) for n, p in parameters.items()}
        for part, fresh in self._slices(theta, batch):
            with torch.enable_grad():
                found = self._losses(parameters, part)[fresh:]
                grads = torch.autograd.grad(found.sum(), list(moving.values()), allow_unused=True)
            losses.append(found.detach())
            for n, g in zip(moving, grads, strict=True):
                if g is not None:
                    sums[n] += g
        return torch.cat(losses), self.layout.flatten(sums.values())

    def contract(self, theta: Tensor, batch: tuple[Any, ...], directions: Tensor) -> tuple[Tensor, Tensor]:
        """(P,), batch, U (Q, P) -> losses (B,), <U_q, g_i> per parameter tensor, (Q, B, K) float64."""
        named = self.layout.unflatten(directions.to(theta.dtype))
        number = {name: k for k, name in enumerate(self.layout.names)}
        shape = len(number), len(directions), len(batch[0])
        products = torch.zeros(shape, dtype=torch.float64, device=theta.device)
        losses: list[Tensor] = []
        done = 0
        for part, fresh in self._slices(theta, batch):
            found, terms, whole = self._terms(theta, part, named)
            out = products[..., done - fresh : done - fresh + len(found)]
            out[..., :fresh] = 0.0  # they come again: the same sums
            for term in terms:
                out[number[term.name]] += contract(term, named[term.name])
            for name in whole:
                out[number[name]] = self._contract_whole(theta, part, name, named[name])
            losses.append(found[fresh:])
            done += len(found) - fresh
        return torch.cat(losses), products.permute(1, 2, 0)

    def rows(self, theta: Tensor, batch: tuple[Any, ...]) -> Tensor:
        """(P,), batch -> the gradient of each example, (B, P)."""
        found = self.factors(theta, batch)
        out = theta.new_zeros(len(batch[0]), self.layout.size)
        for name, part in self.layout.slices():
            out[:, part] = rows_of(found[name])
        return out

    def factors(self, theta: Tensor, batch: tuple[Any, ...]) -> dict[str, list[Factor]]:
        """(P,), batch -> of each parameter the factors that sum to its gradients; written out where there are none."""
        trace = self._trace(theta, batch)
        plan = self._plan(theta, trace, batch)
        return self._factors(theta, batch, plan, _reached(trace, plan), len(trace.losses))

    def watched(
        self, theta: Tensor, batch: tuple[Any, ...], trace: Trace, deltas: list[Tensor | None]
    ) -> dict[str, list[Factor]] | None:
        """`factors` from a pass that was made already: its sites and the gradients of their outputs, whatever reduction
        they have in them. None where its sites are not those of the loss."""
        plan = self._plan(theta, trace, batch)
        if plan.calls != calls_of(trace) or plan.whole:
            return None
        found = zip(trace.sites, plan.readings, deltas, strict=True)
        reached = [(site, reading, d) for site, reading, d in found if d is not None and reading is not None]
        return self._factors(theta, batch, plan, reached, len(trace.losses))

    def check_split(self, theta: Tensor, batch: tuple[Any, ...]) -> None:
        """Raise CoupledExamplesError, on a few examples, where the gradient does not split over examples."""
        self._plan(theta, self._trace(theta, few(batch)), batch)

    def rows_at_once(self) -> int:
        """How many rows fit the budget."""
        return max(1, ROWS_BYTES // (8 * max(1, self.layout.size)))

    # one traced pass

    def _slices(self, theta: Tensor, batch: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], int]]:
        """The batch in slices of one size, so the last may begin with examples seen already: how many."""
        size = len(batch[0])
        if self._bytes is None:
            self._bytes = self._activations(theta, few(batch))
        most = max(1, int(self._slice_bytes // self._bytes)) if self._bytes else size
        length = -(-size // -(-size // most))
        for lo in range(0, size, length):
            at = min(lo, size - length)
            yield tuple(a[at : at + length] if isinstance(a, Tensor) else a for a in batch), lo - at

    def _activations(self, theta: Tensor, batch: tuple[Any, ...]) -> float:
        """Bytes per example; of a loss that draws random numbers 0, not to be sliced: a slice would draw others."""
        before = torch.get_rng_state()
        found = self._trace(theta, batch).bytes / len(batch[0])
        drew = not torch.equal(torch.get_rng_state(), before)
        torch.set_rng_state(before)
        return 0.0 if drew else max(1.0, found)

    def _parameters(self, theta: Tensor) -> dict[str, Tensor]:
        named = self.layout.unflatten(theta.detach())
        return {name: t.clone().requires_grad_(name in self.active) for name, t in named.items()}

    def _losses(self, parameters: dict[str, Tensor], batch: tuple[Any, ...]) -> Tensor:
        losses = self._loss(parameters, *batch)
        self._loss.check_constants()
        return check_losses(losses, batch)

    def _trace(self, theta: Tensor, batch: tuple[Any, ...], values: bool = False) -> Trace:
        return self._follow(self._parameters(theta), batch, values)

    def _follow(
        self, parameters: dict[str, Tensor], batch: tuple[Any, ...], values: bool = False, checked: bool = True
    ) -> Trace:
        batch = tuple(a.detach() if isinstance(a, Tensor) else a for a in batch)
        data = [a for a in batch if isinstance(a, Tensor)]
        moving = {n: p for n, p in parameters.items() if p.requires_grad}
        with torch.enable_grad(), SiteTracer(moving, data, values) as tracer:
            losses = self._losses(parameters, batch) if checked else self._loss(parameters, *batch)
        return Trace(moving, tracer.sites, tracer.unsplit, losses, tracer.bytes)

    def _terms(
        self, theta: Tensor, batch: tuple[Any, ...], directions: dict[str, Tensor]
    ) -> tuple[Tensor, list[Term], tuple[str, ...]]:
        """Losses, terms of all sites, and the parameters that go through vmap; from a traced graph once there is one."""
        moving = [n for n in self.layout.names if n in self.active]
        count, tensors = len(self.layout.names), [isinstance(a, Tensor) for a in batch]
        known: list[Plan] = []  # from the call that comes before tracing

        def function(inputs: Sequence[Tensor]) -> tuple[Tensor, list[Term], tuple[str, ...]]:
            named = zip(self.layout.names, inputs[:count], strict=True)
            parameters = {n: p.detach().requires_grad_(n in self.active) for n, p in named}
            along = dict(zip(moving, inputs[count : count + len(moving)], strict=True))
            rest = iter(inputs[count + len(moving) :])
            given = tuple(next(rest) if t else a for t, a in zip(tensors, batch, strict=True))
            trace = self._follow(parameters, given, checked=not known)
            if not known:
                known.append(self._plan(theta, trace, batch))
            (plan,), size = known, len(trace.losses)
            along = {name: u for name, u in along.items() if name not in plan.whole}
            found = (terms_at(*at, along, size) for at in _reached(trace, plan))
            return trace.losses.detach(), [term for terms in found for term in terms], plan.whole

        parameters = [t.clone() for t in self.layout.unflatten(theta.detach()).values()]
        inputs = [*parameters, *(directions[n] for n in moving), *(a for a in batch if isinstance(a, Tensor))]
        fixed = tuple(a for a in batch if not isinstance(a, Tensor))
        losses, terms, whole = self._programs((kind_of_inputs(inputs), self.active, repr(fixed)), function, inputs)
        return check_losses(losses, batch), terms, whole

    def _plan(self, theta: Tensor, trace: Trace, batch: tuple[Any, ...]) -> Plan:
        key = kind_of(trace)
        if key not in self._plans:
            part = few(batch)
            plan, probes = make_plan(lambda b: self._trace(theta, b, values=True), part)
            for name in plan.whole:
                self._check_whole(theta, part, name, probes)
                log.info("per-example gradients of %s go through vmap of the whole loss", name)
            self._plans[key] = plan
        return self._plans[key]

    def _factors(
        self, theta: Tensor, batch: tuple[Any, ...], plan: Plan, reached: Reached, size: int
    ) -> dict[str, list[Factor]]:
        out: dict[str, list[Factor]] = {}
        for name in self.layout.names:
            found = (
                None if name in plan.whole else factors_of([r for r in reached if name in names_of(r[0])], name, size)
            )
            out[name] = [Dense(self._materialised(theta, batch, name))] if found is None else found
        return out

    # the last resort: vmap of the gradient of the whole loss

    def _rows_whole(self, theta: Tensor, batch: tuple[Any, ...], name: str) -> Tensor:
        named = {n: t.detach() for n, t in self.layout.unflatten(theta).items()}

        def one(parameter: Tensor, *example: Any) -> Tensor:
            rows = tuple(e[None] if isinstance(e, Tensor) else e for e in example)
            return self._loss({**named, name: parameter}, *rows)[0]

        dims = (None, *(0 if isinstance(a, Tensor) else None for a in batch))
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernels do not map over examples
            return torch.vmap(torch.func.grad(one), in_dims=dims)(named[name], *batch)

    def _contract_whole(self, theta: Tensor, batch: tuple[Any, ...], name: str, direction: Tensor) -> Tensor:
        """(Q, *parameter) -> (Q, B) float64, the rows of a few examples at a time."""
        size, flat = len(batch[0]), direction.flatten(1)
        at_once = max(1, ROWS_BYTES // (8 * max(1, flat.shape[1])))
        slices = (slice(lo, lo + at_once) for lo in range(0, size, at_once))
        part = (tuple(a[s] if isinstance(a, Tensor) else a for a in batch) for s in slices)
        return torch.cat([(flat @ self._rows_whole(theta, b, name).flatten(1).T).double() for b in part], 1)

    def _materialised(self, theta: Tensor, batch: tuple[Any, ...], name: str) -> Tensor:
        try:
            return self._rows_whole(theta, batch, name)
        except RuntimeError as error:
            raise CoupledExamplesError(
                f"the gradient of a parameter cannot be written out per example: got {str(error).splitlines()[0]}, at "
                f'{name!r}. Record with capture="replay", which does not need the rows.'
            ) from error

    def _check_whole(self, theta: Tensor, batch: tuple[Any, ...], name: str, probes: list[Probe]) -> None:
        reason = "its rows do not agree with the gradient of a single loss"
        try:
            rows = self._rows_whole(theta, batch, name)
            good = all(
                close((direction_like(t) * rows[p.example]).sum(), direction_like(t) * t)
                for p in probes
                if (t := p.gradients[name]) is not None
            )
        except RuntimeError as error:
            good, reason = False, str(error).splitlines()[0]
        if not good:
            raise CoupledExamplesError(
                f"the gradient of a parameter cannot be split over examples: got {reason}, expected each loss to "
                f"depend on its own example alone, at {name!r}. Check that loss(model, *batch)[i] uses only row i "
                f"of the batch (no batch statistics, no reduction across examples)."
            )


def _reached(trace: Trace, plan: Plan) -> Reached:
    """The sites that the losses depend on and that split, each with its reading and the gradient of its output."""
    used = [n for n, s in enumerate(trace.sites) if plan.readings[n] is not None and not names_of(s) <= set(plan.whole)]
    edges = [trace.sites[n].edge for n in used]
    deltas = torch.autograd.grad(trace.losses.sum(), edges, allow_unused=True) if edges else ()
    found = zip(used, deltas, strict=True)
    return [(trace.sites[n], r, d) for n, d in found if d is not None and (r := plan.readings[n]) is not None]
