"""The common factor between the examples' gradients and p.grad: the loss's reduction, times clipping.

    p.grad = scale * sum_i d loss_i / d theta,     scale = reduction * clipping

The reduction ("mean": 1/B, "sum": 1, or any other factor) is fitted where the shares are computed; clipping, whatever
changed all gradients by one factor after backward, is read off the norms before and after.

Where the loop may do anything to p.grad (`remainder="account"`), nothing is fitted to it: the reduction is read off the
norms as the backward pass left them, tensor by tensor, so that what was done to some of them, or later, is not in it.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import BatchIdentityError
from ..layout import Layout
from .identities import ShareBound

log = logging.getLogger("attrib")


class NormWatch:
    """Hooks on the parameters that note the norms of the gradients as a backward pass leaves them.

    accounts: whether what is no common factor is no error. Two norms are noted then: that of a single tensor changes by
    some factor whatever is done to it, two change by the same one if all entries do.
    """

    def __init__(self, parameters: Sequence[Tensor], accounts: bool = False) -> None:
        self._parameters, self._accounts = list(parameters), accounts
        self._raw: dict[int, Tensor] = {}  # (2,) or (1,) each
        self._hooks = [p.register_post_accumulate_grad_hook(self._note) for p in parameters if p.requires_grad]

    def _note(self, p: Tensor) -> None:
        if p.grad is not None and not p.grad.is_sparse:
            self._raw[id(p)] = self._norms(p.grad)

    def _norms(self, gradient: Tensor) -> Tensor:
        return torch.stack([torch.linalg.vector_norm(gradient, n) for n in ((2, 1) if self._accounts else (2,))])

    def left(self) -> Tensor:
        """(K,) float64: the norms as the last backward pass left them; of a gradient that none of it made, as it is."""
        now = {id(p): self._norms(p.grad) for p in self._parameters if p.grad is not None and id(p) not in self._raw}
        norms = {**now, **self._raw}
        known = [float(norms[id(p)][0]) if id(p) in norms else 0.0 for p in self._parameters]
        return torch.tensor(known, dtype=torch.float64)

    def clear(self) -> None:
        self._raw.clear()

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
        before = torch.stack([self._raw[id(p)] for p in known]).double()
        now = torch.stack([self._norms(p.grad) for p in known if p.grad is not None]).double()
        if torch.equal(before, now):
            return 1.0
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

    def of_backward(
        self, left: Tensor, total: Tensor, rest: Tensor | None, layout: Layout, size: int, root: float
    ) -> tuple[float, "Reduction"]:
        """The factor in the gradients as the backward pass left them, and what is known then.

        left (K,): their norms. total, rest (P,): the unscaled sum of shares, and what of the gradient was a penalty's. root:
        how far norms may differ by rounding. It is the mean or the sum, whichever tensors agree with; else the one factor
        that most of the gradient agrees with; else the nearer of the two.
        """
        parts = [part for _, part in layout.slices()]
        weights = torch.stack([total[part].double().norm() for part in parts]).cpu()

        def agreeing(scale: float) -> float:
            whole = scale * total if rest is None else scale * total + rest
            norms = torch.stack([whole[part].double().norm() for part in parts]).cpu()
            return float(weights[(left - norms).abs() <= root * norms].square().sum())

        scales = {"mean": 1 / size, "sum": 1.0}
        agreed = {kind: agreeing(scale) for kind, scale in scales.items()}
        most = max(agreed.values())
        if most > 0:
            kind, known = self._settle([kind for kind in scales if agreed[kind] == most], size)
            return scales[kind], known
        ratios = sorted({float(n / w) for n, w in zip(left, weights, strict=True) if n > 0 and w > 0}, key=agreeing)
        if ratios and 2 * agreeing(ratios[-1]) > float(weights.square().sum()):
            return ratios[-1], Reduction("other")
        if self.kind in scales or not ratios:
            return scales.get(self.kind or "", scales["mean"]), self
        whole = math.log(float(left.norm() / weights.norm()))
        kind = min(scales, key=lambda known: abs(whole - math.log(scales[known])))
        return scales[kind], self if self.kind == "other" else Reduction(kind)

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
