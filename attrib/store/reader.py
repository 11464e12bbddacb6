"""Open a run's store and read it; what is damaged is named, never filled in."""

from itertools import product
from typing import Any

import numpy as np
import zarr
from zarr.abc.store import Store
from zarr.core.sync import sync
from zarr.errors import GroupNotFoundError

from ..errors import StoreError
from .schema import FORMAT, folder_bytes, local_path

CACHED_BYTES = 512 << 20  # inputs up to this size are read once and kept


class Reader:
    """The arrays of a run, up to its last committed step.

    Args:
        target: path or zarr Store.

    Raises:
        StoreError: nothing there, not a run, of a newer format; on reading, a missing or damaged chunk.
    """

    def __init__(self, target: str | Store) -> None:
        self.target = target
        try:
            self._group = zarr.open_group(target, mode="r")
        except (FileNotFoundError, GroupNotFoundError):
            raise StoreError(
                f"no run is stored there: got {target}, expected a store written by attrib.record. Check the path."
            ) from None
        except Exception as error:
            raise StoreError(f"the store's metadata is not readable: got {error!r}, at {target}.") from error
        header = self._group.attrs.get("attrib")
        if not isinstance(header, dict) or "committed_steps" not in header:
            raise StoreError(
                f"the store is not a run: got a Zarr group without run metadata, at {target}. "
                f"Open results with attrib.open_result."
            )
        self.header: dict[str, Any] = header
        if header["format"] > FORMAT:
            raise StoreError(
                f"the store is of a newer format: got format {header['format']} (attrib "
                f"{header['versions']['attrib']}), expected at most {FORMAT}, at {target}. Update attrib."
            )
        self._tables: dict[str, np.ndarray] = {}
        self._arrays: dict[str, zarr.Array] = {}

    @property
    def steps(self) -> int:
        """T, the number of committed steps."""
        return int(self.header["committed_steps"])

    @property
    def complete(self) -> bool:
        """Whether the recorder was closed."""
        return bool(self.header["complete"])

    def __contains__(self, name: str) -> bool:
        return name in self._group

    def array(self, name: str) -> zarr.Array:
        if name not in self._arrays:
            try:
                found = self._group[name]
            except KeyError:
                raise StoreError(f"an array is missing: expected {name!r}, at {self.target}.") from None
            assert isinstance(found, zarr.Array)
            self._arrays[name] = found
        return self._arrays[name]

    def read(self, name: str, rows: slice | int | None = None) -> np.ndarray:
        """`array[rows]` along the first axis, after checking that its chunks are there."""
        array = self.array(name)
        if rows is None:
            chosen = slice(0, array.shape[0]) if array.ndim else slice(0, 0)
        else:
            chosen = slice(rows, rows + 1) if isinstance(rows, int) else rows
        if array.ndim and chosen.stop > array.shape[0]:
            raise StoreError(
                f"an array is too short: got {array.shape[0]} rows, expected {chosen.stop}, at {name!r} in "
                f"{self.target}."
            )
        names = getattr(array.metadata, "dimension_names", None) or ()
        columns = (slice(0, int(self.header["slots"])),) if names[1:2] == ("slot",) else ()
        self._check_present(array, chosen)
        try:
            values = np.asarray(array[(chosen, *columns)] if array.ndim else array[...])
        except Exception as error:
            raise StoreError(
                f"a chunk is damaged: got {error}, at array {name!r}, file {self._damaged(array, chosen)} in "
                f"{self.target}. Restore the file from a copy; the rest of the run is readable."
            ) from error
        if not values.flags.writeable:  # as zarr hands them out now and then, and torch does not take them
            values = values.copy()
        return values[0] if isinstance(rows, int) else values

    def batch(self, kind: int, rows: np.ndarray) -> list[np.ndarray]:
        """The inputs in the given rows of a table, one array (B, ...) per tensor of the batch."""
        return [self._inputs(kind, j, rows) for j in range(int(self.header["arity"]))]

    def groups(self, prefix: str) -> list[str]:
        """Names of the arrays under a group."""
        if prefix not in self._group:
            return []
        found = self._group[prefix]
        return sorted(found.array_keys()) if isinstance(found, zarr.Group) else []

    def nbytes_stored(self) -> int:
        """Bytes on disk or in memory."""
        path = local_path(self.target)
        return int(sync(self._group.store.getsize_prefix(""))) if path is None else folder_bytes(path)

    def names(self) -> list[str]:
        """Every array of the store."""
        return sorted(name for name, node in self._group.members(max_depth=None) if isinstance(node, zarr.Array))

    def touch(self, name: str) -> int:
        """Read an array chunk by chunk, as far as steps are committed, and return how many there were."""
        array, stop = self.array(name), self._committed(name)
        length = max(1, array.chunks[0]) if array.ndim else 1
        starts = range(0, stop, length) if array.ndim else range(1)
        for start in starts:
            self.read(name, slice(start, min(start + length, stop)) if array.ndim else None)
        return len(starts)

    def _committed(self, name: str) -> int:
        """Rows of an array that belong to committed steps."""
        array = self.array(name)
        names = getattr(array.metadata, "dimension_names", None)
        first = names[0] if array.ndim and names else None
        if first == "row":
            return int(self.header["rows"][int(name.split("/")[1])])
        every, frame = (int(self.header[key]) for key in ("states_every", "frame"))
        states = self.steps + 1 if every == 1 else -(-self.steps // every) + self.complete
        known = {"step": self.steps, "state": states, "frame": -(-self.steps // frame)}
        return min(known.get(first, array.shape[0]), array.shape[0]) if array.ndim and first else 0

    def _inputs(self, kind: int, j: int, rows: np.ndarray) -> np.ndarray:
        name = f"examples/{kind}/{j}"
        array = self.array(name)
        if array.nbytes <= CACHED_BYTES:
            if name not in self._tables:
                self._tables[name] = self.read(name, slice(0, self._committed(name)))
            return self._tables[name][rows]
        return np.asarray(array.oindex[rows])

    # damage

    def _keys(self, array: zarr.Array, rows: slice) -> list[str]:
        names = getattr(array.metadata, "dimension_names", None) or ()
        lengths = [
            int(self.header["slots"]) if name == "slot" else n for name, n in zip(names, array.shape, strict=True)
        ]
        grid = [range(-(-n // c)) for n, c in zip(lengths, array.chunks, strict=True)]
        if grid:
            grid[0] = range(rows.start // array.chunks[0], -(-rows.stop // array.chunks[0]))
        prefix = f"{array.path}/" if array.path else ""
        return [prefix + array.metadata.encode_chunk_key(chunk) for chunk in product(*grid)]

    def _check_present(self, array: zarr.Array, rows: slice) -> None:
        for key in self._keys(array, rows):
            if not sync(array.store.exists(key)):
                raise StoreError(
                    f"a chunk is missing: expected file {key} in {self.target}. Restore it from a copy; "
                    f"the rest of the run is readable."
                )

    def _damaged(self, array: zarr.Array, rows: slice) -> str:
        """The first chunk in the range that does not decode."""
        for key in self._keys(array, rows):
            numbers = [int(part) for part in key.rsplit("/c/", 1)[1].split("/")] if "/c/" in key else []
            try:
                array.get_block_selection(tuple(numbers))
            except Exception:
                return key
        return "(unknown)"
