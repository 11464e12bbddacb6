"""The common factor between the examples' gradients and p.grad: the loss's reduction, times clipping.

    p.grad = scale * sum_i d loss_i / d theta,     scale = reduction * clipping

The reduction ("mean": 1/B, "sum": 1) is fitted where the shares are computed; clipping, whatever changed all gradients by
one factor after backward, is read off the norms before and after.
"""

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..errors import BatchIdentityError

log = logging.getLogger("attrib")


class Reduction:
    """Watches backward passes through hooks; takes them off with `remove`.

    kind: "mean", "sum", "single" (batches of one so far), "other", or None before the first fit.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._parameters = list(parameters)
        self._raw: dict[int, Tensor] = {}
        self.kind: str | None = None
        self._hooks = [p.register_post_accumulate_grad_hook(self._note) for p in parameters if p.requires_grad]

    def _note(self, p: Tensor) -> None:
        if p.grad is not None and not p.grad.is_sparse:
            self._raw[id(p)] = torch.linalg.vector_norm(p.grad)

    def clear(self) -> None:
        self._raw.clear()

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def clipping(self) -> float:
        """The factor since the last backward: exactly 1 where nothing was changed.

        Raises:
            BatchIdentityError: the gradients were changed by different factors.
        """
        known = [p for p in self._parameters if id(p) in self._raw and p.grad is not None]
        if not known:
            return 1.0
        before = torch.stack([self._raw[id(p)] for p in known]).double()
        now = torch.stack([torch.linalg.vector_norm(p.grad) for p in known]).double()
        if torch.equal(before, now):
            return 1.0
        factor = float(now.norm() / before.norm())
        off = (now - factor * before).abs()
        worst = int(off.argmax())
        if not float(off[worst]) <= torch.finfo(known[0].dtype).eps ** 0.5 * float(now.norm()):
            raise BatchIdentityError(
                f"gradients were changed by different factors between backward and step: got {float(now[worst]):.4g} from "
                f"{float(before[worst]):.4g}, expected the common factor {factor:.4g}, at a parameter of shape "
                f"{tuple(known[worst].shape)}. Clip with clip_grad_norm_ over all parameters; the step was refused."
            )
        return factor

    def settled(self, size: int) -> bool:
        """Whether the scale of a batch of this size is known without computing its shares."""
        return self.kind in ("mean", "sum") or (self.kind == "single" and size == 1)

    def expected(self, size: int, clip: float) -> float:
        """The scale where the shares are not computed."""
        return clip / size if self.kind == "mean" else clip

    def fit(self, gradient: Tensor, total: Tensor, size: int, clip: float, within: Callable[[float], bool]) -> float:
        """The scale from p.grad and the unscaled sum of shares, (P,) each: the mean or the sum where the gap that
        leaves is `within` rounding, fitted otherwise."""
        scales = {"mean": clip / size, "sum": clip}
        for kind in ["mean", "sum"] if self.kind not in scales else [self.kind]:
            if within(float((gradient - scales[kind] * total).double().norm())):
                if self.kind in (None, "single"):
                    self.kind = "single" if size == 1 else kind
                return scales[kind]
        if self.kind != "other":
            log.info("the reduction of the loss is neither its mean nor its sum: shares are computed at every step")
        self.kind = "other"
        square = float(total.double().square().sum())
        return float((gradient.double() * total.double()).sum()) / square if square else clip
