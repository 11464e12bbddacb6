"""The logits of a model, in whatever its call returns, and sums of their entries."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import MeasurementError

IGNORED = -100  # a target that counts for nothing, as in torch's cross_entropy


def logits_of(output: Any) -> Tensor:
    """What a model returned -> its logits: a tensor as it is, `.logits` of an object, `["logits"]` of a dict, the first of a
    tuple.

    Raises:
        MeasurementError: there are none.

    Example:
        >>> attrib.measure.logits_of({"loss": None, "logits": torch.zeros(2, 3)}).shape
        torch.Size([2, 3])
    """
    found = output
    if isinstance(output, Mapping):
        found = output.get("logits")
    elif isinstance(output, tuple | list):
        found = output[0] if output else None
    elif not isinstance(output, Tensor):
        found = getattr(output, "logits", None)
    if isinstance(found, Tensor):
        return found
    held = f" with {', '.join(map(str, output))}" if isinstance(output, Mapping) else ""
    raise MeasurementError(
        f"the model's output holds no logits: got {type(output).__name__}{held}, expected a tensor, .logits, ['logits'] or "
        f"a tuple with them first, at attrib.measure. Measure a function of your own, model -> (Q,)."
    )


def picked(outputs: Tensor, y: Tensor) -> Tensor:
    """(Q, ..., V), (Q, ...) -> (Q, ...): the entry of each target, 0 where it is ignored."""
    counted = y != IGNORED
    values = outputs.gather(-1, torch.where(counted, y, 0).unsqueeze(-1)).squeeze(-1)
    return torch.where(counted, values, torch.zeros_like(values))


def total(values: Tensor) -> Tensor:
    """(Q, ...) -> (Q,)."""
    return values.reshape(values.shape[0], -1).sum(1)
