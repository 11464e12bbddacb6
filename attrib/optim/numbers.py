"""Options of a torch optimizer as the numbers that are stored of them, and back: said once, for both directions.

An option may be a tensor of one element, with which torch computes in the tensor's type rather than in Python's. Its type
is stored beside its value, so that the option that comes back computes as the one that was recorded.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

TYPE = "_type"  # ends the name of such a number
TYPES = (None, torch.float16, torch.bfloat16, torch.float32, torch.float64)  # of an option, stored as its place here


@dataclass(frozen=True)
class Numbers:
    """One option of a param group.

    key: in the group. names: of its numbers, in the store; where types are stored, those of the types come last. write:
    value of the option -> numbers; read: the inverse, also from numbers without types.
    """

    key: str
    names: tuple[str, ...]
    write: Callable[[Any], Sequence[float]]
    read: Callable[[Sequence[float]], Any]

    def of(self, group: Mapping[str, Any]) -> tuple[float, ...]:
        """Those of a group; an option that this version of torch does not have is None."""
        return tuple(float(value) for value, _ in zip(self.write(group.get(self.key)), self.names, strict=False))

    def option(self, hyper: Mapping[str, float]) -> Any:
        """The option again, from numbers by name."""
        return self.read([hyper[name] for name in self.names])


def number(key: str) -> Numbers:
    return Numbers(key, (key, key + TYPE), lambda value: (value, _place(value)), lambda n: _typed(*n))


def several(key: str, *names: str) -> Numbers:
    """A tuple of numbers, each with a name of its own."""

    def read(numbers: Sequence[float]) -> tuple[Any, ...]:
        values, places = numbers[: len(names)], numbers[len(names) :] or [0.0] * len(names)
        return tuple(map(_typed, values, places))

    named = (*names, *(name + TYPE for name in names))
    return Numbers(key, named, lambda values: (*values, *map(_place, values)), read)


def flag(key: str, name: str | None = None) -> Numbers:
    """0 or 1; 0 where there is none."""
    return Numbers(key, (name or key,), lambda value: (bool(value),), lambda n: bool(n[0]))


def choice(key: str) -> Numbers:
    """0 or 1, or -1 where it is None and left to torch: which of its implementations runs."""
    return Numbers(
        key, (key,), lambda value: (-1.0 if value is None else value,), lambda n: None if n[0] < 0 else bool(n[0])
    )


def count(key: str) -> Numbers:
    """A whole number."""
    return Numbers(key, (key,), lambda value: (value,), lambda n: int(n[0]))


def word(key: str, words: Sequence[str | None]) -> Numbers:
    """One of a few words, stored as its place among them."""
    return Numbers(key, (key,), lambda value: (words.index(value),), lambda n: words[int(n[0])])


def _place(value: Any) -> int:
    return TYPES.index(value.dtype) if isinstance(value, Tensor) else 0


def _typed(value: float, place: float = 0.0) -> Any:
    """A number, or the tensor that it was."""
    dtype = TYPES[int(place)]
    return value if dtype is None else torch.tensor(value, dtype=dtype)
