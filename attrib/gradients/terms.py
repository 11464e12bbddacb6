"""The share of a parameter at its sites: contracted with directions, or as rows.

contract_site   <dl_i/dy, dy/dparameter U_q>      (Q, B)
rows_at         dl_i/dparameter                   (B, *parameter)
"""

from contextlib import suppress

import torch
from torch import Tensor

from ..kernels.contraction import row_dots
from .batchwise import Batchwise
from .functions import FUNCTIONS, Bound, Role
from .sites import Site, Weight, jvp, tangent

ROWS_BYTES = 4 << 20  # gradient rows held at once, to stay in the cache


def names_of(site: Site) -> frozenset[str]:
    return frozenset().union(*(w.names for w in site.call.weights.values()))


def _roles(site: Site, name: str) -> list[tuple[int, Weight, Bound, Role | None]]:
    """The weights of a site that the parameter has a part in, with the closed form where there is one."""
    function = FUNCTIONS.get(site.call.function)
    bound = function.bind(*site.call.arguments) if function else {}
    found = []
    for i, weight in site.call.weights.items():
        if name in weight.names:
            role = next((r for r, v in bound.items() if v is weight.tensor), None)
            known = function.roles.get(role) if function and role else None
            found.append((i, weight, bound, known))
    return found


def contract_site(site: Site, reading: Batchwise, delta: Tensor, name: str, directions: Tensor, size: int) -> Tensor:
    """(Q, *parameter) -> (Q, B) float64: <dl_i/dy, dy/dparameter U_q> at one site."""
    total: Tensor | float = 0.0
    for i, weight, bound, role in _roles(site, name):
        if role is not None and weight.maker is None and _by_rows(role, weight, delta, len(directions), size):
            with suppress(NotImplementedError):  # of this shape the function has no rows
                total = total + _contract_rows(role, bound, reading, delta, directions, size)
                continue
        out = []
        for direction in directions:
            with torch.no_grad():
                along = tangent(weight, name, direction)
                if role is not None:
                    pair = role.pair(bound, delta, along)
                else:
                    pair = delta, jvp(site.call, {i: (weight.tensor, along)})
            out.append(_row_dots(*(reading.split(t, size) for t in pair)))
        total = total + torch.stack(out)
    assert isinstance(total, Tensor)
    return total


def rows_are_cheaper(queries: int, positions: int) -> bool:
    """Multiplications per example and weight entry: a product for every query and position, or rows made once
    (one for every position) and then contracted (one for every query)."""
    return queries * positions > queries + positions


def _by_rows(role: Role, weight: Weight, delta: Tensor, queries: int, size: int) -> bool:
    if role.outputs is None:
        return role.small
    return weight.tensor.dim() > role.outputs and rows_are_cheaper(
        queries, delta.numel() // (size * weight.tensor.shape[role.outputs])
    )


def _contract_rows(
    role: Role, bound: Bound, reading: Batchwise, delta: Tensor, directions: Tensor, size: int
) -> Tensor:
    """(Q, *parameter) -> (Q, B) float64, through gradient rows of as many examples at once as fit the budget."""
    flat = directions.flatten(1)
    at_once = size if role.small else max(1, ROWS_BYTES // (flat.element_size() * max(1, flat.shape[1])))
    out = []
    for lo in range(0, size, at_once):

        def part(t: Tensor, few: slice = slice(lo, lo + at_once)) -> Tensor:
            return reading.split(t, size)[few]

        rows = role.rows(bound, delta, part).detach().flatten(1)
        out.append(flat.double() @ rows.double().T if role.small else (flat @ rows.T).double())
    return torch.cat(out, 1)


def _row_dots(first: Tensor, second: Tensor) -> Tensor:
    """(B, ...), (B, ...) -> (B,) float64."""
    a, b = first.detach().reshape(len(first), -1), second.detach().reshape(len(second), -1)
    if a.device.type == "cpu":
        return torch.from_numpy(row_dots(a.numpy(), b.numpy()))
    return (a * b).sum(1, dtype=torch.float64)


def rows_at(sites: list[tuple[Site, Batchwise, Tensor]], name: str, size: int) -> Tensor | float | None:
    """(B, *parameter) summed over the parameter's sites, 0.0 where it has none; None where a site has no closed form."""
    total: Tensor | float = 0.0
    for site, reading, delta in sites:
        rows = _rows_site(site, reading, delta, name, size)
        if rows is None:
            return None
        total = total + rows
    return total


def _rows_site(site: Site, reading: Batchwise, delta: Tensor, name: str, size: int) -> Tensor | None:
    """(B, *parameter) of one site, None where no closed form gives it."""
    total = None
    for _, weight, bound, role in _roles(site, name):
        if role is None or len(weight.names) > 1:
            return None
        try:
            rows = role.rows(bound, delta, lambda t: reading.split(t, size)).detach()
        except NotImplementedError:
            return None
        rows = rows if weight.maker is None else _through_maker(weight, name, rows)
        total = rows if total is None else total + rows
    return total


def _through_maker(weight: Weight, name: str, rows: Tensor) -> Tensor:
    """Rows of a weight (B, *weight) -> rows of the parameter that it was made of (B, *parameter)."""
    source = _source(weight, name)
    return torch.autograd.grad(weight.tensor, source, grad_outputs=rows, is_grads_batched=True, retain_graph=True)[0]


def _source(weight: Weight, name: str) -> Tensor:
    while weight.maker is not None:
        weight = next(w for w in weight.maker.weights.values() if name in w.names)
    return weight.tensor
