"""Elementwise discrete gradients: slope(x0, x1) with slope * (x1 - x0) == f(x1) - f(x0).

For a scalar function the discrete gradient is unique, and equals the mean of f' over the segment. Written as the
difference quotient it cancels when the ends are close; every function here is a form that does not.
All take and return tensors of one broadcast shape and dtype, are symmetric in the two ends, tend to f'(x) as
the ends meet, and contain no data-dependent control flow, so that `torch.vmap` maps over them.

Source: the mean-value (Gonzalez 1996; McLachlan, Quispel, Robidoux 1999) discrete gradients, in one dimension.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

# Six Gauss-Legendre nodes integrate f' over a segment no longer than REACH to rounding: the error is about
# 2e-16 h^12 |f^(13)|, that is 5e-15 for |f^(13)| = 1e5 (gelu) at h = 0.5. Longer segments do not cancel.
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(6)
REACH = 0.5


def difference(x0: Tensor, x1: Tensor) -> Tensor:
    """x1 - x0, and 0 where both are the same infinity (masked attention scores)."""
    return torch.where(x0 == x1, torch.zeros_like(x0), x1 - x0)


def _length(x0: Tensor, x1: Tensor) -> Tensor:
    """|x1 - x0|, and a number next to nothing where they meet, so that it can be divided by."""
    return (x1 - x0).abs().masked_fill(x0 == x1, 0.0).clamp(min=torch.finfo(x0.dtype).tiny)


def _decay(h: Tensor) -> Tensor:
    """(1 - exp(-h)) / h for h > 0: what neither cancels nor overflows."""
    return -torch.expm1(-h) / h


def _ratio(f: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    """f(z) / z for an odd f with f'(0) = 1."""
    safe = torch.where(z == 0, torch.ones_like(z), z)
    return torch.where(z == 0, torch.ones_like(z), f(safe) / safe)


def smooth(f: Callable[[Tensor], Tensor], x0: Tensor, x1: Tensor, breaks: Sequence[float] = ()) -> Tensor:
    """Slope of any elementwise `f` that is smooth between its `breaks`.

    Short segments integrate f' by Gauss-Legendre; long ones, and those across a break, take the quotient.
    """
    h = x1 - x0
    nodes = torch.as_tensor((_NODES + 1) / 2, dtype=x0.dtype, device=x0.device)
    weights = torch.as_tensor(_WEIGHTS / 2, dtype=x0.dtype, device=x0.device)
    shape = (-1,) + (1,) * x0.dim()
    points = x0 + nodes.reshape(shape) * h
    _, pull = torch.func.vjp(f, points)  # type: ignore[misc]
    near = (weights.reshape(shape) * pull(torch.ones_like(points))[0]).sum(0)
    far = h.abs() > REACH
    for b in breaks:
        far = far | (((x0 > b) != (x1 > b)) & (h != 0))
    return torch.where(far, (f(x1) - f(x0)) / torch.where(far, h, torch.ones_like(h)), near)


def absolute(x0: Tensor, x1: Tensor) -> Tensor:
    size = x0.abs() + x1.abs()
    return torch.where(size == 0, torch.zeros_like(size), (x0 + x1) / torch.where(size == 0, 1.0, size))


def relu(x0: Tensor, x1: Tensor) -> Tensor:
    """relu(x) = (x + |x|) / 2; the derivative at 0 is 0, as in torch."""
    both_zero = (x0 == 0) & (x1 == 0)
    return torch.where(both_zero, torch.zeros_like(x0), 0.5 + 0.5 * absolute(x0, x1))


def leaky_relu(x0: Tensor, x1: Tensor, negative_slope: float = 0.01) -> Tensor:
    return negative_slope + (1 - negative_slope) * relu(x0, x1)


def step(y0: Tensor, y1: Tensor, d0: Tensor, d1: Tensor) -> Tensor:
    """Slope of a comparison: its jump over the change of the difference d that it compares with 0; 0 where it holds."""
    jump = y1.to(d0.dtype) - y0.to(d0.dtype)
    return torch.where(jump == 0, 0.0, jump / torch.where(jump == 0, 1.0, d1 - d0))


def clamp(x0: Tensor, x1: Tensor, low: float | None = None, high: float | None = None) -> Tensor:
    """clamp(x) = low + relu(x - low) - relu(x - high); outside derivative 0."""
    if low is not None and high is not None and low >= high:
        return torch.zeros_like(x0)
    rising = torch.ones_like(x0) if low is None else relu(x0 - low, x1 - low)
    return rising if high is None else rising - relu(x0 - high, x1 - high)


def exp(x0: Tensor, x1: Tensor) -> Tensor:
    """exp(upper) (1 - exp(-h)) / h, h the length."""
    return torch.maximum(x0, x1).exp() * _decay(_length(x0, x1))


