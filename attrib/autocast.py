"""torch's autocast as a loop uses it: which one, where, and how a pass is put under it again.

    around = "loss"    the whole loss is computed under it
             "model"   the calls of the model are, the rest of the loss is not
             "inside"  the model or the loss enters it by itself, or casts by hand: nothing is entered from here

It rounds what matrix products and convolutions read and return, forwards and backwards. Numbers in double precision it
leaves alone. Everything that attrib computes by itself is computed without it, whatever surrounds the call.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

P = ParamSpec("P")
R = TypeVar("R")

DEVICES = ("cpu", "cuda", "xpu")


@dataclass(frozen=True)
class Autocast:
    """device: the kind of device it is for. cached: whether a weight is rounded once for all its uses, so that their
    gradients meet in few bits."""

    device: str
    dtype: torch.dtype
    around: str = "loss"
    cached: bool = True

    def entered(self) -> AbstractContextManager[Any]:
        """Within it autocast is on."""
        return torch.autocast(self.device, self.dtype, cache_enabled=self.cached)

    def rounds(self, dtype: torch.dtype) -> bool:
        """Whether passes in this type are rounded by it."""
        return self.around == "inside" or dtype != torch.float64

    def facts(self) -> dict[str, Any]:
        """For the header of a run, JSON."""
        dtype = str(self.dtype).removeprefix("torch.")
        return {"device": self.device, "dtype": dtype, "around": self.around, "cached": self.cached}


def from_facts(facts: Mapping[str, Any] | None) -> Autocast | None:
    """What `facts` gave, or None."""
    return None if facts is None else Autocast(**{**facts, "dtype": getattr(torch, facts["dtype"])})


def current(device: str) -> Autocast | None:
    """The one that is on now."""
    if not torch.is_autocast_enabled(device):
        return None
    return Autocast(device, torch.get_autocast_dtype(device), cached=torch.is_autocast_cache_enabled())


def switched_off() -> AbstractContextManager[Any]:
    """Within it no autocast is on."""
    on = [device for device in DEVICES if torch.is_autocast_enabled(device)]
    return _without(on) if on else nullcontext()


@contextmanager
def _without(devices: Sequence[str]) -> Iterator[None]:
    with ExitStack() as stack:
        for device in devices:
            stack.enter_context(torch.autocast(device, enabled=False))
        yield


def without_autocast(function: Callable[P, R]) -> Callable[P, R]:
    """The function without autocast, whether or not it is called under one."""

    @wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> R:
        with switched_off():
            return function(*args, **kwargs)

    return called


@contextmanager
def under(autocast: Autocast | None, model: nn.Module) -> Iterator[None]:
    """Within it passes are under the autocast of the loop, where the loop has it, and under no other."""
    with switched_off():
        if autocast is None or autocast.around == "inside":
            yield
        elif autocast.around == "loss":
            with autocast.entered():
                yield
        else:
            with _around(autocast, model):
                yield


@contextmanager
def _around(autocast: Autocast, model: nn.Module) -> Iterator[None]:
    """Around every call of the model, whatever calls it."""
    calls: list[AbstractContextManager[Any]] = []

    def enter(module: nn.Module, args: Any) -> None:
        calls.append(autocast.entered())
        calls[-1].__enter__()

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        calls.pop().__exit__(None, None, None)

    hooks: list[RemovableHandle] = [model.register_forward_pre_hook(enter, prepend=True)]
    hooks.append(model.register_forward_hook(leave, always_call=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def candidates(heard: tuple[Autocast | None, ...]) -> list[Autocast | None]:
    """What the loop may have around its loss, from what was on when the model was called, the likelier first; None: nothing,
    the loss enters it by itself."""
    on = [a for a in heard if a is not None]
    return [*(c for a in on for c in (a, replace(a, around="model"))), None]
