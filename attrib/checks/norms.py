"""The norms of the gradients as a backward pass leaves them, before the loop changes them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import BatchIdentityError


class NormWatch:
    """Hooks on the parameters that note the norms of the gradients as a backward pass leaves them.

    accounts: whether what is no common factor is no error. Two norms are noted then: that of a single tensor changes by
    some factor whatever is done to it, two change by the same one if all entries do.
    """

    def __init__(self, parameters: Sequence[Tensor], accounts: bool = False) -> None:
        self._parameters, self._accounts = list(parameters), accounts
        self._raw: dict[int, Tensor] = {}  # (2,) or (1,) each
        self._came: list[Tensor] = []  # of the backward pass that runs
        self.gradients = 0  # that came, ever
        self._hooks = [p.register_post_accumulate_grad_hook(self._note) for p in parameters if p.requires_grad]

    def _note(self, p: Tensor) -> None:
        if p.grad is not None and not p.grad.is_sparse:
            self._raw[id(p)] = self._norms(p.grad)
            self.gradients += 1

    def _norms(self, gradient: Tensor) -> Tensor:
        if not self._accounts:
            return torch.linalg.vector_norm(gradient, 2).view(1)
        return torch.stack([torch.linalg.vector_norm(gradient, n) for n in (2, 1)])

    def left(self) -> Tensor:
        """(K,) float64: the norms as the last backward pass left them; of a gradient that none of it made, as it is."""
        now = {id(p): self._norms(p.grad) for p in self._parameters if p.grad is not None and id(p) not in self._raw}
        norms = {**now, **self._raw}
        known = [float(norms[id(p)][0]) if id(p) in norms else 0.0 for p in self._parameters]
        return torch.tensor(known, dtype=torch.float64)

    @property
    def heard(self) -> bool:
        """Whether there was a backward pass since `clear`."""
        return bool(self._raw)

    @property
    def finite(self) -> bool:
        """Whether what the last backward pass left is."""
        return not self._raw or bool(torch.isfinite(torch.stack([norms[0] for norms in self._raw.values()])).all())

    def change(self) -> float:
        """What became of the norm of all gradients since the last backward pass."""
        known = [p for p in self._parameters if id(p) in self._raw and p.grad is not None]
        before = [self._raw[id(p)][0].double() for p in known]
        now = [self._norms(p.grad)[0].double() for p in known if p.grad is not None]
        return float(torch.stack(now).norm() / torch.stack(before).norm()) if known else 1.0

    def clear(self) -> None:
        self._raw.clear()
        self._came.clear()  # of a pass that failed

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def clipping(self) -> float:
        """The factor since the last backward: exactly 1 where nothing was changed, or where it is accounted for and no
        common factor.

        Raises:
            BatchIdentityError: the gradients were changed by different factors.
        """
        known = [p for p in self._parameters if id(p) in self._raw and p.grad is not None]
        if not known:
            return 1.0
        before = torch.stack([self._raw[id(p)] for p in known])
        now = torch.stack([self._norms(p.grad) for p in known if p.grad is not None])
        if torch.equal(before, now):
            return 1.0
        before, now = before.double(), now.double()
        factor = float(now[:, 0].norm() / before[:, 0].norm())
        off = (now - factor * before).abs()
        if bool((off <= torch.finfo(known[0].dtype).eps ** 0.5 * now.norm(dim=0)).all()):
            return factor
        if self._accounts:
            return 1.0
        worst = int(off[:, 0].argmax())
        raise BatchIdentityError(
            f"gradients were changed by different factors between backward and step: got {float(now[worst, 0]):.4g} from "
            f"{float(before[worst, 0]):.4g}, expected the common factor {factor:.4g}, at a parameter of shape "
            f"{tuple(known[worst].shape)}. Clip with clip_grad_norm_ over all parameters, or record with "
            f'remainder="account", which makes what was changed a row of the ledger. The step was refused.'
        )


class ReducedNormWatch(NormWatch):
    """Of gradients that DistributedDataParallel reduces: its norms are those behind that, at the end of a backward pass."""

    def _note(self, p: Tensor) -> None:
        if not self._came:
            torch.autograd.Variable._execution_engine.queue_callback(self._behind)
        super()._note(p)
        self._came.append(p)

    def _behind(self) -> None:
        """Of callbacks that are queued the last one runs last, and the reduction's was queued during the pass."""
        torch.autograd.Variable._execution_engine.queue_callback(self._reduced)

    def _reduced(self) -> None:
        for p in self._came:
            if p.grad is not None:
                self._raw[id(p)] = self._norms(p.grad)
        self._came.clear()
