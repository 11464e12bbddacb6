"""Measurements of an average of the model over the run, as loops keep one beside it."""

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from ..errors import MeasurementError


class Average(Protocol):
    """A running average of the states of a run; pickles.

    Example:
        >>> class Warmed:  # the mean of the states at first, then ever less of what is long ago
        ...     def weight(self, state):
        ...         return max(0.25, 1 / state)
        >>> attrib.measure.averaged(measurement, Warmed())(model).shape
        torch.Size([2])
    """

    def weight(self, state: int) -> float:
        """What the state after `state` steps, 1 .. T, is given in the average: a += weight (theta - a)."""
        ...


@dataclass(frozen=True)
class Ema:
    """An exponential moving average, as `torch.optim.swa_utils.AveragedModel` keeps with `get_ema_multi_avg_fn(decay)`.

    Args:
        decay: what stays of it in an update, 0 to 1.
        start: the state (steps made) that it is a copy of: 1 where it is first updated after the first step, as torch's
            copies then; 0 for one that begins at the initial parameters and moves from there on.
        every: steps between updates.

    Raises:
        MeasurementError: no share, or no counts of steps.

    Example:
        >>> [attrib.measure.Ema(0.75, start=2).weight(state) for state in (1, 2, 3, 4)]
        [1.0, 1.0, 0.25, 0.25]
    """

    decay: float = 0.999
    start: int = 1
    every: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.decay <= 1:
            raise MeasurementError(f"decay is no share: got {self.decay!r}, expected 0 to 1, at measure.Ema.")
        _check_updates(self)

    def weight(self, state: int) -> float:
        return _weight(self, state, 1 - self.decay)


@dataclass(frozen=True)
class Swa:
    """The mean of states of the run, as `torch.optim.swa_utils.AveragedModel` keeps by default.

    Args:
        start: the first of them (steps made); before it, the average is the state itself.
        every: steps from one of them to the next.

    Raises:
        MeasurementError: no counts of steps.

    Example:
        >>> [attrib.measure.Swa(start=2).weight(state) for state in (1, 2, 3, 5)]
        [1.0, 1.0, 0.5, 0.25]
    """

    start: int
    every: int = 1

    def __post_init__(self) -> None:
        _check_updates(self)

    def weight(self, state: int) -> float:
        return _weight(self, state, 1 / (max(0, state - self.start) // self.every + 1))


def _check_updates(average: Ema | Swa) -> None:
    for name, least in (("start", 0), ("every", 1)):
        value = getattr(average, name)
        if not isinstance(value, int) or value < least:
            raise MeasurementError(
                f"{name} is no count of steps: got {value!r}, expected an integer of at least {least}, at "
                f"measure.{type(average).__name__}."
            )


def _weight(average: Ema | Swa, state: int, updated: float) -> float:
    """1 up to the state that the average is a copy of, then `updated` at its updates and 0 between them."""
    since = state - average.start
    return 1.0 if since <= 0 else updated if since % average.every == 0 else 0.0


@dataclass(frozen=True)
class OfAverage:
    """A measurement of the average of a run, not of its parameters. Of a model that is passed, such as the average itself,
    it is the measurement.

    Example:
        >>> attrib.measure.averaged(measurement, attrib.measure.Swa(start=6)).average
        Swa(start=6, every=1)
    """

    measurement: Any
    average: Average

    def __call__(self, model: nn.Module) -> Tensor:
        return self.measurement(model)


def averaged(measurement: Any, average: Average) -> OfAverage:
    """The measurement, of an average of the model that the loop keeps beside it.

    Every update reaches the average through all states that are averaged, so examples, decay and momentum are accounted for
    exactly, as for the model itself. `timeline` and `curve` are of the average. A window of steps starts where the average
    is: what the parameters are ahead of it then stands in `inherited`.

    Args:
        measurement: `model -> (Q,)`, or one of these.
        average: `Ema(decay)` or `Swa(start, every)`, as the loop has it.

    Raises:
        MeasurementError: not an average.

    Example:
        >>> # as AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9)), updated after every recorder.step
        >>> averaged = attrib.measure.averaged(measurement, attrib.measure.Ema(0.9))
        >>> result = attrib.attribute(run, model, averaged, loss=loss)
        >>> bool(abs(result.residual).max() < 1e-12)
        True
    """
    if isinstance(average, type) or not callable(getattr(average, "weight", None)):
        raise MeasurementError(
            f"that is no average: got {average!r}, expected measure.Ema(decay) or measure.Swa(start, every)."
        )
    if not callable(measurement) or isinstance(measurement, OfAverage):
        raise MeasurementError(
            f"that is no measurement: got {measurement!r}, expected a callable model -> (Q,), at measure.averaged."
        )
    return OfAverage(measurement, average)
