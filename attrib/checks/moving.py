"""The buffers of a model that training changes, such as the running statistics of batch norm: found, not asked for.

b_0 is what they held when they were first seen, b_{s+1} what they hold after step s; whatever happens to them in between
belongs to the change of the next step.
"""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ChangedOutsideError


class MovingBuffers:
    """names: of those that moved by the first step, in the model's order; None before it. before: their values when the step
    to come began, copies; until `found` those of all buffers."""

    def __init__(self, model: nn.Module) -> None:
        places = {id(t): (m._buffers, key) for m in model.modules() for key, t in m._buffers.items() if t is not None}
        self._places: dict[str, tuple[Mapping[str, Any], str]] = {n: places[id(t)] for n, t in model.named_buffers()}
        self.names: tuple[str, ...] | None = None
        self.before = self._now(self._places)

    def __contains__(self, name: str) -> bool:
        return name in (self.names or ())

    def found(self, names: Collection[str]) -> None:
        """These, and no others, move."""
        self.names = tuple(name for name in self._places if name in names)
        self.before = {name: self.before[name] for name in self.names}

    def stepped(self) -> None:
        """A step was made."""
        if self.names:
            self.before = self._now(self.names)

    def put(self, values: Mapping[str, Tensor]) -> None:
        """Go on from these, and no others."""
        for name, value in values.items():
            holder, key = self._places[name]
            holder[key].detach().copy_(value)
        self.found(values)
        self.stepped()

    def check(self, step: int) -> None:
        """Raise ChangedOutsideError where one is no tensor any more, or of another shape or type."""
        for name in self.names or ():
            holder, key = self._places[name]
            held, known = holder.get(key), self.before[name]
            if not isinstance(held, Tensor) or (held.shape, held.dtype) != (known.shape, known.dtype):
                got = f"{held.dtype} of shape {tuple(held.shape)}" if isinstance(held, Tensor) else type(held).__name__
                raise ChangedOutsideError(
                    f"a buffer became another kind of tensor: got {got}, expected {known.dtype} of shape "
                    f"{tuple(known.shape)}, at {name!r}, step {step}. Keep it outside of the model's buffers. The step was "
                    f"refused."
                )

    def _now(self, names: Collection[str]) -> dict[str, Tensor]:
        with torch.no_grad():
            places = ((name, *self._places[name]) for name in names)
            return {name: holder[key].detach().clone() for name, holder, key in places}
