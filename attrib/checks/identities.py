"""The first two identities, as numbers and as errors: shares sum to p.grad; the replayed update is the real one."""

import torch
from torch import Tensor

from ..errors import BatchIdentityError, ChangedOutsideError, StepIdentityError
from ..layout import Layout


def _root(dtype: torch.dtype) -> float:
    """sqrt(eps): both sides are sums of the same terms in the same precision, so this is far above rounding, and far below
    any missing term worth naming."""
    return float(torch.finfo(dtype).eps ** 0.5)


def batch_identity(layout: Layout, gradient: Tensor, shares: Tensor, step: int) -> float:
    """Largest |sum of shares - p.grad| of a parameter tensor over |p.grad| of all; vectors (P,).

    Raises:
        BatchIdentityError: above sqrt(eps), naming the parameter.
    """
    norm = float(gradient.double().norm()) or 1.0
    gaps = {name: float((gradient[part] - shares[part]).double().norm()) / norm for name, part in layout.slices()}
    worst = max(gaps, key=gaps.__getitem__)
    tolerance = _root(gradient.dtype)
    if not gaps[worst] <= tolerance:
        raise BatchIdentityError(
            f"the shares of the examples do not sum to p.grad: got a gap of {gaps[worst]:.3g} of |p.grad|, expected at "
            f"most {tolerance:.1g}, at parameter {worst!r}, step {step}. Look for a penalty in the loss that is no "
            f"example's, a gradient left from before zero_grad(), a gradient changed other than by a common factor, or "
            f"a batch other than the one backpropagated. The step was refused."
        )
    return gaps[worst]


def step_identity(layout: Layout, theta: Tensor, after: Tensor, replayed: Tensor, step: int) -> float:
    """|replayed - real update| over |real update|; vectors (P,). Real parameters are rounded to eps |theta|.

    Raises:
        StepIdentityError: beyond sqrt(eps) of the update plus that rounding, naming the parameter.
    """
    real = after - theta
    eps = float(torch.finfo(theta.dtype).eps)
    for name, part in layout.slices():
        gap = float((replayed[part] - real[part]).norm())
        allowed = eps**0.5 * float(real[part].norm()) + 4 * eps * float(after[part].norm())
        if not gap <= allowed:
            raise StepIdentityError(
                f"the replayed update is not the optimizer's: got a gap of {gap:.3g}, expected at most {allowed:.3g}, at "
                f"parameter {name!r}, step {step}. Recording ends before this step; the optimizer has made it. Was the "
                f"optimizer's state or code changed?"
            )
    size = float(real.norm())
    return float((replayed - real).norm()) / size if size else 0.0


def same_state(known: dict[str, Tensor], found: dict[str, Tensor], step: int) -> None:
    """Raise ChangedOutsideError where the optimizer's accumulators are not what the recorded gradients make them."""
    for key, value in found.items():
        gap = float((known[key] - value).norm())
        if not gap <= _root(value.dtype) * float(value.norm()):
            raise ChangedOutsideError(
                f"the optimizer's state changed between steps: got {key!r} off by {gap:.3g}, expected what the recorded "
                f"gradients make it, at step {step}. Record a new run."
            )
