"""The share of a parameter at one site: a factor, or what forward-mode derivatives give.

A site may read a parameter itself or a weight made of it (a transpose, a weight norm); directions are then carried to the
weight first: <g, U> of the parameter is <factor, dweight/dparameter U> of the weight.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ..constants import is_low, wide
from ..kernels.factors import Dense, Factor
from .batchwise import Batchwise
from .functions import FUNCTIONS, Bound
from .sites import Site, Weight, jvp, remade, tangent

Reached = list[tuple[Site, Batchwise, Tensor]]  # sites with the reading of their output and its gradient


class Term(NamedTuple):
    """What a site adds to <U_q, g_i> of a parameter.

    factor with along (Q, *weight), or None for U itself; where there is no factor, along is <U_q, g_i> already, (Q, B).
    """

    name: str
    factor: Factor | None
    along: Tensor | None


def names_of(site: Site) -> frozenset[str]:
    return frozenset().union(*(w.names for w in site.call.weights.values()))


def terms_at(site: Site, reading: Batchwise, delta: Tensor, directions: dict[str, Tensor], size: int) -> list[Term]:
    """The terms of every parameter in `directions`, name -> U (Q, *parameter), that the site reads."""
    found = []
    for position, weight in site.call.weights.items():
        names = [name for name in sorted(weight.names) if name in directions]
        factor = factor_at(site, reading, delta, weight, size) if names else None
        for name in names:
            if factor is not None and weight.maker is None:
                found.append(Term(name, factor, None))
                continue
            with torch.no_grad():
                along = [tangent(weight, name, u) for u in directions[name]]
                if factor is None:
                    along = [_forward(site, position, weight, delta, u, reading, size) for u in along]
            found.append(Term(name, factor, torch.stack(along)))
    return found


def contract(term: Term, directions: Tensor) -> Tensor:
    """U (Q, *parameter) -> (Q, B) float64."""
    if term.factor is None:
        assert term.along is not None
        return term.along
    return term.factor.contract(directions if term.along is None else term.along)


def factor_at(site: Site, reading: Batchwise, delta: Tensor, weight: Weight, size: int) -> Factor | None:
    """The gradient of a weight at a site, None where the table has no rule for it."""
    function = FUNCTIONS.get(site.call.function)
    if function is None:
        return None
    bound = function.bind(*site.call.arguments)
    rule = next((function.rules.get(role) for role, v in bound.items() if v is weight.tensor), None)
    if rule is None:
        return None
    bound = tree_map_only(Tensor, Tensor.detach, bound)
    if is_low(delta.dtype):
        source = _source(weight, min(weight.names))
        bound, delta = _widened(bound, delta, function.rounds, wide(source.dtype))
    try:
        return rule(bound, delta, lambda t: reading.split(t, size))
    except NotImplementedError:
        return None


def _widened(bound: Bound, delta: Tensor, rounds: bool, dtype: torch.dtype) -> tuple[Bound, Tensor]:
    """What a call read and the gradient of what it returned, in the parameters' type, or in single precision: training
    rounds the sum of their products, once, and not the products. What autocast rounded for the call is rounded again
    first."""

    def widened(t: Tensor) -> Tensor:
        if not t.is_floating_point():
            return t
        return (t.to(delta.dtype) if rounds else t).to(dtype)

    return tree_map_only(Tensor, widened, bound), delta.to(dtype)


def factors_of(reached: Reached, name: str, size: int) -> list[Factor] | None:
    """The gradient of a parameter over its sites; None where a site has no closed form."""
    found: list[Factor] = []
    for site, reading, delta in reached:
        for weight in site.call.weights.values():
            if name in weight.names:
                factor = factor_at(site, reading, delta, weight, size)
                if factor is None or len(weight.names) > 1:
                    return None
                found.append(factor if weight.maker is None else _through_maker(weight, name, factor))
    return found


def sites_of(reached: Reached) -> dict[str, Reached]:
    """Parameter -> its sites."""
    found: dict[str, Reached] = {}
    for at in reached:
        for name in names_of(at[0]):
            found.setdefault(name, []).append(at)
    return found


def rows_of(found: Sequence[Factor]) -> Tensor | float:
    """(B, entries), 0.0 where there is no site."""
    return sum((factor.rows() for factor in found), 0.0)


def jvp_flow(site: Site, name: str, delta: Tensor, direction: Tensor, order: int = 1) -> float:
    """The norm of delta * dy/dU: of what the share of a parameter along a direction is the sum, before anything cancels."""
    flow = 0.0
    with torch.no_grad():
        for position, weight in site.call.weights.items():
            if name in weight.names:
                moved = jvp(site.call, {position: (weight.tensor, tangent(weight, name, direction))})
                each = delta.float() * moved.float() if is_low(delta.dtype) else delta * moved
                flow += float(torch.linalg.vector_norm(each, order))
    return flow


def _forward(
    site: Site, position: int, weight: Weight, delta: Tensor, direction: Tensor, reading: Batchwise, size: int
) -> Tensor:
    """<dl_i/dy, dy/dweight U> by forward-mode derivative, (B,) float64."""
    moved = jvp(site.call, {position: (weight.tensor, direction)})
    a, b = (reading.split(t.detach(), size).reshape(size, -1) for t in (delta, moved))
    a, b = (a.float(), b.float()) if is_low(a.dtype) else (a, b)
    return (a * b).sum(1, dtype=torch.float64)


def _through_maker(weight: Weight, name: str, factor: Factor) -> Dense:
    """The gradient of a weight -> of the parameter that it was made of, through a graph of its own: that of the user's pass
    may be gone."""
    rows = factor.rows()
    rows = rows.reshape(len(rows), *weight.tensor.shape)
    leaf = _source(weight, name).detach().requires_grad_()
    with torch.enable_grad():
        again = remade(weight, {name: leaf})
    pulled = torch.autograd.grad(again, leaf, grad_outputs=rows.to(again.dtype), is_grads_batched=True)
    return Dense(pulled[0].to(wide(leaf.dtype)))


def _source(weight: Weight, name: str) -> Tensor:
    while weight.maker is not None:
        weight = next(w for w in weight.maker.weights.values() if name in w.names)
    return weight.tensor
