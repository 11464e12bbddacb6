"""Options of a torch optimizer as the numbers that are stored of them, and back: said once, for both directions."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Numbers:
    """One option of a param group.

    key: in the group. names: of its numbers, in the store. write: value of the option -> numbers; read: the inverse.
    """

    key: str
    names: tuple[str, ...]
    write: Callable[[Any], Sequence[float]]
    read: Callable[[Sequence[float]], Any]

    def of(self, group: Mapping[str, Any]) -> tuple[float, ...]:
        """Those of a group; an option that this version of torch does not have is None."""
        return tuple(float(value) for value in self.write(group.get(self.key)))

    def option(self, hyper: Mapping[str, float]) -> Any:
        """The option again, from numbers by name."""
        return self.read([hyper[name] for name in self.names])


def number(key: str) -> Numbers:
    return Numbers(key, (key,), lambda value: (value,), lambda n: n[0])


def several(key: str, *names: str) -> Numbers:
    """A tuple of numbers, each with a name of its own."""
    return Numbers(key, names, tuple, tuple)


def flag(key: str, name: str | None = None) -> Numbers:
    """0 or 1; 0 where there is none."""
    return Numbers(key, (name or key,), lambda value: (bool(value),), lambda n: bool(n[0]))


def choice(key: str) -> Numbers:
    """0 or 1, or -1 where it is None and left to torch: which of its implementations runs."""
    return Numbers(
        key, (key,), lambda value: (-1.0 if value is None else value,), lambda n: None if n[0] < 0 else bool(n[0])
    )
