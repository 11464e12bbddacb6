"""The change of a measurement over a step, written through the update: vectors Gbar with <Gbar, Delta> = m1 - m0.

Three ways behind one interface, `path.bind(query)(theta0, theta1) -> PathGradient`:

- `Secant(substeps=1)`: the discrete chain rule; exact on every network, two forwards and one backward
- `GaussLegendre(nodes=4)`, `Midpoint(nodes=100)`: quadrature of the path integral; exact in the limit, on smooth networks
"""

from .limit import Limit, limit_bound, limit_gap
from .measured import Measured, Path, PathGradient
from .quadrature import GaussLegendre, Midpoint
from .secant import Secant

__all__ = [
    "GaussLegendre",
    "Limit",
    "Measured",
    "Midpoint",
    "Path",
    "PathGradient",
    "Secant",
    "limit_bound",
    "limit_gap",
]
