"""Measurements: what is to be explained. Any callable `model -> (Q,)` is one; these are the usual ones, over a batch.

A `Measurement` made here knows its batch, one row per query, so that the queries are run side by side. Units: nats for
`log_prob` and `loss`, the model's own for `logit` and `margin`.

    measurement = attrib.measure.log_prob(x_test, y_test)
    measurement(model)                                     # (Q,)

Any of them may be taken of an average of the model over the run, see `averaged`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import MeasurementError

IGNORED = -100  # a target that counts for nothing, as in torch's cross_entropy


@dataclass(frozen=True)
class Measurement:
    """One number per row of a batch: query q depends on the model and on row q alone.

    rows: (model, *batch) -> (Q,). batch: tensors with Q rows. name, units: for labels. names: what the queries are
    called, one each, or nothing.
    """

    rows: Callable[..., Tensor]
    batch: tuple[Tensor, ...]
    name: str
    units: str = ""
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.names and len(self.names) != len(self.batch[0]):
            raise MeasurementError(
                f"names do not fit the queries: got {len(self.names)}, expected {len(self.batch[0])}, at {self.name}."
            )

    def select(self, queries: Sequence[int]) -> "Measurement":
        """The measurement of some of its queries, by their position."""
        at = torch.as_tensor(list(queries), dtype=torch.int64)
        names = tuple(self.names[q] for q in queries) if self.names else ()
        return replace(self, batch=tuple(b[at.to(b.device)] for b in self.batch), names=names)

    def __call__(self, model: nn.Module) -> Tensor:
        return self.rows(model, *self.batch)


class Average(Protocol):
    """A running average of the states of a run; pickles."""

    def weight(self, state: int) -> float:
        """What the state after `state` steps, 1 .. T, is given in the average: a += weight (theta - a)."""
        ...


@dataclass(frozen=True)
class Ema:
    """An exponential moving average, as `torch.optim.swa_utils.AveragedModel` keeps with `get_ema_multi_avg_fn(decay)`.

    decay: what stays of it in an update. start: the state (steps made) that it is a copy of: 1 where it is first updated
    after the first step, as torch's copies then; 0 for one that begins at the initial parameters and moves from there on.
    every: steps between updates.
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
    """The mean of every `every`-th state (steps made) from `start` on, as `torch.optim.swa_utils.AveragedModel` keeps by
    default; before it, the states themselves."""

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
    it is the measurement."""

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
        >>> ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.99))  # doctest: +SKIP
        >>> # in the loop, after recorder.step(...): ema.update_parameters(model)
        >>> measurement = attrib.measure.averaged(
        ...     attrib.measure.log_prob(x, y), attrib.measure.Ema(0.99)
        ... )  # doctest: +SKIP
        >>> attrib.attribute(run, ema.module, measurement, loss=loss)  # doctest: +SKIP
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


def log_prob(x: Tensor, y: Tensor, names: Sequence[str] = ()) -> Measurement:
    """Log-probability of class (or tokens) `y` under softmax(model(x)), in nats.

    Args:
        x: (Q, ...), the model's input.
        y: (Q,) or (Q, T) int; over T the log-probabilities are summed, targets of -100 left out.
        names: what the queries are called in ledgers, figures and reports; by default their numbers.
    """
    return _measurement(_log_prob, x, y, "log_prob", "nats", names)


def loss(x: Tensor, y: Tensor, loss: Callable[..., Tensor] | None = None, names: Sequence[str] = ()) -> Measurement:
    """Loss of each test example, in the loss's units: cross-entropy (nats) or `loss(model, x, y) -> (Q,)`."""
    return _measurement(loss or _cross_entropy, x, y, "loss", "nats" if loss is None else "", names)


def logit(x: Tensor, y: Tensor, names: Sequence[str] = ()) -> Measurement:
    """The model's output for class `y`: (Q, ...), (Q,) or (Q, T) int -> (Q,), summed over T."""
    return _measurement(_logit, x, y, "logit", "", names)


def margin(x: Tensor, y: Tensor, names: Sequence[str] = ()) -> Measurement:
    """The output for class `y` minus the largest other output: positive where the prediction is right."""
    return _measurement(_margin, x, y, "margin", "", names)


def _measurement(
    rows: Callable[..., Tensor], x: Tensor, y: Tensor, name: str, units: str, names: Sequence[str]
) -> Measurement:
    for label, value in (("x", x), ("y", y)):
        if not isinstance(value, Tensor) or value.dim() == 0:
            got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise MeasurementError(
                f"{label} is not a batch: got {got}, expected a tensor of shape (Q, ...), at measure.{name}. "
                f"For one query, add a dimension: x[None]."
            )
    if len(x) != len(y):
        raise MeasurementError(
            f"x and y differ in length: got {len(x)} and {len(y)}, expected as many, at measure.{name}."
        )
    return Measurement(rows, (x, y), name, units, tuple(str(n) for n in names))


def _picked(outputs: Tensor, y: Tensor) -> Tensor:
    """(Q, ..., V), (Q, ...) -> (Q, ...): the entry of each target, 0 where it is ignored."""
    counted = y != IGNORED
    values = outputs.gather(-1, torch.where(counted, y, 0).unsqueeze(-1)).squeeze(-1)
    return torch.where(counted, values, torch.zeros_like(values))


def _total(values: Tensor) -> Tensor:
    return values.reshape(values.shape[0], -1).sum(1)


def _log_prob(model: Any, x: Tensor, y: Tensor) -> Tensor:
    return _total(_picked(F.log_softmax(model(x), -1), y))


def _cross_entropy(model: Any, x: Tensor, y: Tensor) -> Tensor:
    return -_log_prob(model, x, y)


def _logit(model: Any, x: Tensor, y: Tensor) -> Tensor:
    return _total(_picked(model(x), y))


def _margin(model: Any, x: Tensor, y: Tensor) -> Tensor:
    outputs = model(x)
    own = torch.zeros_like(outputs, dtype=torch.bool).scatter(-1, y.unsqueeze(-1), True)
    return _total(_picked(outputs, y) - outputs.masked_fill(own, -torch.inf).amax(-1))
