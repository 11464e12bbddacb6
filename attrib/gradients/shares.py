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
from ..functional import Functional, random_state
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

    active: names of the parameters that have a gradient at the step; the others' shares are zero. May be set between calls.

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
        self.active = frozenset(layout.names)
        self._plans: dict[Any, Plan] = {}

    def total(self, theta: Tensor, batch: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
        """(P,), batch -> losses (B,), sum of all shares (P,)."""
        parameters = self._parameters(theta)
        moving = {n: p for n, p in parameters.items() if p.requires_grad}
        with torch.enable_grad():
            losses = self._losses(parameters, batch)
            grads = torch.autograd.grad(losses.sum(), list(moving.values()), allow_unused=True)
        found = {n: g for n, g in zip(moving, grads, strict=True) if g is not None}
        return losses.detach(), self.layout.flatten(found.get(n, torch.zeros_like(p)) for n, p in parameters.items())

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
                found = self._materialised(theta, batch, name)
            out[:, part] = found.flatten(1) if isinstance(found, Tensor) else found
        return out

    def check_split(self, theta: Tensor, batch: tuple[Any, ...]) -> None:
        """Raise CoupledExamplesError, on a few examples, where the gradient does not split over examples."""
        self._run(theta, tuple(a[:PLAN_BATCH] if isinstance(a, Tensor) else a for a in batch))

    def rows_at_once(self) -> int:
        """How many rows fit the budget."""
        return max(1, ROWS_BYTES // (8 * max(1, self.layout.size)))

    # one traced pass

    def _parameters(self, theta: Tensor) -> dict[str, Tensor]:
        named = self.layout.unflatten(theta.detach())
        return {name: t.clone().requires_grad_(name in self.active) for name, t in named.items()}

    def _losses(self, parameters: dict[str, Tensor], batch: tuple[Any, ...]) -> Tensor:
        losses = self._loss(parameters, *batch)
        self._loss.check_constants()
        return check_losses(losses, batch)

    def _trace(self, theta: Tensor, batch: tuple[Any, ...], values: bool = False) -> "_Trace":
        parameters = self._parameters(theta)
        batch = tuple(a.detach() if isinstance(a, Tensor) else a for a in batch)
        data = [a for a in batch if isinstance(a, Tensor)]
        moving = {n: p for n, p in parameters.items() if p.requires_grad}
        with torch.enable_grad(), SiteTracer(moving, data, values) as tracer:
            losses = self._losses(parameters, batch)
        return _Trace(moving, tracer.sites, tracer.unsplit, losses)

    def _run(self, theta: Tensor, batch: tuple[Any, ...]) -> "_Run":
        trace = self._trace(theta, batch)
        size = len(trace.losses)
        key = (*(_kind(s, size) for s in trace.sites), *sorted(trace.unsplit), size == 1)
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
        start = torch.get_rng_state()
        trace = self._trace(theta, batch, values=True)
        size, count = len(trace.losses), len(trace.sites)
        readings = self._readings(theta, batch, trace, start)
        wanted = [*(s.edge for s in trace.sites), *trace.parameters.values()]
        probes = []
        for i in sorted({0, size // 2, size - 1}):
            found = torch.autograd.grad(trace.losses[i], wanted, retain_graph=True, allow_unused=True)
            probes.append(_Probe(i, found[:count], dict(zip(trace.parameters, found[count:], strict=True))))
        whole = set(trace.unsplit)
        for name in trace.parameters:
            if name not in whole and not _splits(name, trace.sites, readings, probes, size):
                whole.add(name)
        for name in sorted(whole):
            self._check_whole(theta, batch, name, probes)
            log.info("per-example gradients of %s go through vmap of the whole loss", name)
        return Plan(readings, tuple(sorted(whole)))

    def _readings(
        self, theta: Tensor, batch: tuple[Any, ...], trace: "_Trace", start: Tensor
    ) -> list[Batchwise | None]:
        """Replace each example in turn by its neighbour, the random numbers being the same, and see what changes."""
        size = len(trace.losses)
        if size == 1:
            return [Batchwise(0) if site.shape else None for site in trace.sites]
        changes: list[list[tuple[int, Tensor]]] = [[] for _ in trace.sites]
        for i in range(size):
            order = torch.arange(size)
            order[i] = (i + 1) % size
            other = tuple(a[order.to(a.device)] if isinstance(a, Tensor) else a for a in batch)
            with random_state(start):
                replaced = self._trace(theta, other, values=True)
            for change, before, after in zip(changes, trace.sites, replaced.sites, strict=False):
                assert before.value is not None
                assert after.value is not None
                if before.shape == after.shape:
                    change.append((i, (after.value != before.value)))
        return [find(site.shape, size, change) for site, change in zip(trace.sites, changes, strict=True)]

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
        few = (tuple(a[s] if isinstance(a, Tensor) else a for a in batch) for s in slices)
        return torch.cat([(flat @ self._rows_whole(theta, b, name).flatten(1).T).double() for b in few], 1)

    def _materialised(self, theta: Tensor, batch: tuple[Any, ...], name: str) -> Tensor:
        try:
            return self._rows_whole(theta, batch, name)
        except RuntimeError as error:
            raise CoupledExamplesError(
                f"the gradient of a parameter cannot be written out per example: got {str(error).splitlines()[0]}, at "
                f'{name!r}. Record with capture="replay", which does not need the rows.'
            ) from error

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


def _kind(site: Site, size: int) -> tuple[Any, ...]:
    """What the split of a site may depend on: its call, its parameters, its shape but for the size of the batch."""
    shape = tuple((n // size, True) if n % size == 0 else (n, False) for n in site.shape)
    return (site.call.function, *sorted(names_of(site)), shape)


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
    if any(reading is None for _, reading, _ in mine):
        return False
    for probe in probes:
        gradient = probe.gradients[name]
        if gradient is None:
            continue
        direction = _direction(gradient)
        got = torch.zeros(size, dtype=torch.float64, device=gradient.device)
        for site, reading, n in mine:
            delta = probe.deltas[n]
            try:
                if delta is not None and reading is not None:
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
