"""Each distinct input once: rows are recognised by example id and content, so augmented data get rows of their own."""

import numpy as np
import zarr

from ..kernels.hashing import combine, hash_rows
from .schema import CHUNK_BYTES, create


class ExampleTable:
    """Assigns a row of `examples/*` to every slot of a batch; new rows wait until the next commit.

    A commit fills whole chunks: rows after it start on a new chunk, so that no committed chunk is written twice.
    """

    def __init__(self, group: zarr.Group, batch: list[np.ndarray]) -> None:
        bytes_per_row = max(1, *(a.nbytes // max(1, len(a)) for a in batch)) if batch else 1
        # no longer than four first batches: a table of few rows should not be padded to many
        self._chunk = int(min(max(1, CHUNK_BYTES // bytes_per_row), max(1, 4 * len(batch[0])) if batch else 1))
        self._arrays = [
            create(
                group,
                f"examples/{j}",
                (0, *a.shape[1:]),
                (self._chunk, *a.shape[1:]),
                a.dtype,
                ("row", *(f"input_{j}_{d}" for d in range(a.ndim - 1))),
            )
            for j, a in enumerate(batch)
        ]
        self._keys = np.zeros(0, dtype=np.uint64)  # sorted
        self._rows = np.zeros(0, dtype=np.int64)  # row of each key
        self._next = 0
        self._start = 0  # first row not yet written
        self._pending: list[list[np.ndarray]] = [[] for _ in batch]

    def rows(self, index: np.ndarray, batch: list[np.ndarray]) -> np.ndarray:
        """(B,) ids and the batch's arrays -> (B,) rows."""
        keys = hash_rows(index)
        for a in batch:
            keys = combine(keys, hash_rows(a))
        unique, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
        at = np.searchsorted(self._keys, unique)
        known = at < len(self._keys)
        known[known] = self._keys[at[known]] == unique[known]
        rows = np.empty(len(unique), dtype=np.int64)
        rows[known] = self._rows[at[known]]
        new = np.flatnonzero(~known)
        if len(new):
            new = new[np.argsort(first[new])]  # in the order of the batch
            rows[new] = self._next + np.arange(len(new))
            self._next += len(new)
            for pending, a in zip(self._pending, batch, strict=True):
                pending.append(a[first[new]])
            order = np.argsort(merged := np.concatenate([self._keys, unique[new]]), kind="stable")
            self._rows = np.concatenate([self._rows, rows[new]])[order]
            self._keys = merged[order]
        return rows[inverse]

    def commit(self) -> None:
        """Write the rows that wait."""
        if self._next == self._start or not self._arrays:
            return
        for array, pending in zip(self._arrays, self._pending, strict=True):
            values = np.concatenate(pending)
            array.resize((self._start + len(values), *array.shape[1:]))
            array[self._start :] = values
            pending.clear()
        self._next = self._start = -(-self._next // self._chunk) * self._chunk

    @property
    def arity(self) -> int:
        return len(self._arrays)
