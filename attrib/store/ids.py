"""Ids of training examples that are strings: arrays hold numbers, and a table says which string each of them stands for.

    ids/text [utf8]        the strings in UTF-8
    ids/span [id, bound]   row n: from which byte to which the string of number n stands there; -1 in rows that are free

Where ids are numbers there is no table: they are their own. Everything within attrib goes on with numbers; `Ids.of` is what
the public edges call.
"""

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import zarr

from .reader import Reader
from .schema import CHUNK_BYTES, continued, create

FEWEST, SHORTEST = 1 << 10, 16 << 10  # ids and bytes of a chunk, at least


class IdTable:
    """The numbers of a run's ids, in the order in which they come; new strings wait until the next commit.

    A commit fills whole chunks, as those of `ExampleTable` do: no committed chunk is written twice.

    arrays: `ids/span` and `ids/text`; none where ids are numbers. written: rows and bytes, the last chunks not filled up.
    """

    def __init__(self, arrays: tuple[zarr.Array, ...], written: Sequence[int] = (0, 0)) -> None:
        self._arrays = arrays
        self._numbers: dict[str, int] = {}
        self._waiting: list[bytes] = []
        self.written = list(written)
        self._start: list[int] = []  # the row and the byte that the next commit begins with
        self._begin()

    @classmethod
    def created(cls, group: zarr.Group, first: np.ndarray, block: int) -> "IdTable":
        """Of ids like those of the first step, (B,) int64 or objects that are strings; block: steps between commits."""
        if first.dtype != object:
            return cls(())
        count, size = block * len(first), block * sum(len(name.encode()) for name in first)
        rows, length = max(FEWEST, min(count, CHUNK_BYTES // 16)), max(SHORTEST, min(size, CHUNK_BYTES))
        span = create(group, "ids/span", (0, 2), (rows, 2), np.int64, ("id", "bound"), -1)
        return cls((span, create(group, "ids/text", (0,), (length,), np.uint8, ("utf8",))))

    @classmethod
    def restored(cls, group: zarr.Group, reader: Reader) -> "IdTable":
        """That of a run that is read, to go on with."""
        if "ids/span" not in reader:
            return cls(())
        arrays = tuple(continued(reader.array(name), group.store) for name in ("ids/span", "ids/text"))
        table = cls(arrays, reader.header["ids"])
        table._numbers = Ids(reader).numbers
        return table

    def place(self, ids: np.ndarray) -> np.ndarray:
        """(B,) ids -> (B,) int64 numbers."""
        if ids.dtype != object:
            return ids
        return np.fromiter(map(self._number, ids), np.int64, len(ids))

    def commit(self) -> None:
        """Write the strings that wait; if a write fails, they wait on."""
        if self._waiting:
            ends = self._start[1] + np.cumsum([0, *map(len, self._waiting)])
            spans, text = np.stack([ends[:-1], ends[1:]], 1), np.frombuffer(b"".join(self._waiting), np.uint8)
            for array, start, values in zip(self._arrays, self._start, (spans, text), strict=True):
                array.resize((start + len(values), *array.shape[1:]))
                array[start:] = values
            self.written = [array.shape[0] for array in self._arrays]
            self._begin()
            self._waiting.clear()

    def _begin(self) -> None:
        """On new chunks."""
        self._start = [-(-n // a.chunks[0]) * a.chunks[0] for n, a in zip(self.written, self._arrays, strict=False)]
        self._next = self._start[0] if self._start else 0

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
        self._rows, self._bytes = reader.header["ids"]

    @property
    def strings(self) -> bool:
        """Whether they are strings; else numbers."""
        return self._rows > 0

    def of(self, numbers: np.ndarray) -> np.ndarray:
        """(B,) int64 numbers -> (B,) ids: strings in an array of objects, or the numbers."""
        return self._names[numbers] if self.strings else numbers

    @property
    def numbers(self) -> dict[str, int]:
        """String -> the number that stands for it."""
        spans = self._reader.read("ids/span", slice(0, self._rows))
        return {self._names[n]: int(n) for n in np.flatnonzero(spans[:, 0] >= 0)} if self.strings else {}

    @cached_property
    def _names(self) -> np.ndarray:
        text = self._reader.read("ids/text", slice(0, self._bytes)).tobytes()
        spans = self._reader.read("ids/span", slice(0, self._rows)).tolist()
        return np.array([text[first:stop].decode() for first, stop in spans], dtype=object)
