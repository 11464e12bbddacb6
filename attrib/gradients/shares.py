"""Shares of the examples of a batch in its gradient: their total, their products with directions, their rows.

    total     sum_i g_i                   (P,)         one backward pass
    contract  <U_q, g_{i,k}>              (Q, B, K)    K parameter tensors; one backward pass to the sites, no g made
    rows      g_i                         (B, P)       materialised

with g_i = d loss_i / d theta. On the first batch of a kind the split is checked against the gradient of single losses
(`_plan`); a parameter whose sites do not split goes through `vmap` of the whole loss, and one that does not
split there either is refused by name.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..errors import CoupledExamplesError
from ..functional import Functional
from ..layout import Layout
from .batchwise import Batchwise, find
from .checks import check_losses, refuse_coupling
from .sites import Site, SiteTracer
from .terms import contract_site, names_of, rows_at

log = logging.getLogger("attrib")

ROWS_BYTES = 32 << 20  # gradient rows held at once
PLAN_BATCH = 7  # examples that a plan is made on


@dataclass(frozen=True)
class Plan:
    """How the sites of one kind of batch split: a reading per site, and the parameters that go through vmap."""

    readings: list[Batchwise | None]
    whole: tuple[str, ...]


class Shares:
    """Per-example gradients of `loss(model, *batch) -> (B,)`.

    Args:
        loss: called with the model and a batch; returns one loss per example.
        model: used as it is; parameters are given with each call.
        layout: the parameters that are trained.
        dtype: compute type.
    """

    def __init__(self, loss: Callable[..., Tensor], model: nn.Module, layout: Layout, dtype: torch.dtype) -> None:
        refuse_coupling(model)
        self.layout = layout
        self._loss = Functional(model, loss, layout, dtype)
        self._plans: dict[Any, Plan] = {}

    def total(self, theta: Tensor, batch: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
        """(P,), batch -> losses (B,), sum of all shares (P,)."""
        parameters = self._parameters(theta)
        with torch.enable_grad():
            losses = self._losses(parameters, batch)
            grads = torch.autograd.grad(losses.sum(), list(parameters.values()), allow_unused=True)
        filled = (torch.zeros_like(p) if g is None else g for p, g in zip(parameters.values(), grads, strict=True))
        return losses.detach(), self.layout.flatten(filled)

    def contract(self, theta: Tensor, batch: tuple[Any, ...], directions: Tensor) -> tuple[Tensor, Tensor]:
        """(P,), batch, U (Q, P) -> losses (B,), <U_q, g_i> per parameter tensor, (Q, B, K) float64."""
        run = self._run(theta, batch)
        named = self.layout.unflatten(directions.to(theta.dtype))
        out = torch.zeros(len(directions), run.size, len(self.layout.names), dtype=torch.float64)
        out = out.to(theta.device)
        for k, name in enumerate(self.layout.names):
            if name in run.plan.whole:
                out[:, :, k] = self._contract_whole(theta, batch, name, named[name])
            else:
                for site, reading, delta in run.at(name):
                    out[:, :, k] += contract_site(site, reading, delta, name, named[name], run.size)
        return run.losses, out

    def rows(self, theta: Tensor, batch: tuple[Any, ...]) -> Tensor:
        """(P,), batch -> the gradient of each example, (B, P)."""
        run = self._run(theta, batch)
        out = theta.new_zeros(run.size, self.layout.size)
        for name, part in self.layout.slices():
            found = None if name in run.plan.whole else rows_at(run.at(name), name, run.size)
            if found is None:
                found = self._rows_whole(theta, batch, name)
            out[:, part] = found.flatten(1) if isinstance(found, Tensor) else found
        return out

    def rows_at_once(self) -> int:
        """How many rows fit the budget."""
        return max(1, ROWS_BYTES // (8 * max(1, self.layout.size)))

    # one traced pass

    def _parameters(self, theta: Tensor) -> dict[str, Tensor]:
        named = self.layout.unflatten(theta.detach())
        return {name: t.clone().requires_grad_() for name, t in named.items()}

    def _losses(self, parameters: dict[str, Tensor], batch: tuple[Any, ...]) -> Tensor:
        losses = self._loss(parameters, *batch)
        self._loss.check_constants()
        return check_losses(losses, batch)

    def _trace(self, theta: Tensor, batch: tuple[Any, ...]) -> "_Trace":
        parameters = self._parameters(theta)
        batch = tuple(a.detach() if isinstance(a, Tensor) else a for a in batch)
        data = [a for a in batch if isinstance(a, Tensor)]
        with torch.enable_grad(), SiteTracer(parameters, data) as tracer:
            losses = self._losses(parameters, batch)
        return _Trace(parameters, tracer.sites, tracer.unsplit, losses)

    def _run(self, theta: Tensor, batch: tuple[Any, ...]) -> "_Run":
        trace = self._trace(theta, batch)
        size = len(trace.losses)
        key = (*((s.call.function, *sorted(names_of(s)), len(s.shape)) for s in trace.sites), size == 1)
        plan = self._plans.get(key)
        if plan is None:
            few = tuple(a[:PLAN_BATCH] if isinstance(a, Tensor) else a for a in batch)
            plan = self._plans[key] = self._plan(theta, few)
        used = [n for n, s in enumerate(trace.sites) if not names_of(s) <= set(plan.whole)]
        edges = [trace.sites[n].edge for n in used]
        deltas = torch.autograd.grad(trace.losses.sum(), edges, allow_unused=True) if edges else ()
        found = [(trace.sites[n], plan.readings[n], d) for n, d in zip(used, deltas, strict=True) if d is not None]
        return _Run(trace.losses.detach(), found, plan)

    # how a kind of batch splits

    def _plan(self, theta: Tensor, batch: tuple[Any, ...]) -> Plan:
        """Read the split off a few examples, one backward pass for each, and check it against their own gradients."""
        trace = self._trace(theta, batch)
        size, count = len(trace.losses), len(trace.sites)
        wanted = [*(s.edge for s in trace.sites), *trace.parameters.values()]
        probes = []
        for i in sorted({0, size // 2, size - 1}):
            found = torch.autograd.grad(trace.losses[i], wanted, retain_graph=True, allow_unused=True)
            probes.append(_Probe(i, found[:count], dict(zip(trace.parameters, found[count:], strict=True))))
        readings = [
            find(site.shape, size, [(p.example, d) for p in probes if (d := p.deltas[n]) is not None])
            for n, site in enumerate(trace.sites)
        ]
        whole = set(trace.unsplit)
        for name in self.layout.names:
            if name not in whole and not _splits(name, trace.sites, readings, probes, size):
                whole.add(name)
        for name in sorted(whole):
            self._check_whole(theta, batch, name, probes)
            log.info("per-example gradients of %s go through vmap of the whole loss", name)
        return Plan(readings, tuple(sorted(whole)))

    # the last resort: vmap of the gradient of the whole loss

    def _rows_whole(self, theta: Tensor, batch: tuple[Any, ...], name: str) -> Tensor:
        named = {n: t.detach() for n, t in self.layout.unflatten(theta).items()}

        def one(parameter: Tensor, *example: Any) -> Tensor:
            rows = tuple(e[None] if isinstance(e, Tensor) else e for e in example)
            return self._loss({**named, name: parameter}, *rows)[0]

        dims = (None, *(0 if isinstance(a, Tensor) else None for a in batch))
        at_once = max(1, ROWS_BYTES // (8 * max(1, named[name].numel())))
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernels do not map over examples
            return torch.vmap(torch.func.grad(one), in_dims=dims, chunk_size=at_once)(named[name], *batch)

    def _contract_whole(self, theta: Tensor, batch: tuple[Any, ...], name: str, direction: Tensor) -> Tensor:
        rows = self._rows_whole(theta, batch, name).flatten(1)
        return (direction.flatten(1) @ rows.T).double()

    def _check_whole(self, theta: Tensor, batch: tuple[Any, ...], name: str, probes: "list[_Probe]") -> None:
        reason = "its rows do not agree with the gradient of a single loss"
        try:
            rows = self._rows_whole(theta, batch, name)
            good = all(
                _close((_direction(t) * rows[p.example]).sum(), _direction(t) * t)
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


@dataclass(frozen=True)
class _Trace:
    """One traced forward pass."""

    parameters: dict[str, Tensor]
    sites: list[Site]
    unsplit: set[str]
    losses: Tensor


@dataclass(frozen=True)
class _Probe:
    """The gradient of one example's loss, at every site and for every parameter."""

    example: int
    deltas: tuple[Tensor | None, ...]
    gradients: dict[str, Tensor | None]


