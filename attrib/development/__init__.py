"""The whole trajectory of a run: what the final model cannot tell.

| question | operation |
|---|---|
| how did it develop? | `evaluate`: any measurement at every stored state; `attrib.onset` of its curve |
| another basin, or only slower? | `interpolate`, `barrier`, `convexity_gap`, `connectivity`, `clusters`, `settled` |
| vestigial? | `vestiges`: what a group built up and tore down; `ablate` at the end; `what_if` it were frozen |
| what would have become of it? | `what_if`: any interventions, trained again, beside the untouched run |
| who changed what, in a step? | `moves`: the change of each update over the examples that caused it |
| the same way in another run? | `similarity` of the contributions |
| how sharp is the valley? | `curvature`: largest eigenvalues of the loss's Hessian |

Observation is not causation: `vestiges` and `similarity` account for what happened, `what_if` and `ablate` intervene.
"""

from .changed import ablate, what_if
from .connected import clusters, connectivity, settled
from .curvature import curvature
from .curves import barrier, convexity_gap, evaluate, interpolate
from .moved import Move, moves
from .similar import similarity
from .vestigial import vestiges

__all__ = [
    "Move",
    "ablate",
    "barrier",
    "clusters",
    "connectivity",
    "convexity_gap",
    "curvature",
    "evaluate",
    "interpolate",
    "moves",
    "settled",
    "similarity",
    "vestiges",
    "what_if",
]
