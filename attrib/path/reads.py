"""What Python reads of tensors while a measurement is traced: `if mask.all(): mask = None`, lengths, the shape of `x[mask]`.

A graph holds for inputs of which the same is read. So what was read is an output of the graph, beside the measurement's.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten


@dataclass(frozen=True)
class Reads:
    """values: tensors that Python read. shapes: those whose values decided the shape of another."""

    values: list[Tensor] = field(default_factory=list)
    shapes: list[Tensor] = field(default_factory=list)


class _Operations(TorchDispatchMode):
    """Notes what operations read."""

    def __init__(self) -> None:
        super().__init__()
        self.reads = Reads()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.data_dependent_output in func.tags:
            note(self.reads.values, args)
            with disable_proxy_modes_tracing():
                return func(*args, **(kwargs or {}))
        if torch.Tag.dynamic_output_shape in func.tags:
            note(self.reads.shapes, [t for t in tree_leaves(args[1:]) if _chooses(t)] if func in BY_MASK else args)
        return func(*args, **(kwargs or {}))


def note(tensors: list[Tensor], args: Any) -> None:
    """Add those among the arguments that are not there yet."""
    known = {id(t) for t in tensors}
    tensors += [t for t in tree_leaves(args) if isinstance(t, Tensor) and id(t) not in known]


BY_MASK = (aten.index.Tensor, aten.masked_select.default)  # of their first operand no value decides a shape


def _chooses(index: Any) -> bool:
    """Whether the index is a mask, whose values decide how many there are."""
    return isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)


class _Memory(TorchFunctionMode):
    """Notes what is read without an operation, from where a tensor lies. One that is functionalised lies elsewhere. What
    asks for gradients on the way, as Hugging Face does for checkpointing, is let go: it moves no value."""

    def __init__(self, operations: _Operations) -> None:
        super().__init__()
        self._operations = operations

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.requires_grad_:
            return args[0]
        if func in (Tensor.tolist, Tensor.numpy, Tensor.__array__) and torch._is_functional_tensor(args[0]):
            torch._sync(args[0])
            value = torch._from_functional_tensor(args[0])
            note(self._operations.reads.values, [value])
            with disable_proxy_modes_tracing():
                return func(value, *args[1:], **(kwargs or {}))
        return func(*args, **(kwargs or {}))


@contextmanager
def reads() -> Iterator[Reads]:
    """Within it values are read as they are, though a graph is traced; yields the tensors that they were read of."""
    with _Operations() as operations, _Memory(operations):
        yield operations.reads