def _splits(name: str, sites: list[Site], readings: list[Batchwise | None], probes: list[_Probe], size: int) -> bool:
    """Whether contracting the probes' deltas gives what their own gradients give."""
    mine = [(s, r, n) for n, (s, r) in enumerate(zip(sites, readings, strict=True)) if name in names_of(s)]
    for probe in probes:
        gradient = probe.gradients[name]
        if gradient is None:
            continue
        direction = _direction(gradient)
        got = torch.zeros(size, dtype=torch.float64, device=gradient.device)
        for site, reading, n in mine:
            delta = probe.deltas[n]
            if reading is None:
                return False
            try:
                if delta is not None:
                    got += contract_site(site, reading, delta, name, direction[None], size)[0]
            except (NotImplementedError, RuntimeError):
                return False
        if not _close(got[probe.example], direction * gradient):
            return False
    return True


@dataclass(frozen=True)
class _Run:
    losses: Tensor
    traced: list[tuple[Site, Batchwise | None, Tensor]]
    plan: Plan

    @property
    def size(self) -> int:
        return len(self.losses)

    def at(self, name: str) -> list[tuple[Site, Batchwise, Tensor]]:
        return [(s, r, d) for s, r, d in self.traced if r is not None and name in names_of(s)]


def _direction(like: Tensor) -> Tensor:
    """A fixed dense direction that no user's random generator is drawn for."""
    steps = torch.arange(1, like.numel() + 1, dtype=torch.float64, device=like.device)
    return torch.cos(steps * 1.7).to(like.dtype).reshape(like.shape)


def _close(got: Tensor, products: Tensor) -> bool:
    """Against the sum of `products`, to sqrt(eps) of their absolute sum: a wrong split is wrong by order one."""
    scale = products.abs().sum().double()
    return bool((got - products.sum().double()).abs() <= torch.finfo(products.dtype).eps ** 0.5 * scale)
