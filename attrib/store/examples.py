"""Each distinct input once: rows are recognised by example id and content, so augmented data get rows of their own.

Inputs of one shape and type make a table; batches padded to different lengths go to different tables.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import zarr
from zarr.core.sync import sync

from ..kernels.hashing import combine, hash_rows
from ..kernels.keys import KeyTable
from .schema import CHUNK_BYTES, continued, create

FILE_BYTES = 64 << 10

Signature = tuple[tuple[str, tuple[int, ...]], ...]  # of each tensor of a batch the type and the shape of a row


class ExampleTables:
    """`kind` and rows of every slot: kind k stands in the arrays examples/k/0, examples/k/1, ..."""

    def __init__(self, group: zarr.Group) -> None:
        self._group = group
        self._tables: dict[Signature, tuple[int, ExampleTable]] = {}
        self._last: tuple[np.ndarray, list[np.ndarray], tuple[int, np.ndarray]] | None = None

    @classmethod
    def restored(cls, group: zarr.Group, reader: Any, steps: int) -> "ExampleTables":
        """Those of the first `steps` steps of a run that is read, to go on with."""
        tables = cls(group)
        arity, counts = int(reader.header["arity"]), reader.header["rows"]
        at = reader.facts(slice(0, steps))["kind"] if steps else np.zeros(0)
        index, row = (reader.read(name, slice(0, steps)) for name in ("index", "row"))
        for number, count in enumerate(counts):
            ids = np.zeros(count, np.int64)
            filled = row[at == number] >= 0
            ids[row[at == number][filled]] = index[at == number][filled]
            arrays = [continued(reader.array(f"examples/{number}/{j}"), group.store) for j in range(arity)]
            table = ExampleTable(arrays, count)
            known = np.unique(row[at == number][filled])
            table.know(known, ids[known], reader.batch(number, known))
            tables._tables[table.signature] = number, table
        return tables

    def place(self, index: np.ndarray, batch: list[np.ndarray]) -> tuple[int, np.ndarray]:
        """(B,) ids and the batch's arrays -> the kind of the batch and the rows (B,) of its inputs.

        The arrays must not change: the very same ones again are not looked at a second time.
        """
        if self._last and self._last[1] is batch and np.array_equal(self._last[0], index):
            return self._last[2]
        signature = signature_of(batch)
        if signature not in self._tables:
            number = len(self._tables)
            self._tables[signature] = number, ExampleTable.created(self._group, f"examples/{number}", batch)
        number, table = self._tables[signature]
        self._last = index, batch, (number, table.rows(index, batch))
        return self._last[2]

    def commit(self) -> None:
        """Write the rows that wait."""
        for _, table in self._tables.values():
            table.commit()

    @property
    def rows(self) -> list[int]:
        """The number of rows written so far, per kind."""
        return [table.written for _, table in self._tables.values()]


class ExampleTable:
    """One table: assigns a row to every slot of a batch; new rows wait until the next commit.

    A commit fills whole chunks: rows after it start on a new chunk, so that no committed chunk is written twice.
    """

    def __init__(self, arrays: list[zarr.Array], rows: int) -> None:
        self._arrays = arrays
        self._chunk = arrays[0].chunks[0]
        self._known = KeyTable()
        self.written = rows  # the last chunk not filled up
        self._next = self._start = -(-rows // self._chunk) * self._chunk  # the first row not yet written
        self._pending: list[list[np.ndarray]] = [[] for _ in arrays]

    @classmethod
    def created(cls, group: zarr.Group, path: str, batch: list[np.ndarray]) -> "ExampleTable":
        """An empty one, for inputs like those of a batch. What a killed run never committed of it is taken away."""
        sync(group.store.delete_dir(path))
        bytes_per_row = max(1, *(a.nbytes // max(1, len(a)) for a in batch))
        # no longer than four first batches: a table of few rows should not be padded to many; but no file of a few bytes
        few = max(4 * len(batch[0]), FILE_BYTES // bytes_per_row)
        chunk = int(min(max(1, CHUNK_BYTES // bytes_per_row), max(1, few)))
        arrays = [
            create(
                group,
                f"{path}/{j}",
                (0, *a.shape[1:]),
                (chunk, *a.shape[1:]),
                a.dtype,
                ("row", *(f"input_{j}_{d}" for d in range(a.ndim - 1))),
            )
            for j, a in enumerate(batch)
        ]
        return cls(arrays, 0)

    @property
    def signature(self) -> Signature:
        return signature_of(self._arrays)

    def know(self, rows: np.ndarray, index: np.ndarray, inputs: list[np.ndarray]) -> None:
        """Rows (n,) that stand there already, with their ids (n,) and inputs (n, ...)."""
        self._known.put(_keys(index, inputs), rows)

    def rows(self, index: np.ndarray, batch: list[np.ndarray]) -> np.ndarray:
        """(B,) ids and the batch's arrays -> (B,) rows."""
        rows, new = self._known.rows(_keys(index, batch), self._next)
        if len(new):
            self._next += len(new)
            for pending, a in zip(self._pending, batch, strict=True):
                pending.append(a[new])
        return rows

    def commit(self) -> None:
        """Write the rows that wait; if a write fails, they wait on."""
        if self._next > self._start:
            for array, pending in zip(self._arrays, self._pending, strict=True):
                values = np.concatenate(pending)
                array.resize((self._start + len(values), *array.shape[1:]))
                array[self._start :] = values
            self.written = self._next
            self._next = self._start = -(-self._next // self._chunk) * self._chunk
            for pending in self._pending:
                pending.clear()


def signature_of(batch: Sequence[Any]) -> Signature:
    return tuple((a.dtype.str, tuple(a.shape[1:])) for a in batch)


def _keys(index: np.ndarray, batch: list[np.ndarray]) -> np.ndarray:
    """(B,) uint64, of id and inputs."""
    keys = hash_rows(index)
    for a in batch:
        keys = combine(keys, hash_rows(a))
    return keys
