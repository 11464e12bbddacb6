"""Identities as numbers and as errors: shares sum to p.grad; the replayed update is the real one; each share is that of its
own example."""

import logging
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ..errors import BatchIdentityError, ChangedOutsideError, StepIdentityError
from ..layout import Layout

log = logging.getLogger("attrib")


def _root(dtype: torch.dtype) -> float:
    """sqrt(eps): both sides are sums of the same terms in the same precision, so this is far above rounding, and far below
    any missing term worth naming."""
    return float(torch.finfo(dtype).eps ** 0.5)


class ShareBound:
    """Whether a gap between p.grad and the sum of shares is no more than rounding, that of a penalty which was in p.grad
    and is taken off included.

    At an optimum p.grad cancels to rounding itself; what the rounding is of is the gross size, sum_i |g_i|, which is asked
    for once, and only where the cheap bound does not settle it. Where it cannot be had it is 0: the gap stands. precision:
    the type that the passes rounded to on their way, None for the gradient's.
    """

    def __init__(
        self,
        gradient: Tensor,
        gross: Callable[[], float],
        penalty: Tensor | None = None,
        precision: torch.dtype | None = None,
    ) -> None:
        self._eps = float(torch.finfo(precision or gradient.dtype).eps)
        self._norm, self._gross = float(gradient.double().norm()), gross
        # taking it off leaves eps of it, as does each of the sums that p.grad was made by: a few eps
        self._taken = 0.0 if penalty is None else 16 * self._eps * float(penalty.double().norm())
        self._known: float | None = None
        self.root = self._eps**0.5

    def cheap(self, gap: float) -> bool:
        return gap <= self.root * self._norm + self._taken

    def gross(self, gap: float) -> bool:
        if self._known is None:
            try:
                self._known = self._gross()
            except Exception as error:  # it must not hide what is wrong
                log.debug("the size of the shares cannot be had: %s", error)
                self._known = 0.0
        return gap <= 16 * self._eps * self._known + self._taken

    def __call__(self, gap: float) -> bool:
        return self.cheap(gap) or self.gross(gap)


def batch_identity(
    layout: Layout, gradient: Tensor, shares: Tensor, step: int, within: ShareBound | None = None
) -> float:
    """Largest |sum of shares - p.grad| of a parameter tensor over |p.grad| of all; vectors (P,).

    Raises:
        BatchIdentityError: naming the parameter, where a gap is not `within` rounding (sqrt(eps) of |p.grad| by default).
    """
    within = within or ShareBound(gradient, lambda: 0.0)
    norm = float(gradient.double().norm()) or 1.0
    gaps = {name: float((gradient[part] - shares[part]).double().norm()) for name, part in layout.slices()}
    worst = max(gaps, key=gaps.__getitem__)
    if not within(gaps[worst]):
        raise BatchIdentityError(
            f"the shares of the examples do not sum to p.grad: got a gap of {gaps[worst] / norm:.3g} of |p.grad|, expected "
            f"at most {within.root:.1g}, at parameter {worst!r}, step {step}. Look for a penalty in the loss that "
            f"is no example's and was not declared (attrib.record(penalty=...)), a gradient left from before zero_grad(), a "
            f"mean over micro-batches or a weighted mean that gives examples different factors, or a batch other than the "
            f"one backpropagated. What the loop does to gradients on purpose (noise, clipping by value, hooks) is a row of "
            f'the ledger with attrib.record(remainder="account"). The step was refused.'
        )
    return gaps[worst] / norm


def split_bound(dtype: torch.dtype) -> float:
    """On the gaps below, in the precision that shares are computed in."""
    return _root(dtype)


