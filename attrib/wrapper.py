"""An optimizer round another: one more object that steps, with the other's parameter groups, state and defaults.

Hooks and profiling of a step are its own; the other's step, hooks and all, runs within, so torch's global hooks hear both.
The state is the other's: a hook round `state_dict` or `load_state_dict` is kept there, in one row with the other's own, and
is handed the wrapper.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from .errors import AttribError


def _shared(name: str) -> Any:
    """An attribute of the wrapped optimizer, whatever object it is by now. What torch's constructor sets is let go."""

    def get(wrapper: "Wrapper") -> Any:
        return getattr(wrapper.optimizer, name)

    def put(wrapper: "Wrapper", value: Any) -> None:
        if wrapper._constructed:
            raise AttribError(
                f"{name} belongs to the wrapped optimizer: got another one, expected it to stay. Set it on that optimizer, "
                f"before the first step."
            )

    return property(get, put)


class Wrapper(torch.optim.Optimizer):
    """The parameter groups, state and defaults of `optimizer`, the very objects; its parameters are fixed."""

    _constructed = False

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        super().__init__(optimizer.param_groups, optimizer.defaults)
        self._constructed = True

    param_groups = _shared("param_groups")
    state = _shared("state")
    defaults = _shared("defaults")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused, but for the groups that are there already: those are what torch's constructor adds."""
        if not any(param_group is group for group in self.param_groups):
            raise AttribError(
                "a recorded run has fixed parameters: got add_param_group, expected all groups before attrib.record. "
                "Give the optimizer every parameter first; requires_grad_(False) keeps some still until they are to move."
            )

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state_dict)

    def register_state_dict_pre_hook(self, hook: Callable[..., Any], prepend: bool = False) -> RemovableHandle:
        return self.optimizer.register_state_dict_pre_hook(self._handed(hook), prepend)

    def register_state_dict_post_hook(self, hook: Callable[..., Any], prepend: bool = False) -> RemovableHandle:
        return self.optimizer.register_state_dict_post_hook(self._handed(hook), prepend)

    def register_load_state_dict_pre_hook(self, hook: Callable[..., Any], prepend: bool = False) -> RemovableHandle:
        return self.optimizer.register_load_state_dict_pre_hook(self._handed(hook), prepend)

    def register_load_state_dict_post_hook(self, hook: Callable[..., Any], prepend: bool = False) -> RemovableHandle:
        return self.optimizer.register_load_state_dict_post_hook(self._handed(hook), prepend)

    def _handed(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        """The hook with the wrapper for its optimizer."""
        return lambda optimizer, *rest: hook(self, *rest)
