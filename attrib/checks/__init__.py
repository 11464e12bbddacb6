"""What must hold for a step to be recorded.

- `intake`: the arguments of `attrib.record` and `recorder.step`
- `guard`: what must not change between steps: parameters, buffers, modes
- `randomness`: the generator's state before the forward pass
- `reduction`: the common factor between the examples' gradients and p.grad
- `identities`: shares sum to p.grad; the replayed update is the real one
"""

from .guard import Guard
from .identities import batch_identity, same_bits, same_state, share_bound, step_identity
from .intake import check_batch, check_gradient, check_options, names_of, tensor_option
from .randomness import RandomWatch
from .reduction import Reduction

__all__ = [
    "Guard",
    "RandomWatch",
    "Reduction",
    "batch_identity",
    "check_batch",
    "check_gradient",
    "check_options",
    "names_of",
    "same_bits",
    "same_state",
    "share_bound",
    "step_identity",
    "tensor_option",
]
