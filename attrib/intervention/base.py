"""What an intervention may do, and when: hooks, of which one kind overrides one or two. The replay knows no kind.

    once       check, begin, sources, captures, describe
    each step  options, batch, penalty, loss, gradient

In this order; of several interventions each hook is called in the order in which they are given.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from ..checks.intake import CAPTURES
from ..errors import ReplayError
from ..layout import match_names
from ..run import Run

Groups = str | Sequence[str]  # parameter names or patterns
IndexedInputs = tuple[np.ndarray, tuple[Any, ...]]  # ids (B,), numbers or strings; what the loss takes after the model


@dataclass(frozen=True)
class Intervention:
    """Base of all: frozen fields, and hooks that do nothing.

    Two of the hooks are None where a kind has none, since a record holds a penalty, or weights, at every step or at none:

    penalty: `penalty(step, model)`, a scalar to be added to the reduced loss of a step, or None; it draws no random numbers.
    loss: `loss(step, losses, ids)`, the losses (B,) of a step's examples changed: any differentiable function of them; ids
    (B,) is an array. The replay is recorded with `weighted(loss)`: the weight of an example, d sum(changed) / d its
    loss, is the last tensor of every batch.

    What an intervention cannot do to a run `attrib.replay` refuses, with a ReplayError, before it trains.

    Example:
        >>> class Halved(attrib.intervention.Intervention):
        ...     def begin(self, run, model, optimizer):
        ...         for parameter in model.parameters():
        ...             parameter.data /= 2
        >>> again = attrib.replay(run, 6, Halved(), model=model, loss=loss, store="again.zarr")
        >>> torch.equal(again.vector(0), run.vector(6) / 2)
        True
    """

    penalty: ClassVar[Callable[[Any, int, nn.Module], Tensor | None] | None] = None
    loss: ClassVar[Callable[[Any, int, Tensor, np.ndarray], Tensor] | None] = None

    def check(self, run: Run, start: int, until: int) -> None:
        """Raise ReplayError where this cannot be done to the run; called before anything is."""

    def begin(self, run: Run, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Change the state that the replay starts from."""

    def sources(self) -> tuple[Run, ...]:
        """The runs that it reads, which the replay must not write over: those among its fields."""
        return tuple(value for field in fields(self) if isinstance(value := getattr(self, field.name), Run))

    def captures(self) -> tuple[str, ...]:
        """What a replay with it can be recorded as."""
        return CAPTURES

    def options(self, run: Run, step: int, optimizer: torch.optim.Optimizer) -> None:
        """Change the optimizer's options, set as recorded; a parameter group per tensor of the layout."""

    def batch(self, step: int, batch: IndexedInputs) -> IndexedInputs:
        """A batch of a step."""
        return batch

    def gradient(self, run: Run, step: int, model: nn.Module) -> None:
        """After the backward pass, before the optimizer's step."""

    def describe(self) -> dict[str, Any]:
        """For the header of the replay, JSON."""
        return {"kind": type(self).__name__, **{f.name: _plain(getattr(self, f.name)) for f in fields(self)}}


class Window(Intervention):
    """An intervention during the steps of a slice of the run's; None for all. Each kind has `steps` among its fields.

    Example:
        >>> from dataclasses import dataclass
        >>> @dataclass(frozen=True)
        ... class Slower(attrib.intervention.Window):
        ...     steps: slice | None = None
        ...
        ...     def options(self, run, step, optimizer):
        ...         for group in optimizer.param_groups if self.active(step) else ():
        ...             group["lr"] /= 2
        >>> again = attrib.replay(run, 0, Slower(slice(6, 9)), model=model, loss=loss, store="again.zarr")
        >>> again.options["lr"]
        [0.025, 0.05]
    """

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
