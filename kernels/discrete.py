"""Discrete gradients of functions that mix elements: softmax, maxima, and the Gonzalez form for all others.

Each function takes the cotangent c of y, the input at both ends and returns the cotangent of the input, with
<c, y1 - y0> == <result, x1 - x0> exactly, equal to the vector-Jacobian product as the ends meet, symmetric in the ends.

Sources: Gonzalez, "Time integration and discrete Hamiltonian systems" (1996), eq. 4; the softmax and maximum
rules are derived in the README ("How it works").
"""

import torch
from torch import Tensor

from . import slopes


def logsumexp_weights(x0: Tensor, x1: Tensor, dim: int) -> Tensor:
    """Weights w with logsumexp(x1) - logsumexp(x0) == sum_i w_i (x1_i - x0_i), along `dim`.

    w_i = L(u_i0, u_i1) / L(S_0, S_1) with L the logarithmic mean, u = exp(x - shift) and S their sum, one
    shift for both ends. The logarithmic mean of e^a and e^b is the slope of exp between a and b.
    """
    return _weights(x0, x1, *(x.logsumexp(dim, keepdim=True) for x in (x0, x1)))


def _weights(x0: Tensor, x1: Tensor, sum0: Tensor, sum1: Tensor) -> Tensor:
    shift = torch.maximum(sum0, sum1)
    return slopes.exp(x0 - shift, x1 - shift) / slopes.exp(sum0 - shift, sum1 - shift)


def logsumexp(c: Tensor, x0: Tensor, x1: Tensor, dim: int) -> Tensor:
    """c has the shape of x with `dim` kept as one."""
    return c * logsumexp_weights(x0, x1, dim)


def log_softmax(c: Tensor, x0: Tensor, x1: Tensor, dim: int) -> Tensor:
    return c - c.sum(dim, keepdim=True) * logsumexp_weights(x0, x1, dim)


def softmax(c: Tensor, x0: Tensor, x1: Tensor, dim: int) -> Tensor:
    """softmax = exp o log_softmax. Rows that are masked altogether (all -inf) get zeros."""
    sum0, sum1 = (x.logsumexp(dim, keepdim=True) for x in (x0, x1))
    c = c * slopes.exp(x0 - sum0, x1 - sum1)
    inward = c - c.sum(dim, keepdim=True) * _weights(x0, x1, sum0, sum1)
    return torch.where(torch.isfinite(inward), inward, 0.0)


def winner_share(y0: Tensor, y1: Tensor, rival0: Tensor, rival1: Tensor) -> Tensor:
    """The share of the first end's winner in a maximum: p / (p + r), half where the winner stays.

    y0 and y1 are the maxima; rival0 is the value at the first end of the element that wins at the second, and
    rival1 the value at the second end of the one that won at the first: p = y0 - rival0, r = y1 - rival1.
    On the straight segment between the ends it is where the winner changes.
    """
    p, r = y0 - rival0, y1 - rival1
    total = p + r
    return torch.where(total > 0, p / torch.where(total > 0, total, 1.0), 0.5)


def maximum_along(c: Tensor, x0: Tensor, x1: Tensor, j0: Tensor, j1: Tensor, dim: int) -> Tensor:
    """Maximum along `dim`; j0 and j1 hold the winners' indices at the two ends, with `dim` kept, as has c."""
    a = winner_share(x0.gather(dim, j0), x1.gather(dim, j1), x0.gather(dim, j1), x1.gather(dim, j0))
    zero = torch.zeros_like(x0) * c.sum()  # batched as c is, where a caller maps over cotangents
    return zero.scatter_add(dim, j0, c * a).scatter_add(dim, j1, c * (1 - a))


def gonzalez(c_dot_dy: Tensor, cotangents: list[Tensor], differences: list[Tensor]) -> list[Tensor]:
    """Correct midpoint cotangents along the change of the inputs so that the sum is exact.

    c_i + ((<c, dy> - sum_j <c_j, dx_j>) / |dx|^2) dx_i. Exact unless no input changed.
    """
    inner = torch.stack([(c * d).sum() for c, d in zip(cotangents, differences, strict=True)]).sum()
    square = torch.stack([(d * d).sum() for d in differences]).sum()
    factor = torch.where(square > 0, (c_dot_dy - inner) / torch.where(square > 0, square, 1.0), 0.0)
    return [c + factor * d for c, d in zip(cotangents, differences, strict=True)]