def split_gaps(
    differences: np.ndarray, sizes: np.ndarray, dtype: torch.dtype, least: np.ndarray | float = 0.0
) -> np.ndarray:
    """How far shares are from those of their own examples, of each group relative to its size; (..., G) each.

    Both are norms of one random combination of the examples' shares, so of the size of sqrt(sum_i c_i^2): an example in the
    wrong place is not outvoted by the others. Where a group is next to nothing beside the others, rounding is of those: it
    is counted as no smaller than 100 sqrt(eps) of all, nor than `least`.
    """
    whole = np.sqrt(np.square(sizes).sum(-1, keepdims=True))
    floor = np.maximum(np.maximum(sizes, min(100 * _root(dtype), 0.1) * whole), least)
    return differences / np.where(floor > 0, floor, 1.0)


# github.com/pytorch/pytorch/issues/191763
_FUSED = " Pass fused=False where it is fused: torch 2.13's SGD on the CPU leaves parameters of few bits as they were."


def step_identity(
    layout: Layout,
    theta: Tensor,
    after: Tensor,
    replayed: Tensor,
    step: int,
    explained: Tensor | None = None,
    within: Tensor | None = None,
) -> float:
    """|replayed - real update| over |real update|; vectors (P,). explained: the entries that are replayed, (P,); None: all.
    The others count in the number, but may be what they are. within: how far each entry may be off, where the optimizer
    rounds to few bits, (P,); inf for one that may be what it is.

    Real parameters are rounded to eps |theta|, so an update below sqrt(eps) |theta| is counted as of that size.

    Raises:
        StepIdentityError: beyond sqrt(eps) of the update plus that rounding, naming the parameter.
    """
    real = after - theta
    eps = float(torch.finfo(theta.dtype).eps)
    hint = "" if within is None else _FUSED
    for name, part in layout.slices():
        if not torch.isfinite(after[part]).all():
            raise StepIdentityError(
                f"the optimizer left a parameter that is not finite, at parameter {name!r}, step {step}. Recording ends "
                f"before this step; the optimizer has made it. In float16 an eps below 3e-8 is 0: pass a larger one, such "
                f"as 1e-4, or keep the parameters in float32 and train under torch.autocast."
            )
        off = replayed[part] - real[part]
        if within is None:
            gap = float((off if explained is None else off * explained[part]).norm())
            allowed = eps**0.5 * float(real[part].norm()) + 4 * eps * float(after[part].norm())
        else:
            worst = int((off.abs() - within[part]).argmax())
            gap, allowed = float(off[worst].abs()), float(within[part][worst])
        if not gap <= allowed:
            raise StepIdentityError(
                f"the replayed update is not the optimizer's: got a gap of {gap:.3g}, expected at most {allowed:.3g}, at "
                f"parameter {name!r}, step {step}. Recording ends before this step; the optimizer has made it. Was the "
                f"optimizer's state or code changed?{hint}"
            )
    size = max(float(real.norm()), eps**0.5 * float(after.norm()))
    return float((replayed - real).norm()) / size if size else 0.0


def same_bits(layout: Layout, after: Tensor, again: Tensor, step: int) -> None:
    """Raise StepIdentityError where torch's optimizer, run again on copies, does not end with the same bits; (P,) each."""
    for name, part in layout.slices():
        if not torch.equal(after[part], again[part]):
            gap = float((after[part] - again[part]).abs().max())
            raise StepIdentityError(
                f"the optimizer run again does not end with the same bits: got {gap:.3g} apart, at parameter {name!r}, step "
                f"{step}. States between key frames could not be made again (is the model on another device than the CPU?): "
                f"record with states_every=1."
            )


def same_state(known: dict[str, Tensor], found: dict[str, Tensor], step: int) -> None:
    """Raise ChangedOutsideError where the optimizer's accumulators are not what the recorded gradients make them."""
    for key, value in found.items():
        gap = float((known[key] - value).norm())
        if not gap <= _root(value.dtype) * float(value.norm()):
            raise ChangedOutsideError(
                f"the optimizer's state changed between steps: got {key!r} off by {gap:.3g}, expected what the recorded "
                f"gradients make it, at step {step}. Record a new run."
            )
