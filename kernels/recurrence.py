"""One optimizer step with its realised coefficients frozen: linear in the gradients.

    z_s     = keep z_{s-1} + feed g_s                       g_s = gradient_s + coupled theta_s     (decay in the gradient)
    Delta_s = -L(apply_old z_{s-1} + apply_new g_s) - decoupled theta_s                            (decay beside it)

keep, feed, apply_old and apply_new work entry by entry. L is the identity, or a map of one parameter tensor, `Matrix`.
What decay adds to the measurement at a step is coupled <U_s, theta_s> - decoupled <Gbar_s, theta_s>.

`apply` runs it forwards, `transpose` is the exact adjoint that carries sensitivities of the final measurement backwards
through time. Both return new tensors.

Source: the adjoint of a linear recurrence; theory as in the README, "Second identity".
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """A linear map of matrices X of a shape, which come as vectors (..., P), with a term of rank one beside it:

        L(X) = factor X + <along, X> rise           or, from the right, X factor + <along, X> rise

    factor (n, n); along, rise (P,).
    """

    factor: Tensor
    shape: tuple[int, int]
    from_right: bool
    along: Tensor
    rise: Tensor

    def apply(self, x: Tensor) -> Tensor:
        return self._map(x, self.factor, self.along, self.rise)

    def transpose(self, y: Tensor) -> Tensor:
        return self._map(y, self.factor.T, self.rise, self.along)

    def _map(self, x: Tensor, factor: Tensor, along: Tensor, rise: Tensor) -> Tensor:
        factor, along, rise = (t.to(x.dtype) for t in (factor, along, rise))
        several = x.unflatten(-1, self.shape)
        product = several @ factor if self.from_right else factor @ several
        return product.flatten(-2) + (x @ along).unsqueeze(-1) * rise

    def to(self, device: torch.device) -> "Matrix":
        return replace(self, **_moved(self, device))


@dataclass(frozen=True, kw_only=True)
class Coefficients:
    """The frozen step: scalars or vectors over parameters (P,), and the map L.

    keep, feed: of the momentum, what stays and what the gradient adds. apply_old, apply_new: what the update takes of the
    momentum before the step and of the gradient. matrix: L, None for the identity. coupled, decoupled: decay.
    """

    keep: float | Tensor
    feed: float | Tensor
    apply_old: float | Tensor
    apply_new: float | Tensor
    matrix: Matrix | None = None
    coupled: float | Tensor = 0.0
    decoupled: float = 0.0

    def apply(self, momentum: Tensor, gradient: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        """(z_{s-1}, gradient_s, theta_s), each (P,) -> (Delta_s, z_s), each (P,)."""
        g = self._with_decay(gradient, theta)
        taken = self.apply_old * momentum + self.apply_new * g
        update = -(taken if self.matrix is None else self.matrix.apply(taken))
        if self.decoupled:
            update = update - self.decoupled * theta
        return update, self.keep * momentum + self.feed * g

    def _with_decay(self, gradient: Tensor, theta: Tensor) -> Tensor:
        """In one operation, as torch has it: the coefficients were frozen on the very bits of g."""
        if isinstance(self.coupled, Tensor):
            return torch.addcmul(gradient, self.coupled, theta)
        return torch.add(gradient, theta, alpha=self.coupled) if self.coupled else gradient

    def transpose(self, momentum: Tensor, path_gradient: Tensor) -> tuple[Tensor, Tensor]:
        """(sensitivity to z_s, Gbar_s), each (Q, P) -> (sensitivity U_s to g_s, sensitivity to z_{s-1}).

        A contribution of a gradient share g_{s,i} is <U_s, g_{s,i}>.
        """
        taken = path_gradient if self.matrix is None else self.matrix.transpose(path_gradient)
        return self.feed * momentum - self.apply_new * taken, self.keep * momentum - self.apply_old * taken

    def to(self, device: torch.device) -> "Coefficients":
        return replace(self, **_moved(self, device))

    def doubled(self) -> "Coefficients":
        """In float64."""
        doubled: dict[str, Any] = {name: v.double() for name, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **doubled)


def _moved(record: Any, device: torch.device) -> dict[str, Any]:
    return {name: v.to(device) for name, v in vars(record).items() if isinstance(v, Tensor | Matrix)}


# of a parameter that the optimizer skipped: nothing moves
IDLE = Coefficients(keep=1.0, feed=0.0, apply_old=0.0, apply_new=0.0)
