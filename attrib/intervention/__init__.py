"""Go back to a step of a recorded run, change something, and train on::

    changed = attrib.replay(run, 500, [Transplant("hidden.*", other, 1400), Freeze("embedding.*", slice(500, 700))], ...)

An intervention is a small object. `Transplant`, `Redraw` and `Permute` change the state that the replay starts from;
`Freeze`, `Drop`, `Reweight`, `Options`, `Suppress` and `Penalty` act during a window of steps, counted as in the run. They
compose in the order given. For a change of state in mid-replay, replay to the end, and replay the new run from its middle
(its steps count from its own start).

A kind of one's own is a frozen dataclass with one or two of the hooks of `Intervention`, or of `Window` if it acts during a
window of steps::

    @dataclass(frozen=True)
    class Flood(Window):
        level: float
        steps: slice | None = None

        def loss(self, step, losses, ids):
            return (losses - self.level).abs() if self.active(step) else losses
"""

from .base import Intervention, Window
from .during import Drop, Freeze, Options, Penalty, Reweight, Suppress, weighted
from .replay import replay, retrain
from .state import Permute, Redraw, Transplant

__all__ = [
    "Drop",
    "Freeze",
    "Intervention",
    "Options",
    "Penalty",
    "Permute",
    "Redraw",
    "Reweight",
    "Suppress",
    "Transplant",
    "Window",
    "replay",
    "retrain",
    "weighted",
]
