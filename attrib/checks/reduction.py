"""The common factor between the examples' gradients and p.grad: the loss's reduction, times clipping.

    p.grad = sum over passes of scale * sum_i d loss_i / d theta,     scale = reduction * clipping

The reduction ("mean": 1/B, "sum": 1, or any other factor, of each pass) is fitted where the shares are computed; clipping,
whatever changed all gradients by one factor after backward, is read off the norms before and after.
"""

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
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

    @property
    def heard(self) -> bool:
        """Whether there was a backward pass since `clear`."""
        return bool(self._raw)

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


KINDS = ("mean", "pooled", "sum")


def weights_of(kind: str, sizes: Sequence[int]) -> np.ndarray:
    """(M,): what the gradients of the losses of M passes, of so many examples each, are multiplied with. "mean": the mean
    over the passes of their means; "pooled": the mean over all examples; "sum"."""
    count = np.asarray(sizes, np.float64)
    if kind == "mean":
        return 1 / (len(count) * count)
    return np.full(len(count), 1 / count.sum() if kind == "pooled" else 1.0)


@dataclass(frozen=True)
class Totals:
    """The gradients of the summed losses of M passes, (P,) each, as far as the kinds of reduction need them.

    summed: of all together. averaged: each divided by its number of examples, None where that is one number. each: all by
    themselves, computed again.
    """

    sizes: tuple[int, ...]
    summed: Tensor
    averaged: Tensor | None
    each: Callable[[], list[Tensor]]

    @classmethod
    def of(cls, sizes: Sequence[int], each: Callable[[], Iterable[Tensor]]) -> "Totals":
        """each: computes them, one after the other."""
        summed: Tensor | None = None
        averaged: Tensor | None = None
        for size, total in zip(sizes, each(), strict=True):
            summed = total if summed is None else summed + total
            if len(set(sizes)) > 1:
                averaged = total / size if averaged is None else averaged + total / size
        assert summed is not None
        return cls(tuple(sizes), summed, averaged, lambda: list(each()))

    def reduced(self, kind: str) -> Tensor:
        """(P,): the gradient of the losses so reduced."""
        if kind == "mean" and self.averaged is not None:
            return self.averaged / len(self.sizes)
        return self.summed * float(weights_of(kind, self.sizes)[0])

    def weighted(self, scales: np.ndarray) -> Tensor:
        """(P,): sum_m scales_m total_m."""
        for kind in KINDS:
            weights = weights_of(kind, self.sizes)
            factor = float(scales[0] / weights[0])
            if np.array_equal(scales, factor * weights):
                return self.reduced(kind) * factor
        return sum((s * t for s, t in zip(scales.tolist(), self.each(), strict=True)), torch.zeros_like(self.summed))


@dataclass(frozen=True)
class Reduction:
    """How the loop reduces the losses of a step, as far as it is known.

    kinds: of KINDS those that fit every step so far; none of them where the passes have weights of their own. common:
    whether there is a factor beside, such as that of a weight or of loss scaling, which is fitted at every step.
    """

    kinds: tuple[str, ...] = KINDS
    common: bool = False

    def expected(self, sizes: Sequence[int], clip: float) -> np.ndarray:
        """(M,): the scales where the shares are not computed; NaN where they are not known, to be fitted when they are."""
        found = [] if self.common else [clip * weights_of(kind, sizes) for kind in self.kinds]
        if found and all(np.array_equal(found[0], other) for other in found):
            return found[0]
        return np.full(len(sizes), np.nan)

    def fit(self, gradient: Tensor, totals: Totals, clip: float, bound: ShareBound) -> tuple[np.ndarray, "Reduction"]:
        """The scales (M,) from p.grad (P,), and what is known then: one of KINDS where the gap that leaves is within
        rounding, fitted otherwise. What rounding is of, where gradients cancel, is asked for only where the cheap bound does
        not settle it.
        """
        for within in (bound.cheap, bound.gross):
            fits = [k for k in KINDS if within(_gap(gradient, totals.reduced(k), clip))]
            if fits:
                kinds = tuple(k for k in self.kinds if k in fits)
                return clip * weights_of((kinds or fits)[0], totals.sizes), Reduction(kinds, self.common)
            for kind in KINDS:
                factor = fit_scale(gradient, totals.reduced(kind))
                if factor is not None and within(_gap(gradient, totals.reduced(kind), factor)):
                    return factor * weights_of(kind, totals.sizes), self._fitted(kind)
            if len(totals.sizes) > 1:
                scales = fit_scales(gradient, totals.each())
                if within(_gap(gradient, totals.weighted(scales), 1.0)):
                    return scales, Reduction(())
        kind = (self.kinds or KINDS)[0]
        factor = fit_scale(gradient, totals.reduced(kind))
        return (clip if factor is None else factor) * weights_of(kind, totals.sizes), self._fitted(kind)

    def refit(self, gradient: Tensor, totals: Totals) -> np.ndarray | None:
        """The scales (M,) of a step at which they are not known; None where nothing says."""
        if not self.kinds and len(totals.sizes) > 1:
            return fit_scales(gradient, totals.each())
        fits = []
        for kind in self.kinds or KINDS:
            factor = fit_scale(gradient, totals.reduced(kind))
            if factor is not None:
                fits.append((_gap(gradient, totals.reduced(kind), factor), factor * weights_of(kind, totals.sizes)))
        return min(fits, key=lambda fit: fit[0])[1] if fits else None

    def _fitted(self, kind: str) -> "Reduction":
        if not self.common:
            log.info("the reduction of the loss has a factor of its own: it is fitted when attributing")
        return Reduction((kind,) if kind in self.kinds else (), common=True)


def _gap(gradient: Tensor, total: Tensor, scale: float) -> float:
    return float((gradient - scale * total).double().norm())


def fit_scale(gradient: Tensor, total: Tensor) -> float | None:
    """The factor that takes `total` nearest to `gradient`, of one shape each; None where total is zero."""
    square = float(total.double().square().sum())
    return float((gradient.double() * total.double()).sum()) / square if square else None


def fit_scales(gradient: Tensor, totals: Sequence[Tensor]) -> np.ndarray:
    """(M,): the factors with which M vectors (P,) sum to what is nearest to `gradient`, by the normal equations."""
    vectors = [t.double() for t in totals]
    products = np.array([[float(a @ b) for b in vectors] for a in vectors])
    return np.linalg.lstsq(products, np.array([float(a @ gradient.double()) for a in vectors]), rcond=None)[0]
