"""Measurements: what is to be explained. Any callable `model -> (Q,)` is one; these are the usual ones, over a batch.

A `Measurement` made here knows its batch, one row per query, so that the queries are run side by side. Units: nats for
`log_prob` and `loss`, the model's own for `logit` and `margin`.

    measurement = attrib.measure.log_prob(x_test, y_test)
    measurement(model)                                     # (Q,)
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

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
