"""The curvature of a penalty: what the loop adds to the reduced loss that is no example's.

The record has its gradient p; of the function, p = k grad f at the recorded parameters, k its weight and the clipping in p.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .constants import wide
from .errors import ReplayError
from .functional import Functional, training_modes
from .run import Run

Penalising = Callable[[nn.Module], Tensor]


class Penalised:
    """Products with the Hessian of a penalty.

    Args:
        penalty: model -> scalar, as given to `attrib.record`, but for a factor.
    """

    def __init__(self, run: Run, model: nn.Module, penalty: Penalising) -> None:
        self._run, self._model, self._made_of = run, model, (run, model, penalty)
        with training_modes(model, run.header["training"]):
            self._function = Functional(model, penalty, run.layout, wide(run.dtype))

    def __reduce__(self) -> tuple[type["Penalised"], tuple[Run, nn.Module, Penalising]]:
        return type(self), self._made_of

    def hvp(self, number: int, theta: Tensor, recorded: Tensor, directions: Tensor, bound: float) -> Tensor:
        """k H V (Q, P) float64, at the parameters (P,) of a step, where `recorded` (P,) is the gradient. directions: (Q, P).
        bound: how far that may be from what it is now, relative to its size.

        Raises:
            ReplayError: the penalty is another.
        """
        zero = torch.zeros_like(directions, dtype=torch.float64)
        device = next(self._model.parameters()).device
        with torch.enable_grad(), training_modes(self._model, self._run.header["training"]):
            leaf = theta.to(device, self._function.dtype, copy=True).requires_grad_()
            with self._function.holding(self._buffers(number, device)).bound(self._run.layout.unflatten(leaf)):
                value = self._function.run()
                pulled = (
                    torch.autograd.grad(value, leaf, create_graph=True, allow_unused=True)[0]
                    if value.requires_grad
                    else None
                )
                factor = self._factor(number, pulled, recorded, bound)
                if pulled is None or not pulled.requires_grad or not factor:
                    return zero
                for q, v in enumerate(directions.to(pulled)):
                    (product,) = torch.autograd.grad(pulled, leaf, v, retain_graph=True, allow_unused=True)
                    if product is not None:
                        zero[q] = factor * product.double().cpu()
        return zero

    def _buffers(self, number: int, device: torch.device) -> dict[str, Tensor]:
        return {name: t.to(device) for name, t in self._run.buffers(number).items()}

    def _factor(self, number: int, pulled: Tensor | None, recorded: Tensor, bound: float) -> float:
        """k."""
        want = recorded.double()
        now = torch.zeros_like(want) if pulled is None else pulled.detach().double().cpu()
        now = torch.where(want == 0, torch.zeros_like(now), now)  # what stood still had none
        square = float(now @ now)
        factor = float(now @ want) / square if square else 0.0
        gap, size = float((factor * now - want).norm()), float(want.norm())
        if gap > bound * size:
            raise ReplayError(
                f"the penalty is not the one that was recorded: got a gradient that is off by {gap / size:.3g} of it, "
                f"whatever its weight, expected at most {bound:.1g}, at step {number}. Pass penalty= as given to "
                f"attrib.record; of several, their sum."
            )
        return factor
