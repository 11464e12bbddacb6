"""What an intervention may do, and when: nothing by default. One kind overrides one or two of these."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import ReplayError
from ..layout import match_names
from ..run import Run

Groups = str | Sequence[str]  # parameter names or patterns
Batch = tuple[np.ndarray, tuple[Tensor, ...]]  # index (B,), inputs of B rows each


@dataclass(frozen=True)
class Intervention:
    """Base of all: frozen fields, and hooks of the replay in the order in which they are called."""

    def check(self, run: Run, start: int, until: int) -> None:
        """Raise ReplayError where this cannot be done to the run; called before anything is."""

    def begin(self, run: Run, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Change the state that the replay starts from."""

    def batch(self, step: int, batch: Batch) -> Batch:
        """The batch of a step."""
        return batch

    def options(self, run: Run, step: int, optimizer: torch.optim.Optimizer) -> None:
        """Change the optimizer's options, set as recorded; a parameter group per tensor of the layout."""

    def penalty(self, step: int, model: nn.Module) -> Tensor | None:
        """A scalar to be added to the reduced loss."""
        return None

    def gradient(self, run: Run, step: int, model: nn.Module) -> None:
        """After the backward pass, before the optimizer's step."""

    def describe(self) -> dict[str, Any]:
        """For the header of the replay, JSON."""
        return {"kind": type(self).__name__, **{f.name: _plain(getattr(self, f.name)) for f in fields(self)}}


class Window(Intervention):
    """An intervention during the steps of a slice of the run's; None for all. Each kind has `steps` among its fields."""

    steps: slice | None

    def active(self, step: int) -> bool:
        steps = self.steps
        return steps is None or ((steps.start or 0) <= step and (steps.stop is None or step < steps.stop))

    def check(self, run: Run, start: int, until: int) -> None:
        steps = self.steps
        if steps is None:
            return
        ends = (steps.start or 0, until if steps.stop is None else steps.stop)
        if steps.step not in (None, 1) or min(ends) < 0 or not max(ends[0], start) < min(ends[1], until):
            raise ReplayError(
                f"the window is not one of the replay: got {steps}, expected slice(a, b) that overlaps the steps {start} to "
                f"{until}, at {type(self).__name__}. Windows are counted in the steps of the run."
            )


def chosen(run: Run, groups: Groups, where: str) -> list[str]:
    """Names of the run's parameters that the patterns choose.

    Raises:
        ReplayError: a pattern names none; the nearest names are offered.
    """
    try:
        found = match_names(run.layout.names, groups, where)
    except ValueError as error:
        raise ReplayError(str(error)) from None
    if not found:
        raise ReplayError(f"nothing is named: got {groups!r}, expected names or patterns of parameters, at {where}.")
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, Run):
        return str(value.reader.target)
    if isinstance(value, slice):
        return [_plain(value.start), _plain(value.stop)]
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | range):
        return [_plain(v) for v in value]
    if isinstance(value, np.ndarray | np.generic | Tensor):
        return value.tolist()
    return value if value is None or isinstance(value, str | int | float) else getattr(value, "__name__", repr(value))
