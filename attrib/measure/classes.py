"""Measurements of classifiers: of the outputs of a model for classes, or for tokens where it has one output per position."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import MeasurementError
from .base import Measurement
from .outputs import logits_of, picked, total

Inputs = Tensor | Mapping[str, Tensor]


def log_prob(x: Inputs, y: Tensor, names: Sequence[str] = ()) -> Measurement:
    """Log-probability of class (or tokens) `y` under softmax(model(x)), in nats.

    Args:
        x: (Q, ...), the model's input; or several by the names that the model's call has for them, of Q rows each:
            `{"input_ids": ..., "attention_mask": ...}`, as tokenizers give them, goes in as `model(**x)`.
        y: (Q,) or (Q, T) int; over T the log-probabilities are summed, targets of -100 left out.
        names: what the queries are called in ledgers, figures and reports; by default their numbers.

    Raises:
        MeasurementError: not a batch, or of different lengths.

    Example:
        >>> attrib.measure.log_prob(x_test, y_test, names=["first", "second"])(model).shape
        torch.Size([2])
    """
    return _measurement(_log_prob, x, y, "log_prob", "nats", names)


def loss(x: Inputs, y: Tensor, loss: Callable[..., Tensor] | None = None, names: Sequence[str] = ()) -> Measurement:
    """Loss of each test example, (Q,), in the loss's units: cross-entropy, in nats and summed over T, or one of one's own.

    Args:
        x, y, names: as for `log_prob`.
        loss: `loss(model, x, y) -> (Q,)`, unreduced; None for cross-entropy.

    Raises:
        MeasurementError: not a batch, or of different lengths.

    Example:
        >>> losses = attrib.measure.loss(x_test, y_test, loss)
        >>> torch.equal(losses(model), loss(model, x_test, y_test))
        True
    """
    if loss is not None:
        return _measurement(loss, x, y, "loss", "", names)
    return _measurement(_cross_entropy, x, y, "loss", "nats", names)


def logit(x: Inputs, y: Tensor, names: Sequence[str] = ()) -> Measurement:
    """The model's output for class `y`, (Q,), in its own units; over T they are summed.

    Args:
        x, y, names: as for `log_prob`.

    Raises:
        MeasurementError: not a batch, or of different lengths.

    Example:
        >>> torch.equal(attrib.measure.logit(x_test, y_test)(model), model(x_test)[[0, 1], y_test])
        True
    """
    return _measurement(_logit, x, y, "logit", "", names)


def margin(x: Inputs, y: Tensor, names: Sequence[str] = ()) -> Measurement:
    """The output for class `y` minus the largest other one, (Q,), in their units: positive where the prediction is right;
    over T they are summed.

    Args:
        x, y, names: as for `log_prob`.

    Raises:
        MeasurementError: not a batch, or of different lengths.

    Example:
        >>> margin = attrib.measure.margin(x_test, y_test)
        >>> torch.equal(margin(model) > 0, model(x_test).argmax(1) == y_test)
        True
    """
    return _measurement(_margin, x, y, "margin", "", names)


def _measurement(
    rows: Callable[..., Tensor], x: Inputs, y: Tensor, name: str, units: str, names: Sequence[str]
) -> Measurement:
    inputs = dict(x) if isinstance(x, Mapping) else {"x": x}
    for label, value in (*inputs.items(), ("y", y)):
        if not isinstance(value, Tensor) or value.dim() == 0:
            got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise MeasurementError(
                f"{label} is not a batch: got {got}, expected a tensor of shape (Q, ...), at measure.{name}. "
                f"For one query, add a dimension: {label}[None]."
            )
    for label, value in inputs.items():
        if len(value) != len(y):
            raise MeasurementError(
                f"{label} and y differ in length: got {len(value)} and {len(y)}, expected as many, at measure.{name}."
            )
    batch = (*inputs.values(), y)
    called = partial(_by_name, rows, tuple(inputs)) if isinstance(x, Mapping) else rows
    return Measurement(called, batch, name, units, tuple(str(n) for n in names))


def _by_name(rows: Callable[..., Tensor], keys: Sequence[str], model: Any, *batch: Tensor) -> Tensor:
    """The rows, of inputs that the model takes by name; they come one by one, y last."""
    return rows(model, dict(zip(keys, batch[:-1], strict=True)), batch[-1])


def _logits(model: Any, x: Inputs) -> Tensor:
    return logits_of(model(**x) if isinstance(x, Mapping) else model(x))


def _log_prob(model: Any, x: Inputs, y: Tensor) -> Tensor:
    return total(picked(F.log_softmax(_logits(model, x), -1), y))


def _cross_entropy(model: Any, x: Inputs, y: Tensor) -> Tensor:
    return -_log_prob(model, x, y)


def _logit(model: Any, x: Inputs, y: Tensor) -> Tensor:
    return total(picked(_logits(model, x), y))


def _margin(model: Any, x: Inputs, y: Tensor) -> Tensor:
    outputs = _logits(model, x)
    own = torch.zeros_like(outputs, dtype=torch.bool).scatter(-1, y.unsqueeze(-1), True)
    return total(picked(outputs, y) - outputs.masked_fill(own, -torch.inf).amax(-1))
