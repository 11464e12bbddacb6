"""What must hold for a step to be recorded.

- `intake`: the arguments of `attrib.record` and `recorder.step`
- `guard`: what must not change between steps: parameters, buffers, modes
- `alone`: what one process trains, no others do
- `randomness`: the generators' states before the forward pass
- `norms`: of the gradients as a backward pass leaves them
- `reduction`: the factors between the examples' gradients and p.grad
- `identities`: shares sum to p.grad; the replayed update is the real one
"""

from .alone import check_alone
from .guard import Guard
from .identities import ShareBound, batch_identity, same_bits, same_state, split_bound, split_gaps, step_identity
from .intake import SHARES, check_batch, check_forwards, check_gradient, check_ids, check_options, hold, names_of
from .norms import NormWatch, ReducedNormWatch
from .randomness import Draws, RandomWatch
from .reduction import (
    REDUCTIONS,
    Backward,
    Reduction,
    Totals,
    fit_scale,
    fit_scales,
    unscaling,
    weights_of,
)

__all__ = [
    "REDUCTIONS",
    "SHARES",
    "Backward",
    "Draws",
    "Guard",
    "NormWatch",
    "RandomWatch",
    "ReducedNormWatch",
    "Reduction",
    "ShareBound",
    "Totals",
    "batch_identity",
    "check_alone",
    "check_batch",
    "check_forwards",
    "check_gradient",
    "check_ids",
    "check_options",
    "fit_scale",
    "fit_scales",
    "hold",
    "names_of",
    "same_bits",
    "same_state",
    "split_bound",
    "split_gaps",
    "step_identity",
    "unscaling",
    "weights_of",
]
