"""Which autocast the loop has around its loss, and what that rounds to: settled at the first step.

What is on when the model is called is heard. Whether it is around the rest of the loss too is not: the one is taken under
which the gradients come nearer to p.grad.
"""

import logging
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ..autocast import Autocast, candidates
from ..checks import fit_scale
from ..constants import is_low
from ..errors import ChangedOutsideError
from ..generators import random_state
from ..gradients import ExampleGradients
from .listen import Heard
from .records import Step

log = logging.getLogger("attrib")

Made = Callable[[Autocast | None], ExampleGradients]


def settled_autocast(made: Made, step: Step, heard: Heard) -> tuple[ExampleGradients, Autocast | None]:
    """The gradients under the autocast of the loop, and which it is; made: from an autocast."""
    tried: list[tuple[float, ExampleGradients, Autocast | None]] = []
    known = candidates(heard.autocasts or (None,))
    for autocast in known:
        shares = made(autocast)
        try:
            gap = _gap(shares, step, heard) if len(known) > 1 else _passed(shares, step, heard)
        except RuntimeError as error:  # of types that do not go together, where the loop's do
            if not tried and autocast == known[-1]:
                raise
            log.debug("the loss cannot be computed under %s: %s", autocast, error)
            continue
        tried.append((gap, shares, autocast))
    _, shares, autocast = min(tried, key=lambda t: t[0])
    if autocast is None and is_low(shares.precision):
        autocast = Autocast(step.theta.device.type, shares.precision, "inside")
    if autocast is not None:
        log.info(
            "passes round to %s: autocast around the loss, the model or inside: %s", shares.precision, autocast.around
        )
    return shares, autocast


def check_autocast(step: Step, heard: Heard) -> None:
    """Raise ChangedOutsideError where the model was called under another autocast than at the first step."""
    settled = step.settled.autocast
    known = None if settled is None or settled.around == "inside" else replace(settled, around="loss")
    if heard.autocasts and known not in heard.autocasts:
        raise ChangedOutsideError(
            f"the model ran under another autocast than at the first step: got {_said(heard.autocasts[0])}, expected "
            f"{_said(known)}, at step {step.number}. Keep it on, or off, throughout a run; the step was refused."
        )


def _gap(shares: ExampleGradients, step: Step, heard: Heard) -> float:
    """Between p.grad and the gradient of the mean, whatever the scale between them."""
    size = len(step.batch[0])
    weights = torch.full((size,), 1 / size, dtype=step.theta.dtype, device=step.theta.device)
    with random_state(heard.start):
        named: dict[str, Tensor] = shares.at(step.active).vector.gradient(step.theta, step.batch, weights)[1]
    mean = shares.layout.flatten(named.values())
    return float((step.gradient - (fit_scale(step.gradient, mean) or 0.0) * mean).double().norm())


def _passed(shares: ExampleGradients, step: Step, heard: Heard) -> float:
    """A pass, so that what it rounds to is known; there is nothing to compare."""
    with random_state(heard.start):
        shares.vector.values(step.theta, step.batch)
    return 0.0


def _said(autocast: Autocast | None) -> str:
    return "none" if autocast is None else f"{autocast.dtype} on {autocast.device}"
