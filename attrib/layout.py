"""Where each parameter tensor sits in the flat vector `P`, and which tensors make a group.

Tensors of one optimizer param group lie next to each other, in the optimizer's own order, so that an update rule
works on whole slices.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import cached_property
from math import prod

import numpy as np
import torch
from torch import Tensor

from .kernels.memory import LARGE, empty

CACHED = 1 << 16  # entries worked on at once, to stay in the cache


@dataclass(frozen=True)
class Layout:
    """Names and shapes of the K parameter tensors, in the order in which they make up the vector (P,)."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @cached_property
    def bounds(self) -> np.ndarray:
        """(K + 1,) int64: tensor k is the slice bounds[k] : bounds[k + 1]."""
        return np.cumsum([0, *(prod(shape) for shape in self.shapes)], dtype=np.int64)

    @property
    def size(self) -> int:
        """P, the number of parameters."""
        return self._size

    @cached_property
    def _size(self) -> int:
        return int(self.bounds[-1])

    @cached_property
    def _slices(self) -> tuple[tuple[str, slice], ...]:
        return tuple(zip(self.names, itertools.starmap(slice, itertools.pairwise(self.bounds.tolist())), strict=True))

    def followed(self, other: "Layout") -> "Layout":
        """This one with the tensors of another behind it."""
        return Layout(self.names + other.names, self.shapes + other.shapes) if other.names else self

    def slices(self) -> Iterable[tuple[str, slice]]:
        """Of each tensor its name and its part of the vector."""
        return self._slices

    def pieces(self) -> Iterable[tuple[int, slice]]:
        """Of each tensor in turn its number and its part of the vector, in pieces that fit the cache."""
        for k, (_, part) in enumerate(self._slices):
            for start in range(part.start, max(part.stop, part.start + 1), CACHED):
                yield k, slice(start, min(start + CACHED, part.stop))

    def flatten(self, tensors: Iterable[Tensor]) -> Tensor:
        """Tensors in the order of `names` -> a new vector (P,)."""
        with torch.no_grad():
            parts = [t.reshape(-1) for t in tensors]
            dtype = parts[0].dtype
            large = self.size * dtype.itemsize >= LARGE
            if not large or not all(t.dtype == dtype and t.device.type == "cpu" for t in parts):
                return torch.cat(parts)
            return torch.cat(parts, out=empty([sum(map(len, parts))], dtype))

    def unflatten(self, vector: Tensor) -> dict[str, Tensor]:
        """A vector (..., P) -> views by name, (..., *shape)."""
        lead = vector.shape[:-1]
        return {
            name: vector[..., part].reshape((*lead, *shape))
            for (name, part), shape in zip(self.slices(), self.shapes, strict=True)
        }


def match_names(names: Sequence[str], patterns: str | Sequence[str], where: str) -> list[str]:
    """The names, in their order, that some of the patterns (`*`, `?`) match.

    Raises:
        ValueError: a pattern matches none; the nearest names are offered.
    """
    chosen: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        found = [n for n in names if n == pattern or fnmatchcase(n, pattern)]
        if not found:
            near = get_close_matches(pattern, names, 3, 0.5)
            hint = f"Did you mean {' or '.join(near)}? " if near else ""
            raise ValueError(
                f"a pattern names no parameter: got {pattern!r}, at {where}, expected one that matches some of "
                f"{', '.join(names)}. {hint}Use the names of model.named_parameters()."
            )
        chosen.update(found)
    return [n for n in names if n in chosen]


def grouped(values: np.ndarray, member: np.ndarray) -> np.ndarray:
    """(..., K) of tensors -> (..., G) of groups. member: (K, G). Of a single group the tensors may be summed already."""
    if member.shape[1] == 1:
        return values.sum(-1, keepdims=True)
    itself = len(member) == member.shape[1] and bool(member.diagonal().all())
    return values if itself else values @ member


def group_tensors(
    names: Sequence[str], groups: Mapping[str, Sequence[str]] | None
) -> tuple[tuple[str, ...], np.ndarray]:
    """Group names (G,) and the matrix (K, G) of ones that sums tensors into groups.

    `groups` maps a group's name to parameter names or patterns (`*`, `?`); None makes one group of each tensor.
    Tensors that no pattern names are gathered in a group `other`.
    """
    if groups is None:
        return tuple(names), np.eye(len(names))
    owner: dict[str, str] = {}
    for group, patterns in groups.items():
        for name in match_names(names, patterns, f"group {group!r}"):
            if owner.setdefault(name, group) != group:
                raise ValueError(
                    f"a parameter stands in two groups: got {owner[name]!r} and {group!r}, expected one, "
                    f"at {name!r}. Groups must not overlap, or contributions would be counted twice."
                )
    labels = list(groups)
    if len(owner) < len(names):
        labels.append("other")
    member = np.zeros((len(names), len(labels)))
    for k, name in enumerate(names):
        member[k, labels.index(owner.get(name, "other"))] = 1.0
    return tuple(labels), member
