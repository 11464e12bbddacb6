"""Each distinct input once: rows are recognised by example id and content, so augmented data get rows of their own.

Inputs of one form, shapes and types make a table; batches padded to different lengths go to different tables. What the
examples of a batch share makes a table beside it, of one row a batch.
"""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import zarr
from zarr.core.sync import sync

from ..inputs import Form, Inputs, counts
from ..kernels.hashing import combine, hash_rows
from . import chunks
from .schema import CHUNK_BYTES, continued, create

FILE_BYTES = 64 << 10


class Places(NamedTuple):
    """Where the inputs of a batch stand: in the rows (B,) of the tables `kind`, what is shared in the row `shared`, -1 for
    nothing."""

    kind: int
    rows: np.ndarray
    shared: int


class Tables(NamedTuple):
    """Those of one kind: `shared` is None where all tensors have rows."""

    number: int
    form: Form
    rows: "ExampleTable"
    shared: "ExampleTable | None"


class ExampleTables:
    """Kind k stands in the arrays examples/k/0, examples/k/1, ... and shared/k/0, shared/k/1, ..."""

    def __init__(self, group: zarr.Group) -> None:
        self._group = group
        self._tables: dict[str, Tables] = {}
        self._last: tuple[np.ndarray, Inputs, Places] | None = None

    @classmethod
    def restored(cls, group: zarr.Group, reader: Any, steps: int) -> "ExampleTables":
        """Those of the first `steps` steps of a run that is read, to go on with."""
        tables = cls(group)
        header, passes = reader.header, reader.passes(slice(0, steps))
        index, row = (reader.read(name, slice(0, steps)) for name in ("index", "row"))
        kinds = passes.of_slots("kind", index.shape[1])

        def table(name: str, arrays: int, count: int) -> ExampleTable:
            return ExampleTable([continued(reader.array(f"{name}/{j}"), group.store) for j in range(arrays)], count)

        for number, form in enumerate(header["forms"]):
            by_row, others = counts(form)
            rows = table(f"examples/{number}", by_row, header["rows"][number])
            ids, here = np.zeros(header["rows"][number], np.int64), (kinds == number) & (row >= 0)
            ids[row[here]] = index[here]
            known = np.unique(row[here])
            rows.know(known, ids[known], reader.inputs("examples", number, known))
            shared = table(f"shared/{number}", others, header["shared"][number]) if others else None
            if shared is not None:
                known = np.unique(passes.numbers("shared")[passes.numbers("kind") == number])
                known = known[known >= 0].astype(np.int64)
                shared.know(known, np.zeros(len(known), np.int64), reader.inputs("shared", number, known))
            tables._tables[_key(form)] = Tables(number, form, rows, shared)
        return tables

    def place(self, index: np.ndarray, inputs: Inputs) -> Places:
        """(B,) ids and the batch's arrays -> where they stand.

        The arrays must not change: the very same ones again are not looked at a second time.
        """
        if self._last and self._last[1] is inputs and np.array_equal(self._last[0], index):
            return self._last[2]
        one = [a[None] for a in inputs.shared]
        key = _key(inputs.form)
        if key not in self._tables:
            number = len(self._tables)
            rows = ExampleTable.created(self._group, f"examples/{number}", inputs.rows)
            shared = ExampleTable.created(self._group, f"shared/{number}", one) if one else None
            self._tables[key] = Tables(number, inputs.form, rows, shared)
        known = self._tables[key]
        at = -1 if known.shared is None else int(known.shared.rows(np.zeros(1, np.int64), one)[0])
        self._last = index, inputs, Places(known.number, known.rows.rows(index, inputs.rows), at)
        return self._last[2]

    def commit(self) -> None:
        """Write the rows that wait."""
        for tables in self._tables.values():
            tables.rows.commit()
            if tables.shared is not None:
                tables.shared.commit()

    def trim(self) -> None:
        """No more rows will come: the arrays hold those that were written and no more."""
        for tables in self._tables.values():
            tables.rows.trim()
            if tables.shared is not None:
                tables.shared.trim()

    @property
    def facts(self) -> dict[str, Any]:
        """For the header, per kind: the form, and the number of rows written so far."""
        known = self._tables.values()
        return {
            "forms": [tables.form for tables in known],
            "rows": [tables.rows.written for tables in known],
            "shared": [0 if tables.shared is None else tables.shared.written for tables in known],
        }


class ExampleTable:
    """One table: assigns a row to every slot of a batch; new rows wait until the next commit.

    A commit fills whole chunks: rows after it start on a new chunk, so that no committed chunk is written twice.
    """

    def __init__(self, arrays: list[zarr.Array], rows: int) -> None:
        from ..kernels.keys import KeyTable  # numba, which reading does without

        self._arrays = arrays
        self._chunk = arrays[0].chunks[0]
        self._known = KeyTable()
        self.written = rows  # the last chunk not filled up
        self._next = self._start = -(-rows // self._chunk) * self._chunk  # the first row not yet written
        self._pending: list[list[np.ndarray]] = [[] for _ in arrays]

    @classmethod
    def created(cls, group: zarr.Group, path: str, batch: Sequence[np.ndarray]) -> "ExampleTable":
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

    def know(self, rows: np.ndarray, index: np.ndarray, inputs: Sequence[np.ndarray]) -> None:
        """Rows (n,) that stand there already, with their ids (n,) and inputs (n, ...)."""
        self._known.put(_keys(index, inputs), rows)

    def rows(self, index: np.ndarray, batch: Sequence[np.ndarray]) -> np.ndarray:
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
            for n, (array, pending) in enumerate(zip(self._arrays, self._pending, strict=True)):
                values = np.concatenate(pending)
                grown = chunks.grown(array, self._start + len(values))
                self._arrays[n] = grown
                chunks.put(grown, self._start, values)
            self.written = self._next
            self._next = self._start = -(-self._next // self._chunk) * self._chunk
            for pending in self._pending:
                pending.clear()

    def trim(self) -> None:
        """To the rows that were written."""
        self._arrays = [chunks.trimmed(array, self.written) for array in self._arrays]


def _key(form: Form) -> str:
    return json.dumps(form)


def _keys(index: np.ndarray, batch: Sequence[np.ndarray]) -> np.ndarray:
    """(B,) uint64, of id and inputs."""
    keys = hash_rows(index)
    for a in batch:
        keys = combine(keys, hash_rows(a))
    return keys
