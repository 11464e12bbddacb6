"""What the examples of a step contributed to its gradient: checked against p.grad, and kept as the run asks.

    replay      nothing is kept: states and inputs say it all
    gradients   the share of every example, (B, P)
    factors     the same in the form its layers give it (`kernels.factors`)

The last two are taken from the user's own backward pass where that can be followed (`gradients.Watch`). A record of the step
goes in, a record of what was captured comes out, and nothing is settled until the next step brings it back.

- `records`: the step, what is captured of it, what the steps so far have settled
- `listen`: what the hooks heard of the user's own passes
- `rounded`: the autocast that the loop has around its loss
- `penalty`: the gradient that is no example's
- `identities`: the shares sum to p.grad, and each is its own example's
- `stored`: the arrays to be stored
- `capture`: the journey
"""

from .capture import Capture
from .listen import Heard, Listeners
from .records import Announced, Captured, CaptureOptions, Settled, Step

__all__ = ["Announced", "Capture", "CaptureOptions", "Captured", "Heard", "Listeners", "Settled", "Step"]
