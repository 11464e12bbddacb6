"""Every error attrib raises, and the one sentence they are all written in.

`<what is wrong>: got <value>, expected <value>, at <layer / step / array>. <What to do.>`
"""

from typing import Any


class AttribError(Exception):
    """Base of all errors raised on purpose; catch this to catch them all."""


class UnsupportedOptimizerError(AttribError, TypeError):
    """The optimizer has no update rule."""


class BatchError(AttribError, ValueError):
    """An index or a batch given to `recorder.step` does not fit."""


class LossError(AttribError, ValueError):
    """The loss is not one finite number per example, or not the one that was recorded."""


class BatchIdentityError(AttribError):
    """The shares of the examples do not sum to the gradient that the optimizer saw."""


class SplitIdentityError(AttribError):
    """A share is not that of its example, though all of them sum to the gradient."""


class LimitIdentityError(AttribError):
    """The path's vector does not tend to the gradient of the measurement: an operation has a wrong rule or derivative."""


class StepIdentityError(AttribError):
    """The replayed update is not the update that the optimizer made."""


class ChangedOutsideError(AttribError):
    """Parameters, buffers or optimizer state changed between two recorded steps."""


class ModelMismatchError(AttribError, ValueError):
    """A model is not the one that was recorded."""


class StoreExistsError(AttribError, FileExistsError):
    """Something is already stored there."""


class StoreError(AttribError, OSError):
    """A store is not readable: truncated, corrupted, of a newer format, or not one of ours."""


class UntraceableModelError(AttribError):
    """The measurement could not be turned into a graph for the secant."""


class MeasurementError(AttribError, ValueError):
    """A measurement is not a finite tensor of shape (Q,)."""


class KeptAxesError(AttribError, KeyError):
    """The result was not kept along the axes that were asked for."""

    def __str__(self) -> str:  # KeyError would print the repr
        return str(self.args[0]) if self.args else ""


class ResumeError(AttribError, ValueError):
    """A run cannot be gone on with."""


class ReplayError(AttribError, ValueError):
    """A run cannot be trained again as asked."""


class SetupError(AttribError, ValueError):
    """A user's setup function cannot be used."""


class DescriptionError(AttribError, ValueError):
    """What is to say how examples are shown does not."""


class MissingExtraError(AttribError, ImportError):
    """A package of one of attrib's extras is not installed."""


class WorkerError(AttribError, RuntimeError):
    """A worker of an executor died, or cannot be sent the work. `result` holds what was done until then, complete by itself,
    or None."""

    result: Any = None


class Interrupted(KeyboardInterrupt):
    """Ctrl-C in long work. `result` holds what was done until then, complete by itself: see the message."""

    def __init__(self, message: str, result: Any) -> None:
        super().__init__(message)
        self.result = result


class InfluenceError(AttribError):
    """Derivatives are not those of the training."""


class CompletenessError(AttribError):
    """The terms do not add up to the measurement."""
