"""The common factor between the examples' gradients and p.grad: the loss's reduction, times clipping.

    p.grad = scale * sum_i d loss_i / d theta,     scale = reduction * clipping

The reduction ("mean": 1/B, "sum": 1, or any other factor) is fitted where the shares are computed; clipping, whatever
changed all gradients by one factor after backward, is read off the norms before and after.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import BatchIdentityError
from .identities import ShareBound

log = logging.getLogger("attrib")


class NormWatch:
    """Hooks on the parameters that note the norms of the gradients as a backward pass leaves them."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._parameters = list(parameters)
        self._raw: dict[int, Tensor] = {}
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


@dataclass(frozen=True)
class Reduction:
    """How the loop reduces the losses, as far as it is known.

    kind: "mean", "sum", "single" (batches of one so far), "other", or None before the first fit.
    """

    kind: str | None = None

    def expected(self, size: int, clip: float) -> float:
        """The scale where the shares are not computed; NaN where it is not known, to be fitted when they are."""
        if size == 1 and self.kind in ("mean", "sum", "single"):
            return clip
        return {"mean": clip / size, "sum": clip}.get(self.kind or "", float("nan"))

    def fit(
        self, gradient: Tensor, total: Tensor, size: int, clip: float, bound: ShareBound
    ) -> tuple[float, "Reduction"]:
        """The scale from p.grad and the unscaled sum of shares, (P,) each, and what is known then: the mean or the sum where
        the gap that leaves is within rounding, fitted otherwise. What rounding is of, where gradients cancel, is asked for
        only where neither of them nor the fit is within the cheap bound.
        """
        scales = {"mean": clip / size, "sum": clip}
        fitted = fit_scale(gradient, total)
        for within in (bound.cheap, bound.gross):
            fitting = [kind for kind, scale in scales.items() if within(_gap(gradient, total, scale))]
            if fitting:
                kind, known = self._settle(fitting, size)
                return scales[kind], known
            if fitted is not None and within(_gap(gradient, total, fitted)):
                break
        if self.kind != "other":
            log.info("the reduction of the loss is neither its mean nor its sum: its scale is fitted when attributing")
        return clip if fitted is None else fitted, Reduction("other")

    def _settle(self, fitting: list[str], size: int) -> tuple[str, "Reduction"]:
        """One of the kinds that fit, and what is thought of the run from then on. Where both do (a batch of one, gradients
        of zero) nothing is learnt."""
        if len(fitting) == 1:
            steady = self.kind in (None, "single", fitting[0])
            return fitting[0], Reduction(fitting[0] if steady else "other")
        known = Reduction("single") if size == 1 and self.kind is None else self
        return known.kind if known.kind in fitting else fitting[0], known


def _gap(gradient: Tensor, total: Tensor, scale: float) -> float:
    return float((gradient - scale * total).double().norm())


def fit_scale(gradient: Tensor, total: Tensor) -> float | None:
    """The factor that takes `total` nearest to `gradient`, of one shape each; None where total is zero."""
    square = float(total.double().square().sum())
    return float((gradient.double() * total.double()).sum()) / square if square else None
