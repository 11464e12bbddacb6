"""The buffers that training changed, as a run holds them: their values at every state, by name, and as vectors.

    packed   values by name          -> an array per type, one value behind the other
    Buffers  at(state)               -> values by name, bit for bit
             vectors(first, stop)    -> (n + 1, E): those that are floating-point numbers, at the states first .. stop

A measurement depends on (theta, b): the vector that it is a function of is (theta, floating buffers), joined.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

import numpy as np
import torch
from torch import Tensor

from .constants import Constant, to_array, to_tensor
from .layout import Layout
from .store import Reader


def packed(values: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """torch's name of a type -> the values of that type, (entries,), in their order."""
    found: dict[str, list[np.ndarray]] = {}
    for t in values.values():
        found.setdefault(str(t.dtype).removeprefix("torch."), []).append(to_array(t).reshape(-1))
    return {dtype: np.concatenate(arrays) for dtype, arrays in found.items()}


@dataclass(frozen=True)
class Buffers:
    """reader: of the run. known: type and shape of each of those that move, in their order."""

    reader: Reader
    known: Mapping[str, Constant]

    @classmethod
    def of(cls, reader: Reader) -> "Buffers":
        """Those that the header names."""
        digests = reader.header["digests"]
        named = ((name, digests[name]) for name in reader.header.get("buffers", ()))
        return cls(reader, {name: Constant(dtype, tuple(shape), digest) for name, (dtype, shape, digest) in named})

    def __bool__(self) -> bool:
        return bool(self.known)

    @property
    def nbytes(self) -> int:
        """Of one state."""
        return sum(prod(c.shape) * getattr(torch, c.dtype).itemsize for c in self.known.values())

    @cached_property
    def floating(self) -> Layout:
        """Those that are floating-point numbers, one behind the other: (E,)."""
        names = [name for name, c in self.known.items() if getattr(torch, c.dtype).is_floating_point]
        return Layout(tuple(names), tuple(self.known[name].shape for name in names))

    @cached_property
    def dtype(self) -> torch.dtype:
        """One that holds all of the floating ones."""
        found = torch.float32
        for name in self.floating.names:
            found = torch.promote_types(found, getattr(torch, self.known[name].dtype))
        return found

    def at(self, state: int) -> dict[str, Tensor]:
        """Name -> value at a state, 0 .. T, bit for bit."""
        return {name: values[0] for name, values in self._states(state, state).items()}

    def vectors(self, first: int, stop: int) -> Tensor:
        """(stop - first + 1, E): the floating ones at the states first .. stop."""
        states = self._states(first, stop)
        flat = [states[name].reshape(stop - first + 1, -1).to(self.dtype) for name in self.floating.names]
        return torch.cat(flat, 1) if flat else torch.zeros(stop - first + 1, 0)

    def _states(self, first: int, stop: int) -> dict[str, Tensor]:
        """Name -> (n + 1, *shape)."""
        found: dict[str, Tensor] = {}
        for dtype in dict.fromkeys(c.dtype for c in self.known.values()):
            rows = [self.reader.read(f"initial/{dtype}")[None]] if first == 0 else []
            if stop > 0:
                rows.append(self.reader.read(f"buffers/{dtype}", slice(max(first - 1, 0), stop)))
            mine = {name: c.shape for name, c in self.known.items() if c.dtype == dtype}
            layout = Layout(tuple(mine), tuple(mine.values()))
            found |= layout.unflatten(to_tensor(np.concatenate(rows), dtype))
        return {name: found[name] for name in self.known}


def with_buffers(theta: Tensor, buffers: Tensor) -> Tensor:
    """(..., P), (..., E) -> (..., P + E), in a type that holds both."""
    if not buffers.shape[-1]:
        return theta
    dtype = torch.promote_types(theta.dtype, buffers.dtype)
    return torch.cat([theta.to(dtype), buffers.to(theta.device, dtype)], -1)


def at_owners(layout: Layout, buffers: Layout, each: np.ndarray) -> np.ndarray:
    """What stands at each buffer, (..., E tensors), at the parameter tensors that they stand with, (..., K)."""
    found = np.zeros((*each.shape[:-1], len(layout.names)))
    for n, owner in enumerate(owners(layout, buffers)):
        found[..., owner] += each[..., n]
    return found


def owners(layout: Layout, buffers: Layout) -> list[int]:
    """Of each buffer the number of the parameter tensor whose module is nearest: that shares most of its path, the first
    of several."""
    paths = [name.split(".")[:-1] for name in layout.names]

    def shared(one: Sequence[str], other: Sequence[str]) -> int:
        return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))

    found = []
    for name in buffers.names:
        path = name.split(".")[:-1]
        found.append(max(range(len(paths)), key=lambda k: (shared(path, paths[k]), -len(paths[k]), -k)))
    return found
