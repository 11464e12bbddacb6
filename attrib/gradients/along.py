"""The loss vector of a batch, and the truth about its derivatives.

    gradient   G(v) = d (v . loss) / d theta                 one backward pass, for any weights v (B,) of the examples
    along      <U_q, g_i> = d/de loss_i(theta + e U_q)       of all examples at once, per query and group of parameters
    rows       g_i = d loss_i / d theta                      one backward pass per example

with g_i = d loss_i / d theta, the batch and all. Nothing is assumed of the model: which rows are whose is not asked, and
examples may see each other, as in batch norm or a contrastive loss. Three ways to the derivative along U:

    forward    dual numbers: one tangent per query and group
    double     s = <G(v), U> is linear in v, and ds/dv = (<U, g_i>)_i: where an operation has no forward-mode rule
    single     a backward pass per example: where an operation has neither, and where that is fewer passes

Forward mode goes through `torch.no_grad()` inside a model, which training does not: it is used where it agrees with a
backward pass on the batch, v . (<U, g_i>)_i = <G(v), U> for random v. Source: the transposed product of Pearlmutter 1994.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from typing import Any

import numpy as np
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..batch import Batch
from ..constants import resolution, rounding
from ..errors import LossError
from ..functional import Functional, load_forward_mode
from ..generators import generators, set_generators
from ..kernels.factors.base import flat_rows
from ..layout import Layout
from ..losses import check_graph, check_losses, first_line

log = logging.getLogger("attrib")

Named = dict[str, Tensor]

# what torch raises where an operation lacks a derivative of the asked kind
LACKING = (NotImplementedError, RuntimeError)
WAYS = ("forward", "double", "single")


def random_weights(size: int, seed: int, like: Tensor, coarse: bool = False) -> Tensor:
    """(B,) of a normal distribution, the same for a seed; no generator of the user's is drawn from.

    coarse: powers of two of either sign, none above 1, where float16 would overflow. They pass through a backward pass that
    rounds to few bits and leave every rounding as it is, so that the examples' parts of it stay comparable.
    """
    random = np.random.default_rng(seed)
    if coarse:
        return torch.from_numpy(np.ldexp(random.choice([-1.0, 1.0], size), random.integers(-4, 1, size))).to(like)
    return torch.from_numpy(random.standard_normal(size)).to(like)


class LossVector:
    """`loss(model, *batch) -> (B,)` as a function of the parameter vector.

    active: names of the parameters that have a gradient, all at first. Every method evaluates the loss from the state of the
    generators at its call, however often it has to, and leaves them as one evaluation does.
    """

    def __init__(self, loss: Functional, layout: Layout) -> None:
        self._loss, self.layout = loss, layout
        self.active = frozenset(layout.names)
        self._ways: dict[Any, str] = {}
        self._lacks: dict[str, bool] = {}  # what derivatives are lacking, and whether that was said

    def at(self, active: frozenset[str], loss: Functional | None = None) -> "LossVector":
        """The same where these parameters have a gradient, or of a multiple of the loss; what is learnt of it is shared."""
        other = copy(self)
        other.active, other._loss = active, loss or self._loss
        return other

    def values(self, theta: Tensor, batch: Batch) -> Tensor:
        """(P,), batch -> (B,)."""
        with torch.enable_grad():  # a loss may differentiate on its way
            return self._evaluate(self.parameters(theta), Batch.of(batch)).detach()

    def parameters(self, theta: Tensor) -> Named:
        """Leaves by name, copies of the slices of theta."""
        named = self.layout.unflatten(theta.detach())
        return {name: t.clone().requires_grad_(name in self.active) for name, t in named.items()}

    def gradient(self, theta: Tensor, batch: Batch, weights: Tensor) -> tuple[Tensor, Named]:
        """(P,), batch, v (B,) -> losses (B,), G(v) by name; of what the loss does not depend on, zeros."""
        with self._graph(theta, Batch.of(batch)) as (parameters, losses):
            found = self._pull((losses * weights).sum(), parameters)
        return losses.detach(), found

    def along(
        self, theta: Tensor, batch: Batch, directions: Named, groups: Sequence[Sequence[str]]
    ) -> tuple[Tensor, Tensor]:
        """(P,), batch, U by name (Q, *parameter), names of each group -> losses (B,), (Q, B, G) float64."""
        start, queries, batch = generators(), len(next(iter(directions.values()))), Batch.of(batch)
        groups = [[name for name in group if name in self.active] for group in groups]
        passes = queries * len(groups)
        moving = {name: u for name, u in directions.items() if name in self.active}
        way = "single" if passes > batch.size else self._way(theta, batch, moving, start)
        while True:
            set_generators(start)
            try:
                with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have one derivative
                    return getattr(self, f"_{way}")(theta, batch, directions, groups, start)
            except LACKING:  # in this batch, of an operation that was not met before
                if way == "single":
                    raise
                way = self._ways[self._kind(batch)] = WAYS[WAYS.index(way) + 1]

    def rows(self, theta: Tensor, batch: Batch, names: Sequence[str]) -> Iterator[Named]:
        """(P,), batch -> of each example in turn g_i by name."""
        with self._graph(theta, Batch.of(batch)) as (parameters, losses):
            chosen = {name: parameters[name] for name in names}
            for loss in losses:
                yield self._pull(loss, chosen, retain=True)

    # the three ways

    def _forward(
        self, theta: Tensor, batch: Batch, directions: Named, groups: Sequence[Sequence[str]], start: Tensor
    ) -> tuple[Tensor, Tensor]:
        load_forward_mode()
        named = {n: t.detach() for n, t in self.layout.unflatten(theta).items()}
        out: list[list[Tensor]] = []
        for q in range(len(next(iter(directions.values())))):
            out.append([])
            for group in groups:
                set_generators(start)
                with torch.no_grad(), forward_ad.dual_level():
                    moving = {n: forward_ad.make_dual(named[n], directions[n][q].to(named[n])) for n in group}
                    found = forward_ad.unpack_dual(self._evaluate({**named, **moving}, batch))
                losses = found.primal.detach()
                out[-1].append(torch.zeros_like(losses) if found.tangent is None else found.tangent.detach())
        return losses, torch.stack([torch.stack(row, 1) for row in out]).double()

    def _double(
        self, theta: Tensor, batch: Batch, directions: Named, groups: Sequence[Sequence[str]], start: Tensor
    ) -> tuple[Tensor, Tensor]:
        with self._graph(theta, batch) as (parameters, losses):
            weights = torch.ones_like(losses, requires_grad=True)
            pulled = self._pull((losses * weights).sum(), parameters, create=True)
            out = losses.new_zeros(len(next(iter(directions.values()))), len(losses), len(groups))
            for g, group in enumerate(groups):
                for q in range(len(out)):
                    products = [(pulled[n] * directions[n][q]).sum() for n in group if pulled[n].requires_grad]
                    if products:
                        total = torch.stack(products).sum()
                        (found,) = torch.autograd.grad(total, weights, retain_graph=True, allow_unused=True)
                        out[q, :, g] = 0.0 if found is None else found
        return losses.detach(), out.double()

    def _single(
        self, theta: Tensor, batch: Batch, directions: Named, groups: Sequence[Sequence[str]], start: Tensor
    ) -> tuple[Tensor, Tensor]:
        names = [name for group in groups for name in group]
        flat = {name: flat_rows(directions[name]) for name in names}
        nothing = torch.zeros(len(next(iter(directions.values()))), dtype=torch.float64, device=theta.device)
        columns = []
        for row in self.rows(theta, batch, names):
            products = [sum(((flat[n] @ row[n].flatten()).double() for n in group), nothing) for group in groups]
            columns.append(torch.stack(products, 1))
        set_generators(start)
        return self.values(theta, batch), torch.stack(columns, 1)

    # which way

    def _way(self, theta: Tensor, batch: Batch, directions: Named, start: Tensor) -> str:
        """The first that works and agrees with a backward pass, for batches of one kind."""
        kind = self._kind(batch)
        if kind not in self._ways:
            one = {n: u[:1] for n, u in directions.items()}
            self._ways[kind] = next(w for w in WAYS if self._works(w, theta, batch, one, start))
            log.debug("the derivative along U goes by %s", self._ways[kind])
            new = [reason for reason, said in self._lacks.items() if not said]
            if self._ways[kind] == "single" and new:
                self._lacks.update(dict.fromkeys(new, True))
                log.warning(
                    "the derivative of the losses along a direction is slow, a backward pass per example: an operation has "
                    "neither a forward-mode nor a second derivative (%s)",
                    "; ".join(new),
                )
        return self._ways[kind]

    def _works(self, way: str, theta: Tensor, batch: Batch, one: Named, start: Tensor) -> bool:
        if way == "single":
            return True
        function: Callable[..., tuple[Tensor, Tensor]] = getattr(self, f"_{way}")
        try:
            set_generators(start)
            with sdpa_kernel(SDPBackend.MATH):
                losses, found = function(theta, batch, one, [list(one)], start)
        except LossError:
            raise
        except LACKING as error:
            log.debug("no derivative along U by %s: %s", way, error)
            self._lacks.setdefault(first_line(error), False)
            return False
        weights = random_weights(len(losses), len(losses), losses, self._loss.coarse)
        set_generators(start)
        pulled = self.gradient(theta, batch, weights)[1]
        parts = [(pulled[n] * u[0]).double() for n, u in one.items()]
        terms, want = found[0, :, 0] * weights, sum(float(p.sum()) for p in parts)
        # both are sums in the loss's precision; a derivative that is missing is missed by order one
        precision = self._loss.precision
        if self._loss.coarse:
            scale = float(torch.stack([terms.norm(), *(p.norm() for p in parts)]).norm())
            return abs(float(terms.sum()) - want) <= rounding(precision) * scale
        scale = float(terms.abs().sum()) + sum(float(p.abs().sum()) for p in parts)
        return abs(float(terms.sum()) - want) <= resolution(theta.dtype, precision) ** 0.5 * scale

    def _kind(self, batch: Batch) -> Any:
        return self.active, batch.kind

    # evaluations

    @contextmanager
    def _graph(self, theta: Tensor, batch: Batch) -> Iterator[tuple[Named, Tensor]]:
        """The leaves and the losses, to be differentiated within: the model holds the leaves until then."""
        parameters = self.parameters(theta)
        with torch.enable_grad(), self._loss.bound(parameters):
            losses = check_losses(self._loss.run(*batch.args), batch)
            self._loss.check_constants()
            yield parameters, losses

    def _evaluate(self, parameters: Named, batch: Batch) -> Tensor:
        losses = self._loss(parameters, *batch.args)
        self._loss.check_constants()
        return check_losses(losses, batch)

    def _pull(self, value: Tensor, parameters: Named, create: bool = False, retain: bool = False) -> Named:
        moving = [n for n, p in parameters.items() if p.requires_grad] if value.requires_grad else []
        pulled: tuple[Tensor | None, ...] = ()
        if moving:
            leaves, kept = [parameters[n] for n in moving], retain or create
            try:
                pulled = torch.autograd.grad(value, leaves, retain_graph=kept, create_graph=create, allow_unused=True)
            except RuntimeError as error:
                check_graph(error)
                raise
        found = dict(zip(moving, pulled, strict=True))
        return {n: torch.zeros_like(p) if (g := found.get(n)) is None else g for n, p in parameters.items()}
