"""Gradients: what either definition of a share answers, and what both do alike.

total     sum_i g_i                   (P,)
gradient  sum_i v_i g_i               (P,)
contract  <U_q, g_{i,k}>              (Q, B, K)    K parameter tensors
rows      g_i                         (B, P)       materialised
factors   g_i                                      in the form the layers give it
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..autocast import Autocast
from ..batch import Batch
from ..functional import Functional
from ..kernels.factors import Factor
from ..layout import Layout
from ..program import Programs
from .assignment import Trace
from .terms import rows_of


class Gradients(ABC):
    """Shares of `loss(model, *batch)`.

    Args:
        loss: called with the model and a batch.
        model: used as it is; parameters are given with each call.
        layout: the parameters that are trained.
        dtype: compute type; where it is less than single precision, vectors and what is had of them are in float32.
        slices: bytes of what the calls of a forward pass return for the examples of a slice; None chooses.
        autocast: what the loss is computed under.

    Attributes:
        vector: the truth about the shares.
    """

    vector: Any

    def __init__(
        self,
        loss: Callable[..., Tensor],
        model: nn.Module,
        layout: Layout,
        dtype: torch.dtype,
        slices: int | None = None,
        autocast: Autocast | None = None,
    ) -> None:
        self.layout = layout
        self._loss = Functional(model, loss, layout, dtype, autocast)
        self._programs, self._factor = Programs(), 1.0
        self._begin(slices)

    @abstractmethod
    def _begin(self, slices: int | None) -> None:
        """Set `vector`, of the loss and the layout, and what else is the definition's own."""

    def at(self, active: frozenset[str], factor: float = 1.0, buffers: Mapping[str, Tensor] | None = None) -> Self:
        """The same at a step where these parameters have a gradient and the model holds these buffers, of `factor` times the
        loss; what is learnt of it is shared."""
        other = copy(self)
        other._loss, other._factor = self._loss.times(factor).holding(buffers or {}), factor
        other.vector = self.vector.at(active, other._loss)
        return other

    @property
    def function(self) -> Functional:
        """The loss bound to the model."""
        return self._loss

    @property
    def coarse(self) -> bool:
        """Whether a pass rounds to less than single precision on its way, as a frozen part in bfloat16 does. Then a multiple
        of the loss has other gradients than the same multiple of its gradients: to be those of the training loop they have
        to be of its multiple, such as 1 / B for a mean."""
        return self._loss.coarse

    @property
    def precision(self) -> torch.dtype:
        """What a pass rounds to on its way."""
        return self._loss.precision

    @property
    def active(self) -> frozenset[str]:
        """Names of the parameters that have a gradient at the step, all at first; the others' shares are zero."""
        active: frozenset[str] = self.vector.active
        return active

    @property
    @abstractmethod
    def coupled(self) -> bool:
        """Whether a batch was met whose losses depend on each other."""

    def total(self, theta: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """(P,), batch -> losses (B,), sum of all shares (P,)."""
        batch = Batch.of(batch)
        return self.gradient(theta, batch, torch.ones(batch.size, dtype=theta.dtype, device=theta.device))

    @abstractmethod
    def gradient(self, theta: Tensor, batch: Batch, weights: Tensor) -> tuple[Tensor, Tensor]:
        """(P,), batch, v (B,) -> losses (B,), the sum of the shares times v (P,): by no closed form."""

    @abstractmethod
    def contract(
        self, theta: Tensor, batch: Batch, directions: Tensor, groups: Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """(P,), batch, U (Q, P) -> losses (B,), <U_q, g_i> per parameter tensor, (Q, B, K) float64.

        groups: of each tensor the number of its group. What goes by the derivative along U is had per group, and stands at
        the first of its tensors; None tells all tensors apart.
        """

    def steps_at_once(self, theta: Tensor, batch: Batch, queries: int, most: int) -> int:
        """How many of `most` steps like this one are best contracted together; 1 where that cannot be."""
        return 1

    def contract_steps(
        self, theta: Tensor, batches: Sequence[Batch], directions: Tensor
    ) -> tuple[Tensor, Tensor] | None:
        """`contract` of n steps at once: (n, P), their batches, of one shape, or one for all, U (n, Q, P) -> losses (n, B)
        and products (n, Q, B, K). None where they have to be gone through one by one."""
        return None

    def rows(self, theta: Tensor, batch: Batch) -> Tensor:
        """(P,), batch -> the share of each example, (B, P)."""
        batch = Batch.of(batch)
        found = self.factors(theta, batch)
        out = theta.new_zeros(batch.size, self.layout.size)
        for name, part in self.layout.slices():
            out[:, part] = rows_of(found[name])
        return out

    @abstractmethod
    def factors(self, theta: Tensor, batch: Batch) -> dict[str, list[Factor]]:
        """(P,), batch -> of each parameter the factors that sum to its shares; written out where there are none."""

    @abstractmethod
    def watched(
        self, theta: Tensor, batch: Batch, trace: Trace, deltas: list[Tensor | None]
    ) -> dict[str, list[Factor]] | None:
        """`factors` from a pass that was made already: its sites and the gradients of their outputs, whatever reduction
        they have in them. None where they do not say it all."""

    @abstractmethod
    def rows_at_once(self) -> int:
        """How many rows fit the budget."""
