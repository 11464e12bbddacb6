"""One optimizer step with its realised coefficients frozen: linear in the gradients.

    z_s     = keep z_{s-1} + feed g_s                       g_s = gradient_s + coupled theta_s     (decay in the gradient)
    Delta_s = -(apply_old z_{s-1} + apply_new g_s) - decoupled theta_s                             (decay beside it)

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
class Coefficients:
    """The frozen step, entry by entry: scalars or vectors over parameters (P,).

    keep, feed: of the momentum, what stays and what the gradient adds. apply_old, apply_new: what the update takes of the
    momentum before the step and of the gradient. coupled, decoupled: decay.
    """

    keep: float | Tensor
    feed: float | Tensor
    apply_old: float | Tensor
    apply_new: float | Tensor
    coupled: float = 0.0
    decoupled: float = 0.0

    def apply(self, momentum: Tensor, gradient: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        """(z_{s-1}, gradient_s, theta_s), each (P,) -> (Delta_s, z_s), each (P,)."""
        g = gradient + self.coupled * theta if self.coupled else gradient
        update = -(self.apply_old * momentum + self.apply_new * g)
        if self.decoupled:
            update = update - self.decoupled * theta
        return update, self.keep * momentum + self.feed * g

    def transpose(self, momentum: Tensor, path_gradient: Tensor) -> tuple[Tensor, Tensor]:
        """(sensitivity to z_s, Gbar_s), each (Q, P) -> (sensitivity U_s to g_s, sensitivity to z_{s-1}).

        A contribution of a gradient share g_{s,i} is <U_s, g_{s,i}>.
        """
        sensitivity = self.feed * momentum - self.apply_new * path_gradient
        return sensitivity, self.keep * momentum - self.apply_old * path_gradient

    def to(self, device: torch.device) -> "Coefficients":
        moved: dict[str, Any] = {name: v.to(device) for name, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **moved)


# of a parameter that the optimizer skipped: nothing moves
IDLE = Coefficients(keep=1.0, feed=0.0, apply_old=0.0, apply_new=0.0)
