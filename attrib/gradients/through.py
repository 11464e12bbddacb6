"""What passes through the rows of each example, and the truth about it.

    objective   a scalar F, or the sum of a loss vector
    delta       dF / dy at every site y = f(data, w)           one backward pass
    share of i  sum over sites of dy/dw^T (delta, the rows of example i alone)

The truth about the shares so defined is had by torch's own derivative of each call, made again by itself: of w alone, for
weights v (B,) of the examples at once. It knows nothing of the closed forms by which they are contracted.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..batch import Batch
from ..functional import Functional
from ..generators import generators, random_state
from ..layout import Layout
from ..losses import check_objective
from .along import Named, random_weights
from .assignment import Trace, contracted, followed, kind_of, sites_by_name
from .owners import FixedStatistics, Owners, owners_of
from .sites import Site
from .terms import Reached, names_of


@dataclass(frozen=True)
class Flow:
    """One pass there and back: its sites, each with the gradient of its output and whose rows are whose."""

    trace: Trace
    owners: Owners
    reached: Reached

    def gradient(self, weights: Tensor, names: Sequence[str]) -> Named:
        """v (B,) -> the sum of the shares, each times the weight of its example, by name."""
        found = {n: torch.zeros_like(self.trace.parameters[n]) for n in names}
        for site, reading, delta in self.reached:
            if names_of(site) & found.keys():
                for name, gradient in _pulled(site, reading.weighed(delta, weights), found.keys(), self.trace).items():
                    found[name] = found[name] + gradient
        return found


class RowVector:
    """The objective of a batch as a function of the parameter vector, and its shares by rows.

    active: names of the parameters that have a gradient, all at first. Every method starts from the state of the generators
    at its call, and leaves them as one evaluation does.
    """

    def __init__(self, loss: Functional, layout: Layout) -> None:
        self._loss, self.layout = loss, layout
        self.active = frozenset(layout.names)
        self._owners: dict[Any, Owners] = {}  # by kind of pass
        self._slow: dict[Any, frozenset[str]] = {}

    def at(self, active: frozenset[str], loss: Functional) -> "RowVector":
        """The same where these parameters have a gradient, or of a multiple of the loss; what is learnt of it is shared."""
        other = copy(self)
        other.active, other._loss = active, loss
        return other

    def values(self, theta: Tensor, batch: Batch) -> Tensor:
        """(P,), batch -> losses (B,), or the objective (1,)."""
        batch = Batch.of(batch)
        with torch.enable_grad(), self._loss.bound(self.parameters(theta)):
            return check_objective(self._loss.run(*batch.args), batch).detach()

    def parameters(self, theta: Tensor) -> Named:
        """Leaves by name, copies of the slices of theta."""
        named = self.layout.unflatten(theta.detach())
        return {name: t.clone().requires_grad_(name in self.active) for name, t in named.items()}

    def gradient(self, theta: Tensor, batch: Batch, weights: Tensor) -> tuple[Tensor, Named]:
        """(P,), batch, v (B,) -> losses (B,) or objective (1,), the sum of the shares, each times its weight, by name."""
        with self.flow(theta, batch) as flow:
            found = flow.gradient(weights, [*flow.trace.parameters])
            return flow.trace.losses.detach(), self._all(theta, found)

    def rows(self, theta: Tensor, batch: Batch, names: Sequence[str]) -> Iterator[Named]:
        """(P,), batch -> of each example in turn its share by name."""
        with self.flow(theta, batch) as flow:
            moving = [name for name in names if name in flow.trace.parameters]
            for one in torch.eye(flow.trace.size, dtype=theta.dtype, device=theta.device):
                found = self._all(theta, flow.gradient(one, moving))
                yield {name: found[name] for name in names}

    def along(
        self, theta: Tensor, batch: Batch, directions: Named, groups: Sequence[Sequence[str]]
    ) -> tuple[Tensor, Tensor]:
        """(P,), batch, U by name (Q, *parameter), names of each group -> losses (B,) or objective (1,), (Q, B, G)."""
        names, columns, start = [name for group in groups for name in group], [], generators()
        for row in self.rows(theta, batch, names):
            products = {n: (directions[n].flatten(1) @ row[n].flatten().to(directions[n])).double() for n in names}
            columns.append(torch.stack([torch.stack([products[n] for n in group]).sum(0) for group in groups], 1))
        with random_state(start):
            losses = self.values(theta, batch)
        return losses, torch.stack(columns, 1)

    @contextmanager
    def flow(self, theta: Tensor, batch: Batch) -> Iterator[Flow]:
        """A pass there and back, to be used within: the model holds the leaves until then."""
        batch = Batch.of(batch)
        with self._loss.bound(self.parameters(theta)) as held:
            trace = self.follow(held, batch)
            yield flowed(trace, self.owners(theta, batch, trace), keep=True)

    def follow(self, held: Named, batch: Batch, checked: bool = True) -> Trace:
        """One forward pass, the model holding these parameters."""
        trace = followed(self._loss, held, batch, checked=checked)
        known = trace.losses[None] if not checked and trace.losses.dim() == 0 else trace.losses
        return replace(trace, losses=check_objective(known, batch) if checked else known)

    def owners(self, theta: Tensor, batch: Batch, trace: Trace) -> Owners:
        """Of the kind of the trace, which is of the batch; the generators stay as they are."""
        kind = kind_of(trace), trace.read
        if kind in self._owners:
            return self._owners[kind]
        start = generators() if trace.start is None else trace.start
        fixed = FixedStatistics()
        with random_state(generators()), self._loss.bound(self.parameters(theta)) as held:

            def follow(batch: Batch) -> Trace:
                with fixed.again():
                    return followed(self._loss, held, batch, values=True)

            owners = owners_of(follow, batch, trace, start)
            if kind not in self._slow:  # that is of the calls, whoever owns their rows
                with random_state(start):
                    self._slow[kind] = _unproven(flowed(self.follow(held, batch), owners, keep=True))
            owners = replace(owners, slow=self._slow[kind])
        if not owners.volatile:
            self._owners[kind] = owners
        return owners

    def known(self, trace: Trace) -> Owners | None:
        """What was found of the kind of the trace."""
        return self._owners.get((kind_of(trace), trace.read))

    def _all(self, theta: Tensor, found: Named) -> Named:
        shapes = zip(self.layout.names, self.layout.shapes, strict=True)
        return {n: found[n].detach() if n in found else theta.new_zeros(shape) for n, shape in shapes}


def flowed(trace: Trace, owners: Owners, keep: bool = False) -> Flow:
    """Back from the objective to the sites. keep: what leads from parameters to weights."""
    total, edges = trace.losses.sum(), [site.edge for site in trace.sites]
    deltas: Sequence[Tensor | None] = [None] * len(edges)
    if edges and total.requires_grad:
        deltas = torch.autograd.grad(total, edges, allow_unused=True, retain_graph=keep)
    return Flow(trace, owners, owners.reached(trace, deltas))


def _pulled(site: Site, cotangent: Tensor, names: Any, trace: Trace) -> Named:
    """The vector-Jacobian product of the call at a site, by the parameters that its weights are made of."""
    leaves = {i: w.tensor.detach().requires_grad_() for i, w in site.call.weights.items()}
    fixed = {i: t.detach() for i, t in enumerate(site.call.leaves) if isinstance(t, Tensor)}
    with torch.enable_grad(), random_state(site.call.random):
        out = site.call.run({**fixed, **leaves})
    pulled = torch.autograd.grad(out, [*leaves.values()], cotangent.to(out.dtype), allow_unused=True)
    found: Named = {}
    for weight, gradient in zip(site.call.weights.values(), pulled, strict=True):
        mine = [name for name in sorted(weight.names) if name in names]
        if gradient is None or not mine:
            continue
        each: Sequence[Tensor | None] = [gradient]
        if weight.maker is not None:
            parameters = [trace.parameters[name] for name in mine]
            each = torch.autograd.grad(weight.tensor, parameters, gradient, retain_graph=True, allow_unused=True)
        for name, part in zip(mine, each, strict=True):
            if part is not None:
                found[name] = found[name] + part if name in found else part
    return found


def _unproven(flow: Flow) -> frozenset[str]:
    """The parameters whose contraction by sites, times random weights of the examples, is not that of the truth."""
    trace, readings = flow.trace, flow.owners.readings
    if not flow.reached:
        return frozenset()
    weights = random_weights(trace.size, trace.size, flow.reached[0][2], trace.coarse)
    at = {id(site): delta for site, _, delta in flow.reached}
    deltas, sites = [at.get(id(site)) for site in trace.sites], sites_by_name(trace.sites)
    wrong = set()
    for name, truth in flow.gradient(weights, [*trace.parameters]).items():
        found = contracted(name, sites.get(name, []), trace, readings, deltas, truth.detach())
        gap = 0.0 if found is None else abs(float(weights.double() @ found.products) - found.direct)
        if found is None or not found.within(gap, float(weights.abs().max())):
            wrong.add(name)
    return frozenset(wrong)
