"""Which autocast the loop has around its loss, and what that rounds to: settled at the first step.

What is on when the model is called is heard. Whether it is around the rest of the loss too is not: the one is taken under
which the gradients come nearer to p.grad.
"""

import logging
from collections.abc import Callable
from dataclasses import replace

import torch

from ..autocast import Autocast, candidates
from ..errors import ChangedOutsideError
from ..generators import random_state
from ..gradients import Gradients
from .identities import Trial, of_the_loop
from .listen import Heard
from .records import Step

log = logging.getLogger("attrib")

TrialOf = Callable[[Gradients], Trial]


def settled_autocast(
    made: Callable[[Autocast | None], Gradients], trial: TrialOf, heard: Heard
) -> tuple[Gradients, Autocast | None]:
    """The gradients under the autocast of the loop, and which it is: also what a pass rounds to by itself, so that the run
    knows. made: from an autocast; trial: of the first step."""
    tried: list[tuple[float, Gradients, Autocast | None]] = []
    known = candidates(heard.autocasts)
    for autocast in known:
        shares = made(autocast)
        here = trial(shares)
        try:
            device = _pass(here)
            gap = _gap(of_the_loop(trial(shares))) if len(known) > 1 else 0.0
        except RuntimeError as error:  # of types that do not go together, where the loop's do
            if not tried and autocast == known[-1]:
                raise
            log.debug("the loss cannot be computed under %s: %s", autocast, error)
            continue
        tried.append((gap, shares, autocast))
    _, shares, autocast = min(tried, key=lambda t: t[0])
    if autocast is None and (len(known) > 1 or shares.precision != here.step.theta.dtype):
        autocast = replace(known[0] or Autocast(device, shares.precision), around="inside")
    if autocast is not None:
        log.info(
            "passes round to %s, by what is around the loss, the model, or inside: %s", autocast.dtype, autocast.around
        )
    return shares, autocast


def check_autocast(step: Step, heard: Heard) -> None:
    """Raise ChangedOutsideError where the model was called under another autocast than at the first step."""
    settled = step.settled.autocast
    if settled is not None and settled.around == "inside":
        return
    known = None if settled is None else replace(settled, around="loss")
    if heard.autocasts and known not in heard.autocasts:
        raise ChangedOutsideError(
            f"the model ran under another autocast than at the first step: got {_said(heard.autocasts[0])}, expected "
            f"{_said(known)}, at step {step.number}. Keep it on, or off, throughout a run; the step was refused."
        )


def _pass(trial: Trial) -> str:
    """So that what it rounds to is known; returns the kind of device."""
    each = trial.passes[0]
    with random_state(each.start):
        return each.shares.vector.values(trial.step.theta, each.batch).device.type


def _gap(trial: Trial) -> float:
    """Between p.grad and the sum of the shares, whatever the scales between them."""
    totals = trial.totals()
    scales = trial.step.settled.reduction.refit(trial.examples, totals)
    shares = torch.zeros_like(trial.examples) if scales is None else totals.weighted(scales)
    return float((trial.examples - shares).double().norm())


def _said(autocast: Autocast | None) -> str:
    return "none" if autocast is None else f"{autocast.dtype} on {autocast.device}"
