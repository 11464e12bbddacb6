"""The factors between the examples' gradients and p.grad: the loss's reduction, times clipping.

    p.grad = sum over passes of scale * sum_i d loss_i / d theta,     scale = reduction * clipping

The reduction ("mean": 1/B, "sum": 1, or any other factor, of each pass) is fitted where the shares are computed; clipping,
whatever changed all gradients by one factor after backward, is read off the norms before and after.

Where the loop may do anything to p.grad (`remainder="account"`), nothing is fitted to it: the reduction is read off the
norms as the backward pass left them, tensor by tensor, so that what was done to some of them, or later, is not in it.
"""

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from ..errors import BatchIdentityError
from ..layout import Layout
from .identities import ShareBound

log = logging.getLogger("attrib")


REDUCTIONS = ("mean", "pooled", "sum")
ROOM = 4  # entries of a gradient for each weight that is fitted to it, at least
SCALED = 7  # the least exponent of a factor that is taken for a GradScaler's
POWER = 1e-3  # how far the logarithm of a power of two may be from its exponent
INDEPENDENT = 1e-4  # the least eigenvalue of the cosines of gradients to which weights are fitted


def weights_of(kind: str, sizes: Sequence[int]) -> np.ndarray:
    """(M,): what the gradients of the losses of M passes, of so many examples each, are multiplied with. "mean": the mean
    over the passes of their means; "pooled": the mean over all examples; "sum"."""
    count = np.asarray(sizes, np.float64)
    if kind == "mean":
        return 1 / (len(count) * count)
    return np.full(len(count), 1 / count.sum() if kind == "pooled" else 1.0)


@lru_cache(1024)
def _agreed(kinds: tuple[str, ...], sizes: tuple[int, ...]) -> np.ndarray:
    """What all of the kinds say, (M,); NaN where they differ. Steps are of few shapes, and each asks."""
    found = [weights_of(kind, sizes) for kind in kinds]
    if found and all(np.array_equal(found[0], other) for other in found):
        return found[0]
    return np.full(len(sizes), np.nan)


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
        for kind in REDUCTIONS:
            weights = weights_of(kind, self.sizes)
            factor = float(scales[0] / weights[0])
            if np.array_equal(scales, factor * weights):
                return self.reduced(kind) * factor
        return sum((s * t for s, t in zip(scales.tolist(), self.each(), strict=True)), torch.zeros_like(self.summed))


@dataclass(frozen=True)
class Backward:
    """What the backward passes left: the norms (K,) of the tensors' gradients; rest (P,): what of them was a penalty's."""

    norms: Tensor
    rest: Tensor | None
    layout: Layout

    def norms_of(self, vector: Tensor) -> Tensor:
        """(P,) -> (K,), on the CPU."""
        return torch.stack([vector[part].double().norm() for _, part in self.layout.slices()]).cpu()

    def agreeing(self, shares: Tensor, weight: Tensor, root: float) -> float:
        """How much of the gradient, weight (K,), has the norms that the shares (P,) would leave."""
        norms = self.norms_of(shares if self.rest is None else shares + self.rest)
        return float(weight[(self.norms - norms).abs() <= root * norms].sum())


