"""All contributions of a sweep on disk: (query, step, slot, group), for what is larger than memory.

Written backwards, as the sweep goes, in chunks of several steps; `index` (step, slot) holds the example ids, -1 where there
is none. Of ids that are strings it holds numbers, with a table beside it: see `ids`.
"""

import uuid
from typing import Any

import numpy as np
import zarr

from ..errors import StoreExistsError
from .ids import IdTable
from .owner import check_target
from .place import locate, writable
from .schema import FORMAT, create
from .sealing import SealingStore, create_digests

CHUNK_BYTES = 8 << 20


class CubeWriter:
    """Takes steps in descending order and writes each chunk whole."""

    def __init__(self, target: Any, start: int, queries: int, steps: int, groups: tuple[str, ...]) -> None:
        try:
            check_target(target, overwrite=False, kind="cube")
        except StoreExistsError:
            raise StoreExistsError(
                f"a store exists already: got cube={target}, expected an empty place. Choose another path."
            ) from None
        facts = {"groups": list(groups), "first_step": start, "complete": False}
        self._facts: dict[str, Any] = {"kind": "cube", "id": uuid.uuid4().hex, "format": FORMAT, **facts}
        self._sealing = SealingStore(writable(locate(target)), self._facts["id"], growing=True)
        self._group = zarr.create_group(self._sealing, zarr_format=3)
        create_digests(self._group)
        self._sealing.begin(self._facts)
        self._shape = (queries, steps, len(groups))
        self._waiting: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._cube: zarr.Array | None = None

    def put(self, step: int, index: np.ndarray, contributions: np.ndarray) -> None:
        """Step counted from the window's start; (B,) ids; (Q, B, G)."""
        if self._cube is None:
            self._create(index)
        assert self._cube is not None
        if len(index) > self._cube.shape[2]:
            q, t, _, g = self._cube.shape
            self._cube.resize((q, t, len(index), g))
            self._index.resize((t, len(index)))
        self._waiting[step] = (index, contributions)
        if step % self._steps == 0:
            self._write(step)

    def close(self, complete: bool = True) -> None:
        """After the last step, or where the sweep was interrupted: what is left is written, the rest has no ids."""
        if self._waiting:
            self._write(min(self._waiting))
        self._sealing.commit({**self._facts, "complete": complete}, full=True)

    def _create(self, first: np.ndarray) -> None:
        slots, (q, t, g) = len(first), self._shape
        self._steps = max(1, min(t, CHUNK_BYTES // max(1, 8 * q * slots * g)))
        dims = ("query", "step", "slot", "group")
        self._cube = create(self._group, "contribution", (q, t, slots, g), (q, self._steps, slots, g), np.float64, dims)
        self._index = create(self._group, "index", (t, slots), (self._steps, slots), np.int64, ("step", "slot"), -1)
        self._ids = IdTable.created(self._group, first, self._steps)

    def _write(self, first: int) -> None:
        assert self._cube is not None
        count, slots = len(self._waiting), self._cube.shape[2]
        values = np.zeros((self._shape[0], count, slots, self._shape[2]))
        ids = np.full((count, slots), -1, dtype=np.int64)
        for step, (index, contributions) in self._waiting.items():
            values[:, step - first, : len(index)] = contributions
            ids[step - first, : len(index)] = self._ids.place(index)
        self._ids.commit()
        self._cube[:, first : first + count] = values
        self._index[first : first + count] = ids
        self._sealing.commit(self._facts, full=True)
        self._waiting.clear()
