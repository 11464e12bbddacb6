"""Several optimizers over disjoint parameters, as one."""

from collections.abc import Callable, Iterator, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import AttribError


class States(MutableMapping[Tensor, dict[str, Any]]):
    """The state of every parameter, where its optimizer keeps it."""

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        self._optimizers = optimizers
        self._owners = {id(p): o for o in optimizers for group in o.param_groups for p in group["params"]}

    def __getitem__(self, p: Tensor) -> dict[str, Any]:
        return self._owners[id(p)].state[p]

    def __setitem__(self, p: Tensor, state: dict[str, Any]) -> None:
        self._owners[id(p)].state[p] = state

    def __delitem__(self, p: Tensor) -> None:
        del self._owners[id(p)].state[p]

    def __contains__(self, p: object) -> bool:
        return id(p) in self._owners and p in self._owners[id(p)].state  # asked for, an optimizer would make one

    def get(self, p: Tensor, default: Any = None) -> Any:
        return self[p] if p in self else default  # noqa: SIM401

    def pop(self, p: Tensor, default: Any = None) -> Any:
        return self._owners[id(p)].state.pop(p, default)

    def __iter__(self) -> Iterator[Tensor]:
        return (p for optimizer in self._optimizers for p in optimizer.state)

    def __len__(self) -> int:
        return sum(len(optimizer.state) for optimizer in self._optimizers)


class Together(torch.optim.Optimizer):
    """Optimizers that step one after the other, in order. Their groups, in that order, and their states are its own; a state
    dict is the list of theirs. A scheduler or a hook belongs to one of them, or to this for all.

    Args:
        optimizers: over parameters of which no two share one.

    Raises:
        ValueError: there is none, or two that move the same parameter.

    Example:
        >>> muon = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))])
        >>> rest = torch.optim.AdamW([torch.nn.Parameter(torch.ones(3))])
        >>> len(Together([muon, rest]).param_groups)
        2
    """

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        _check(optimizers)
        self.optimizers = tuple(optimizers)
        self._states = States(self.optimizers)
        super().__init__(self.param_groups, {})

    def _groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def _let_go(self, value: Any) -> None:
        """What torch's constructor sets."""

    param_groups: Any = property(_groups, _let_go)
    state: Any = property(lambda self: self._states, _let_go)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused, but for the groups that are there already: those are what torch's constructor adds."""
        if not any(param_group is group for group in self.param_groups):
            raise AttribError(
                "several optimizers have no group of their own: got add_param_group, expected one of theirs. Add it to the "
                "optimizer that is to move it, before attrib.record."
            )

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Of each of them; what the closure returned."""
        value = None
        if closure is not None:
            with torch.enable_grad():
                value = closure()
        for optimizer in self.optimizers:
            optimizer.step()
        return value

    def state_dict(self) -> Any:
        return [optimizer.state_dict() for optimizer in self.optimizers]

    def load_state_dict(self, state_dict: Any) -> None:
        if not isinstance(state_dict, list) or len(state_dict) != len(self.optimizers):
            count = len(state_dict) if isinstance(state_dict, list) else type(state_dict).__name__
            raise ValueError(
                f"the state is not theirs: got {count}, expected a list of {len(self.optimizers)} state dicts."
            )
        for optimizer, state in zip(self.optimizers, state_dict, strict=True):
            optimizer.load_state_dict(state)

    def _no_hook(self, hook: Any, prepend: bool = False) -> Any:
        raise AttribError(
            "a state dict of several optimizers is the list of theirs: got a hook round it, expected one round one of them. "
            "Register it at that optimizer."
        )

    register_state_dict_pre_hook = register_state_dict_post_hook = _no_hook
    register_load_state_dict_pre_hook = register_load_state_dict_post_hook = _no_hook


def members(optimizer: torch.optim.Optimizer) -> tuple[torch.optim.Optimizer, ...]:
    """The optimizers that step where it does: itself, or those that are together."""
    return optimizer.optimizers if isinstance(optimizer, Together) else (optimizer,)


def together(optimizers: torch.optim.Optimizer | Sequence[torch.optim.Optimizer]) -> torch.optim.Optimizer:
    """An optimizer as it is; several of them as one."""
    if isinstance(optimizers, torch.optim.Optimizer):
        return optimizers
    optimizers = list(optimizers)
    alone = len(optimizers) == 1 and isinstance(optimizers[0], torch.optim.Optimizer)
    return optimizers[0] if alone else Together(optimizers)


def _check(optimizers: Sequence[Any]) -> None:
    if not optimizers:
        raise ValueError("there is no optimizer: got an empty list, expected one or several. Pass those of the loop.")
    owners: dict[int, int] = {}
    for number, optimizer in enumerate(optimizers):
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise ValueError(
                f"that is no optimizer: got {type(optimizer).__name__}, expected one of torch's, at number {number}."
            )
        for group in optimizer.param_groups:
            for p in group["params"]:
                if owners.setdefault(id(p), number) != number:
                    raise ValueError(
                        f"two optimizers move the same parameter: got one of shape {tuple(p.shape)} in number "
                        f"{owners[id(p)]} ({type(optimizers[owners[id(p)]]).__name__}) and number {number} "
                        f"({type(optimizer).__name__}), expected it in one. Take it out of the other."
                    )