def log(x0: Tensor, x1: Tensor) -> Tensor:
    """log(b) - log(a) = 2 atanh((b - a) / (b + a)), which does not cancel where a and b are close."""
    z = (x1 - x0) / (x1 + x0)
    far = z.abs() > 0.5
    near = _ratio(torch.atanh, torch.where(far, torch.zeros_like(z), z)) * 2 / (x0 + x1)
    return torch.where(far, (x1.log() - x0.log()) / torch.where(far, x1 - x0, torch.ones_like(z)), near)


def sqrt(x0: Tensor, x1: Tensor) -> Tensor:
    """Where both ends are 0, 0: the derivative that torch gives a norm there."""
    total = x0.sqrt() + x1.sqrt()
    return torch.where(total == 0, 0.0, 1 / torch.where(total == 0, 1.0, total))


def rsqrt(x0: Tensor, x1: Tensor) -> Tensor:
    r0, r1 = x0.rsqrt(), x1.rsqrt()
    return -r0 * r1 / (x0.sqrt() + x1.sqrt())


def reciprocal(x0: Tensor, x1: Tensor) -> Tensor:
    return -1 / (x0 * x1)


def sigmoid(x0: Tensor, x1: Tensor) -> Tensor:
    """s(upper) s(-lower) (1 - exp(-h)) / h with s the sigmoid, h the length: accurate far out in the tails too."""
    upper, lower = torch.maximum(x0, x1), torch.minimum(x0, x1)
    return upper.sigmoid() * (-lower).sigmoid() * _decay(_length(x0, x1))


def tanh(x0: Tensor, x1: Tensor) -> Tensor:
    """tanh(x) = 2 sigmoid(2x) - 1."""
    return 4 * sigmoid(2 * x0, 2 * x1)


def silu(x0: Tensor, x1: Tensor) -> Tensor:
    """x sigmoid(x): a product, so each factor's change times the mean of the other."""
    return (x0 + x1) / 2 * sigmoid(x0, x1) + (x0.sigmoid() + x1.sigmoid()) / 2


def normal(x0: Tensor, x1: Tensor, phi0: Tensor, phi1: Tensor) -> Tensor:
    """Of the normal distribution function, phi0 and phi1 at the ends: the mean of its density on the segment, which is,
    with m the middle, v = h^2 / 4 and Hermite polynomials,

        density(m) sum_k He_2k(m) v^k / (2k + 1)!        beyond k = 4 less than rounding where h <= 0.15
    """
    h, m = x1 - x0, (x0 + x1) / 2
    u, v = m * m, h * h / 4
    series = (((u - 28) * u + 210) * u - 420) * u + 105
    series = ((u - 15) * u + 45) * u - 15 + series * v / 72
    series = (u - 6) * u + 3 + series * v / 42
    series = 1 + (u - 1 + series * v / 20) * v / 6
    near = (u / -2).exp() * series / (2 * math.pi) ** 0.5
    far = h.abs() > 0.15
    return torch.where(far, (phi1 - phi0) / h.masked_fill(~far, 1.0), near)


def _phi(x: Tensor) -> Tensor:
    return (1 + torch.erf(x * 0.5**0.5)) / 2


def gelu(x0: Tensor, x1: Tensor, approximate: str = "none") -> Tensor:
    """x Phi(x), or x s(2 c (x + 0.044715 x^3)) with c = sqrt(2 / pi): a product, as `silu`."""
    if approximate == "none":
        phi0, phi1 = _phi(x0), _phi(x1)
        return (x0 + x1) / 2 * normal(x0, x1, phi0, phi1) + (phi0 + phi1) / 2
    c = 2 * (2 / math.pi) ** 0.5
    u0, u1 = (c * (x + 0.044715 * x * x * x) for x in (x0, x1))
    inner = c * (1 + 0.044715 * power(x0, x1, 3))
    return (x0 + x1) / 2 * sigmoid(u0, u1) * inner + (u0.sigmoid() + u1.sigmoid()) / 2


def power(x0: Tensor, x1: Tensor, exponent: float) -> Tensor:
    """Slope of x ** exponent: a polynomial for whole exponents, exp(exponent log x) otherwise (x > 0)."""
    n = int(exponent)
    if n != exponent:
        special = {0.5: sqrt, -0.5: rsqrt}.get(exponent)
        if special is not None:
            return special(x0, x1)
        inside = (x0 > 0) & (x1 > 0)
        a, b = (torch.where(inside, x, 1.0) for x in (x0, x1))
        h = difference(x0, x1)
        edge = (x1**exponent - x0**exponent) / torch.where(h == 0, 1.0, h)  # an end at 0: nothing cancels
        return torch.where(inside, exp(exponent * a.log(), exponent * b.log()) * exponent * log(a, b), edge)
    if n < 0:
        return reciprocal(x0**-n, x1**-n) * power(x0, x1, -n)
    total, raised = torch.zeros_like(x0), torch.ones_like(x0)
    for _ in range(n):  # x0^(n - 1) + x0^(n - 2) x1 + ...
        total, raised = total * x1 + raised, raised * x0
    return total
