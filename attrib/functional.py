"""A function of a module, as a pure function of its trainable parameters.

The caller's module is never written to: parameters are handed in by name, buffers and frozen parameters are copies.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .errors import ChangedOutsideError
from .layout import Layout

PREFIX = "model."


class _Bound(nn.Module):
    """Holds the model so that `functional_call` reaches every use the function makes of it."""

    def __init__(self, model: nn.Module, function: Callable[..., Any]) -> None:
        super().__init__()
        self.model = model
        self.function = function

    def forward(self, *args: Any) -> Any:
        return self.function(self.model, *args)


def constants_of(model: nn.Module, layout: Layout) -> dict[str, Tensor]:
    """Everything in the model's state that training does not move: buffers and frozen parameters."""
    trained = set(layout.names)
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: t.detach() for name, t in named if name not in trained}


def cast(t: Any, dtype: torch.dtype) -> Any:
    """Floating tensors to `dtype`, all else as it is."""
    return t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t


class Functional:
    """`function(model, *args)` with the model's state given: `f(parameters, *args)`.

    Args:
        model: used in the mode it is in, left as it is.
        function: called with the model and `args`.
        layout: names of the trained parameters.
        dtype: type that buffers, frozen parameters and floating `args` are cast to.
    """

    def __init__(self, model: nn.Module, function: Callable[..., Any], layout: Layout, dtype: torch.dtype) -> None:
        self.layout, self.dtype = layout, dtype
        self._bound = _Bound(model, function)
        self._constants = {n: cast(t, dtype).clone() for n, t in constants_of(model, layout).items()}
        self._versions = {n: t._version for n, t in self._constants.items()}

    def __call__(self, parameters: Mapping[str, Tensor], *args: Any) -> Any:
        state = {PREFIX + n: t for n, t in (*self._constants.items(), *parameters.items())}
        batch = tuple(cast(a, self.dtype) for a in args)
        return torch.func.functional_call(self._bound, state, batch)

    def check_constants(self) -> None:
        """Raise ChangedOutsideError if a call wrote to a buffer: then it is not a function of the parameters."""
        for name, t in self._constants.items():
            if t._version != self._versions[name]:
                raise ChangedOutsideError(
                    f"a buffer changes when the model runs: got a write to {name!r}, expected none. Put the module "
                    f"that owns it into eval mode (running statistics couple examples and steps)."
                )


@contextmanager
def training_modes(model: nn.Module, training: Sequence[str]) -> Iterator[None]:
    """Put exactly the named modules into training mode, for the time of the context."""
    before = {module: module.training for module in model.modules()}
    names = set(training)
    for name, module in model.named_modules():
        module.training = name in names
    try:
        yield
    finally:
        for module, mode in before.items():
            module.training = mode


@contextmanager
def random_state(state: Tensor | None) -> Iterator[None]:
    """Run with torch's CPU generator at `state` and put it back afterwards; None leaves it alone."""
    if state is None:
        yield
        return
    before = torch.get_rng_state()
    torch.set_rng_state(state)
    try:
        yield
    finally:
        torch.set_rng_state(before)
