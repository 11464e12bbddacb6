"""Ids of training examples that are strings: arrays hold numbers, and a table says which string each of them stands for.

    ids/text [byte]        the strings in UTF-8
    ids/span [id, bound]   row n: from which byte to which the string of number n stands there; -1 in rows that are free

Where ids are numbers there is no table: they are their own. Everything within attrib goes on with numbers; `Ids.of` is what
the public edges call.
"""

from functools import cached_property

import numpy as np
import zarr

from .reader import Reader
from .schema import CHUNK_BYTES, create

FEWEST, SHORTEST = 1 << 10, 16 << 10  # ids and bytes of a chunk, at least


class IdTable:
    """The numbers of a run's ids, in the order in which they come; new strings wait until the next commit.

    A commit fills whole chunks, as those of `ExampleTable` do: no committed chunk is written twice.

    Args:
        first: (B,) ids of the first step: int64, or objects that are strings.
        block: steps between commits.
    """

    def __init__(self, group: zarr.Group, first: np.ndarray, block: int) -> None:
        self._arrays: tuple[zarr.Array, ...] = ()
        self._numbers: dict[str, int] = {}
        self._waiting: list[bytes] = []
        self._next = 0
        self._start = [0, 0]  # the row and the byte that the next commit begins with
        self._written = [0, 0]  # rows and bytes, the last chunks not filled up
        if first.dtype == object:
            count, size = block * len(first), block * sum(len(name.encode()) for name in first)
            rows, length = max(FEWEST, min(count, CHUNK_BYTES // 16)), max(SHORTEST, min(size, CHUNK_BYTES))
            self._arrays = (
                create(group, "ids/span", (0, 2), (rows, 2), np.int64, ("id", "bound"), -1),
                create(group, "ids/text", (0,), (length,), np.uint8, ("byte",)),
            )

    def place(self, ids: np.ndarray) -> np.ndarray:
        """(B,) ids -> (B,) int64 numbers."""
        if ids.dtype != object:
            return ids
        return np.fromiter(map(self._number, ids), np.int64, len(ids))

    def commit(self) -> list[int]:
        """Write the strings that wait; how many rows and bytes stand there. If a write fails, they wait on."""
        if self._waiting:
            ends = self._start[1] + np.cumsum([0, *map(len, self._waiting)])
            spans, text = np.stack([ends[:-1], ends[1:]], 1), np.frombuffer(b"".join(self._waiting), np.uint8)
            for array, start, values in zip(self._arrays, self._start, (spans, text), strict=True):
                array.resize((start + len(values), *array.shape[1:]))
                array[start:] = values
            self._written = [array.shape[0] for array in self._arrays]
            self._start = [-(-array.shape[0] // array.chunks[0]) * array.chunks[0] for array in self._arrays]
            self._next = self._start[0]
            self._waiting.clear()
        return self._written

    def _number(self, name: str) -> int:
        if name not in self._numbers:
            self._numbers[name] = self._next
            self._waiting.append(name.encode())
            self._next += 1
        return self._numbers[name]


class Ids:
    """What the examples of a stored run are called."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._rows, self._bytes = reader.header.get("ids", (0, 0))  # not there before ids could be strings

    @property
    def strings(self) -> bool:
        """Whether they are strings; else numbers."""
        return self._rows > 0

    def of(self, numbers: np.ndarray) -> np.ndarray:
        """(B,) int64 numbers -> (B,) ids: strings in an array of objects, or the numbers."""
        return self._names[numbers] if self.strings else numbers

    @cached_property
    def _names(self) -> np.ndarray:
        text = self._reader.read("ids/text", slice(0, self._bytes)).tobytes()
        spans = self._reader.read("ids/span", slice(0, self._rows)).tolist()
        return np.array([text[first:stop].decode() for first, stop in spans], dtype=object)
