"""Clipping by norm: G = c R, c = min(1, C / (|R| + 1e-6)), as torch.nn.utils.clip_grad_norm_ has it.

Of two ends, exactly, and with the derivative where they meet:

    c' R' - c R = cbar (R' - R) + Rbar (c' - c)
    c' - c = slope (|R'| - |R|)
    |R'| - |R| = <R + R', R' - R> / (|R| + |R'|)
"""

from torch import Tensor

EPS = 1e-6


def pulled_back(sensitivity: Tensor, ends: tuple[Tensor, Tensor], factors: tuple[float, float]) -> Tensor:
    """V (Q, P), to G -> to R. ends: R (P,) of either; factors: c of either."""
    norms = [float(r.norm()) for r in ends]
    slope = _slope(norms, factors)
    found = sensitivity * (sum(factors) / 2)
    if slope == 0.0:
        return found
    total = ends[0] + ends[1]
    return found + slope / (2 * sum(norms)) * (sensitivity @ total)[:, None] * total


def pushed_forward(tangent: Tensor, r: Tensor, factor: float) -> Tensor:
    """The change of G (P,), of that of R."""
    norm = float(r.norm())
    if factor >= 1 or norm == 0:
        return factor * tangent
    return factor * tangent - factor / (norm + EPS) * float(r @ tangent) / norm * r


def _slope(norms: list[float], factors: tuple[float, float]) -> float:
    """Of c by the norm."""
    moved = norms[1] - norms[0]
    if moved:
        return (factors[1] - factors[0]) / moved
    return -factors[0] / (norms[0] + EPS) if factors[0] < 1 and norms[0] else 0.0
