"""The limit of a path: as the ends of a step meet, its vector must become the gradient of the measurement.

    |Gbar(theta, theta + e) - grad m(theta + e / 2)| = O(e^2)

Completeness does not see a rule that gives a cotangent to the wrong input, or none; this does. The gradient is torch's, by
one backward pass for a random combination of the queries, each scaled to its own size.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .measured import Measured, PathGradient

TRIES = 3  # ever shorter displacements: a kink that one crosses is not there in the next


class Limit(NamedTuple):
    """The largest gap of a parameter tensor, relative to the gradient's size; where it is too large, the query and the
    tensor that are furthest off."""

    gap: float
    query: int | None = None
    tensor: str | None = None


def limit_bound(dtype: torch.dtype) -> float:
    """On the gap: the displacement is eps^(1/3) of the parameters, which leaves its square, times how the network bends,
    and the rounding of differences over it, eps^(2/3) each. A rule that is wrong is wrong by order one."""
    return float(torch.finfo(dtype).eps ** 0.25)


def limit_gap(measured: Measured, integrate: Callable[[Tensor, Tensor], PathGradient], theta: Tensor) -> Limit:
    """theta (n + 1, P): states of the run, n steps for `integrate` to run side by side as the sweep does."""
    start = theta[:-1].to(measured.dtype)
    for numerically in (False, True):  # torch's gradient need not be the derivative: that is asked where none fits
        found = Limit(float("inf"))
        for attempt in range(TRIES):
            end = start + _displacement(start, theta.to(measured.dtype)) / 16**attempt
            vectors, middles = integrate(start, end).gradient.to(measured.dtype), (start + end) / 2
            steps = [_compared(measured, v, m, numerically) for v, m in zip(vectors, middles, strict=True)]
            found = min(found, max(steps, key=lambda s: s.gap), key=lambda s: s.gap)
            if found.gap <= limit_bound(measured.dtype):
                return Limit(found.gap)
    return found


def _displacement(start: Tensor, theta: Tensor) -> Tensor:
    """(n, P): along each update, of eps^(1/3) of the parameters' norm; along the parameters where there was none."""
    update = theta[1:] - start
    along = torch.where(update.norm(dim=1, keepdim=True) > 0, update, start)
    norm = along.norm(dim=1, keepdim=True)
    size = torch.finfo(start.dtype).eps ** (1 / 3) * start.norm(dim=1, keepdim=True)
    return along * size / torch.where(norm > 0, norm, 1.0)


def _compared(measured: Measured, vectors: Tensor, middle: Tensor, numerically: bool) -> Limit:
    """The gap at one step, (Q, P) against the gradient at the middle of the displacement. numerically: where torch's is
    off, against differences of the measurement too, many passes for each tensor; and who is off the furthest."""
    sizes = vectors.norm(dim=1)
    weights = torch.where(sizes > 0, 1 / torch.where(sizes > 0, sizes, 1.0), 1.0)
    generator = torch.Generator().manual_seed(0)
    weights = weights * torch.randn(measured.count, generator=generator, dtype=torch.float64).to(weights)
    mine = weights @ vectors
    gaps = _gaps(measured, mine, measured.gradient(middle, weights))
    off = [name for name, gap in gaps.items() if gap > limit_bound(measured.dtype)]
    if off and numerically:  # a part may be detached, or have a backward pass of its own
        gaps |= {name: min(gaps[name], _numerical_gap(measured, mine, middle, weights, name)) for name in off}
    name, gap = max(gaps.items(), key=lambda item: item[1])
    if gap <= limit_bound(measured.dtype) or not numerically:
        return Limit(gap)
    eye = torch.eye(measured.count, dtype=measured.dtype, device=middle.device)
    single = [_gaps(measured, vectors[q], measured.gradient(middle, eye[q]))[name] for q in range(measured.count)]
    return Limit(gap, max(range(measured.count), key=single.__getitem__), name)


def _numerical_gap(measured: Measured, mine: Tensor, middle: Tensor, weights: Tensor, name: str) -> float:
    """Against central differences of the measurement along two directions of one tensor."""
    part = dict(measured.layout.slices())[name]
    step = torch.finfo(measured.dtype).eps ** (1 / 3) * max(float(middle.norm()), 1e-3)
    gaps = []
    for seed in (1, 2):
        along = torch.zeros_like(middle)
        generator = torch.Generator().manual_seed(seed)
        along[part] = torch.randn(part.stop - part.start, generator=generator, dtype=torch.float64).to(middle)
        along /= along.norm()
        ends = [float((measured.values(middle + sign * step * along).double() * weights).sum()) for sign in (1, -1)]
        slope, size = (ends[0] - ends[1]) / (2 * step), float(mine[part].norm())
        gaps.append(
            abs(slope - float((mine * along).sum())) / max(abs(slope), size * (part.stop - part.start) ** -0.5, 1e-30)
        )
    return max(gaps)


def _gaps(measured: Measured, mine: Tensor, gradient: Tensor) -> dict[str, float]:
    """By tensor, relative to its gradient, counted as no smaller than 100 sqrt(eps) of all."""
    floor = 100 * torch.finfo(measured.dtype).eps ** 0.5 * float(gradient.norm())
    out = {}
    for name, part in measured.layout.slices():
        size = max(float(gradient[part].norm()), floor)
        gap = float((mine[part] - gradient[part]).norm())
        out[name] = gap / size if size else gap
    return out
