"""Each distinct input once: rows are recognised by example id and content, so augmented data get rows of their own.

Inputs of one shape and type make a table; batches padded to different lengths go to different tables.
"""

import numpy as np
import zarr

from ..kernels.hashing import combine, hash_rows
from ..kernels.keys import KeyTable
from .schema import CHUNK_BYTES, create


class ExampleTables:
    """`kind` and rows of every slot: kind k stands in the arrays examples/k/0, examples/k/1, ..."""

    def __init__(self, group: zarr.Group) -> None:
        self._group = group
        self._tables: dict[tuple[object, ...], tuple[int, ExampleTable]] = {}
        self._last: tuple[np.ndarray, list[np.ndarray], tuple[int, np.ndarray]] | None = None

    def place(self, index: np.ndarray, batch: list[np.ndarray]) -> tuple[int, np.ndarray]:
        """(B,) ids and the batch's arrays -> the kind of the batch and the rows (B,) of its inputs.

        The arrays must not change: the very same ones again are not looked at a second time.
        """
        if self._last and self._last[1] is batch and np.array_equal(self._last[0], index):
            return self._last[2]
        signature = tuple((a.dtype.str, a.shape[1:]) for a in batch)
        if signature not in self._tables:
            number = len(self._tables)
            self._tables[signature] = number, ExampleTable(self._group, f"examples/{number}", batch)
        number, table = self._tables[signature]
        self._last = index, batch, (number, table.rows(index, batch))
        return self._last[2]

    def commit(self) -> list[int]:
        """Write the rows that wait; the number of rows written so far, per kind."""
        return [table.commit() for _, table in self._tables.values()]


class ExampleTable:
    """One table: assigns a row to every slot of a batch; new rows wait until the next commit.

    A commit fills whole chunks: rows after it start on a new chunk, so that no committed chunk is written twice.
    """

    def __init__(self, group: zarr.Group, path: str, batch: list[np.ndarray]) -> None:
        bytes_per_row = max(1, *(a.nbytes // max(1, len(a)) for a in batch))
        # no longer than four first batches: a table of few rows should not be padded to many
        self._chunk = int(min(max(1, CHUNK_BYTES // bytes_per_row), max(1, 4 * len(batch[0]))))
        self._arrays = [
            create(
                group,
                f"{path}/{j}",
                (0, *a.shape[1:]),
                (self._chunk, *a.shape[1:]),
                a.dtype,
                ("row", *(f"input_{j}_{d}" for d in range(a.ndim - 1))),
            )
            for j, a in enumerate(batch)
        ]
        self._known = KeyTable()
        self._next = 0
        self._start = 0  # first row not yet written
        self._written = 0  # rows written, the last chunk not filled up
        self._pending: list[list[np.ndarray]] = [[] for _ in batch]

    def rows(self, index: np.ndarray, batch: list[np.ndarray]) -> np.ndarray:
        """(B,) ids and the batch's arrays -> (B,) rows."""
        keys = hash_rows(index)
        for a in batch:
            keys = combine(keys, hash_rows(a))
        rows, new = self._known.rows(keys, self._next)
        if len(new):
            self._next += len(new)
            for pending, a in zip(self._pending, batch, strict=True):
                pending.append(a[new])
        return rows

    def commit(self) -> int:
        """Write the rows that wait and return how many stand there; if a write fails, they wait on."""
        if self._next > self._start:
            for array, pending in zip(self._arrays, self._pending, strict=True):
                values = np.concatenate(pending)
                array.resize((self._start + len(values), *array.shape[1:]))
                array[self._start :] = values
            self._written = self._next
            self._next = self._start = -(-self._next // self._chunk) * self._chunk
            for pending in self._pending:
                pending.clear()
        return self._written
