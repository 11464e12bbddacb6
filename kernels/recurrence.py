"""One optimizer step with its realised coefficients frozen: linear in the gradients.

    z_s     = A z_{s-1} + B g_s             g_s = gradient_s + L theta_s       (L: decay coupled into the gradient)
    Delta_s = -(E z_{s-1} + F g_s) - W theta_s                                 (W: decoupled decay)

What decay adds to the measurement at a step is <U_s, L theta_s> - <Gbar_s, W theta_s>.

A, B, E, F, L, W are scalars or vectors over parameters (P,). `update` runs it forwards, `pullback` is the exact
transpose that carries sensitivities of the final measurement backwards through time.

Source: the adjoint of a linear recurrence; theory as in the README, "Second identity".
"""

from typing import NamedTuple

from torch import Tensor


class Coefficients(NamedTuple):
    """The frozen step. `A` keeps and `B` feeds the momentum, `E` and `F` apply it, `L` and `W` decay."""

    A: float | Tensor
    B: float | Tensor
    E: float | Tensor
    F: float | Tensor
    L: float
    W: float


IDLE = Coefficients(1.0, 0.0, 0.0, 0.0, 0.0, 0.0)  # a parameter the optimizer skipped: nothing moves


def update(k: Coefficients, momentum: Tensor, gradient: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
    """(z_{s-1}, gradient_s, theta_s), each (P,) -> (Delta_s, z_s), each (P,)."""
    g = gradient + k.L * theta if k.L else gradient
    delta = -(k.E * momentum + k.F * g)
    if k.W:
        delta = delta - k.W * theta
    return delta, k.A * momentum + k.B * g


def pullback(k: Coefficients, carry: Tensor, path_gradient: Tensor) -> tuple[Tensor, Tensor]:
    """(sensitivity to z_s, Gbar_s), each (Q, P) -> (sensitivity U_s to g_s, sensitivity to z_{s-1}).

    A contribution of a gradient share g_{s,i} is <U_s, g_{s,i}>.
    """
    sensitivity = k.B * carry - k.F * path_gradient
    return sensitivity, k.A * carry - k.E * path_gradient
