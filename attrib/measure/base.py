"""A measurement over a batch: one row per query, so that the queries are run side by side."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..errors import MeasurementError


@dataclass(frozen=True)
class Measurement:
    """One number per row of a batch: query q depends on the model and on row q alone.

    Args:
        rows: (model, *batch) -> (Q,).
        batch: tensors with Q rows.
        name, units: for labels.
        names: what the queries are called, one each, or nothing.

    Raises:
        MeasurementError: names for more or fewer than Q.

    Example:
        >>> def entropy(model, x):
        ...     logs = model(x).log_softmax(1)
        ...     return -(logs.exp() * logs).sum(1)
        >>> measurement = attrib.measure.Measurement(entropy, (x_test,), "entropy", "nats")
        >>> measurement(model).shape, measurement.select([1])(model).shape
        (torch.Size([2]), torch.Size([1]))
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
