"""What the model returns where a loss calls it, cut off from what the loss makes of it."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..functional import uncompiled


class Output(NamedTuple):
    """A tensor that a call returned, and the leaf that the loss was given for it."""

    made: Tensor
    leaf: Tensor


@contextmanager
def cut_off(model: nn.Module) -> Iterator[list[list[Output]]]:
    """Within it every call of the model returns leaves in the place of tensors that its parameters reach, call by call."""
    found: list[list[Output]] = []

    def cut(t: Tensor) -> Tensor:
        if not (t.requires_grad and t.is_floating_point()):
            return t
        found[-1].append(Output(t, t.detach().requires_grad_()))
        return found[-1][-1].leaf

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        found.append([])
        return replaced(output, cut)

    handle = uncompiled(model).register_forward_hook(hook)
    try:
        yield found
    finally:
        handle.remove()


def replaced(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """The same structure of dicts, lists, tuples and objects with every tensor replaced; what holds none stays itself."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        return _with_items(value, {key: replaced(v, function) for key, v in value.items()})
    if isinstance(value, list | tuple):
        parts = [replaced(v, function) for v in value]
        if all(a is b for a, b in zip(parts, value, strict=True)):
            return value
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if hasattr(value, "__dict__") and not isinstance(value, type | nn.Module | torch.dtype):
        return _with_attributes(value, {name: replaced(v, function) for name, v in vars(value).items()})
    return value


def _with_items(value: Any, items: dict[Any, Any]) -> Any:
    if all(items[key] is value[key] for key in items):
        return value
    other = copy(value)
    for key, item in items.items():
        other[key] = item
    return other


def _with_attributes(value: Any, attributes: dict[str, Any]) -> Any:
    if all(attributes[name] is v for name, v in vars(value).items()):
        return value
    other = copy(value)
    for name, attribute in attributes.items():
        object.__setattr__(other, name, attribute)  # frozen dataclasses too
    return other