@dataclass(frozen=True)
class Reduction:
    """How the loop reduces the losses of a step, as far as it is known.

    kinds: of REDUCTIONS those that fit every step so far; none of them where the passes have weights of their own. common:
    whether there is a factor beside, such as that of a weight or of loss scaling, which is fitted at every step.
    """

    kinds: tuple[str, ...] = REDUCTIONS
    common: bool = False

    def expected(self, sizes: Sequence[int], clip: float) -> np.ndarray:
        """(M,): the scales where the shares are not computed; NaN where they are not known, to be fitted when they are."""
        return clip * _agreed(() if self.common else self.kinds, tuple(sizes))

    def fit(self, gradient: Tensor, totals: Totals, clip: float, bound: ShareBound) -> tuple[np.ndarray, "Reduction"]:
        """The scales (M,) from p.grad (P,), and what is known then: one of REDUCTIONS where the gap that leaves is within
        rounding, fitted otherwise. What rounding is of, where gradients cancel, is asked for only where the cheap bound does
        not settle it.
        """
        for within in (bound.cheap, bound.gross):
            fits = [k for k in REDUCTIONS if within(_gap(gradient, totals.reduced(k), clip))]
            if fits:
                kinds = tuple(k for k in self.kinds if k in fits)
                return clip * weights_of((kinds or fits)[0], totals.sizes), Reduction(kinds, self.common)
            for kind in REDUCTIONS:
                factor = fit_scale(gradient, totals.reduced(kind))
                if factor is not None and within(_gap(gradient, totals.reduced(kind), factor)):
                    return factor * weights_of(kind, totals.sizes), self._fitted(kind)
            if len(totals.sizes) > 1:
                scales = fit_scales(gradient, totals.each())
                if scales is not None and within(_gap(gradient, totals.weighted(scales), 1.0)):
                    return scales, Reduction(())
        kind = (self.kinds or REDUCTIONS)[0]
        factor = fit_scale(gradient, totals.reduced(kind))
        return (clip if factor is None else factor) * weights_of(kind, totals.sizes), self._fitted(kind)

    def refit(self, gradient: Tensor, totals: Totals) -> np.ndarray | None:
        """The scales (M,) of a step at which they are not known; None where nothing says."""
        if not self.kinds and len(totals.sizes) > 1:
            return fit_scales(gradient, totals.each())
        fits = []
        for kind in self.kinds or REDUCTIONS:
            factor = fit_scale(gradient, totals.reduced(kind))
            if factor is not None:
                fits.append((_gap(gradient, totals.reduced(kind), factor), factor * weights_of(kind, totals.sizes)))
        return min(fits, key=lambda fit: fit[0])[1] if fits else None

    def _fitted(self, kind: str) -> "Reduction":
        if not self.common:
            log.info("the reduction of the loss has a factor of its own: it is fitted when attributing")
        return Reduction((kind,) if kind in self.kinds else (), common=True)

    def of_backward(self, backward: Backward, totals: Totals, root: float) -> tuple[np.ndarray, "Reduction"]:
        """The factors (M,) in the gradients as the backward passes left them, and what is known then. root: how far norms
        may differ by rounding. It is one of REDUCTIONS, whichever tensors agree with; else one of them times the one factor
        that most of the gradient agrees with; else, of a single pass, the nearer of the kinds.

        Raises:
            BatchIdentityError: several passes have weights of their own, which cannot be told from what was done to p.grad.
        """
        weight = backward.norms_of(totals.summed).square()
        agreed = {kind: backward.agreeing(totals.reduced(kind), weight, root) for kind in REDUCTIONS}
        most = max(agreed.values())
        if most > 0:
            fits = [kind for kind in REDUCTIONS if agreed[kind] == most]
            kinds = tuple(kind for kind in self.kinds if kind in fits)
            return weights_of((kinds or fits)[0], totals.sizes), Reduction(kinds, self.common)
        norms, best = weight.sqrt(), {}
        for kind in self.kinds or REDUCTIONS:
            reduced = totals.reduced(kind)
            pairs = zip(backward.norms, backward.norms_of(reduced), strict=True)
            for ratio in {float(n / w) for n, w in pairs if n > 0 and w > 0}:
                best[kind, ratio] = backward.agreeing(reduced * ratio, weight, root)
        if not best:
            return weights_of((self.kinds or REDUCTIONS)[0], totals.sizes), self
        kind, ratio = max(best, key=best.__getitem__)
        alone = backward.agreeing(totals.reduced(kind) * ratio, (weight > 0).to(weight), root) < 2
        if 2 * best[kind, ratio] > float(weight.sum()) and not (alone and len(totals.sizes) > 1):
            return ratio * weights_of(kind, totals.sizes), Reduction((kind,), common=True)
        if len(totals.sizes) > 1:
            raise BatchIdentityError(
                "the weights of the batches of a step cannot be read off: got gradients that are none of the mean, the sum "
                'or one factor beside, expected that with remainder="account". Give all batches of a step the same '
                "reduction, such as losses.sum() / (examples of the step). The step was refused."
            )
        whole = math.log(float(backward.norms.norm() / norms.norm()))
        kind = min(
            self.kinds or REDUCTIONS, key=lambda known: abs(whole - math.log(weights_of(known, totals.sizes)[0]))
        )
        return weights_of(kind, totals.sizes), self


def unscaling(scales: np.ndarray, sizes: Sequence[int], change: float) -> float:
    """What a GradScaler took off again, 1 for nothing: the power of two by which the factors (M,) in the gradients, as the
    backward pass left them, are one of REDUCTIONS, where the `change` of their norm since is about as much.

    A loss that is reduced by one of REDUCTIONS itself was not scaled. Where two powers would do (a mean over 2^k examples is
    a sum over as many), it is that which is nearer to the change.

    Raises:
        BatchIdentityError: a small power, which a weight of the loss and the clipping of its gradient look like as well.
    """
    powers = [float(np.log2(scales[0] / weights_of(kind, sizes)[0])) for kind in REDUCTIONS] if scales[0] > 0 else [0.0]
    whole = [round(power) for power in powers if abs(power - round(power)) < POWER]
    if not whole or 0 in whole or not 0 < change < 1:
        return 1.0
    power = min(whole, key=lambda known: abs(known + math.log2(change)))
    if power < 1 or math.log2(change) > -power / 2:
        return 1.0
    if power < SCALED:
        raise BatchIdentityError(
            f"it cannot be told whether a factor in the loss was taken off again: got 2^{power}, and gradients of which "
            f"{change:.3g} is left, expected no such factor, or that of a GradScaler, 2^{SCALED} or more. Weight the loss "
            f"by another number, or scale it by more. The step was refused."
        )
    return 2.0**-power


def _gap(gradient: Tensor, total: Tensor, scale: float) -> float:
    return float((gradient - scale * total).double().norm())


def fit_scale(gradient: Tensor, total: Tensor) -> float | None:
    """The factor that takes `total` nearest to `gradient`, of one shape each; None where total is zero."""
    square = float(total.double().square().sum())
    return float((gradient.double() * total.double()).sum()) / square if square else None


def fit_scales(gradient: Tensor, totals: Sequence[Tensor]) -> np.ndarray | None:
    """(M,): the factors with which M vectors (P,) sum to what is nearest to `gradient`, by the normal equations.

    None where they do not say: of vectors that are nearly dependent, or about as many as they have entries, anything is
    a sum.
    """
    vectors = [t.double() for t in totals]
    products = np.array([[float(a @ b) for b in vectors] for a in vectors])
    sizes = np.sqrt(np.diag(products))
    entries = int(torch.stack([v != 0 for v in vectors]).any(0).sum())
    if not sizes.all() or ROOM * len(vectors) > entries:
        return None
    whitened = products / np.outer(sizes, sizes)
    if np.linalg.eigvalsh(whitened)[0] < INDEPENDENT:
        return None
    return np.linalg.solve(whitened, np.array([float(a @ gradient.double()) for a in vectors]) / sizes) / sizes
