"""Open a run's store and read it; what is damaged is named, never filled in."""

from base64 import b64decode
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr
from torch import Tensor
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync

from ..batch import Batch
from ..constants import to_tensor
from ..errors import StoreError
from ..inputs import Form, batch_of, counts
from . import vectors
from .checked import CheckedStore, check_present
from .facts import check_facts
from .metadata import HEADER
from .owner import KINDS, read_header
from .passes import Passes
from .place import folder_bytes, locate, readable
from .schema import DIGESTS, FACTS, FORMAT, Lengths
from .seal import Unsealed

WIDTHS = {"slot": "slots", "pass": "passes"}  # axes that grow: axis -> how long it is, in the header
CACHED_BYTES = 512 << 20  # inputs up to this size are read once and kept


def open_checked(target: Any, kind: str) -> tuple[CheckedStore, Any]:
    """The store of a run, a result or a cube, for reading, and where it is.

    Raises:
        StoreError: nothing there, something else, of another format, damaged.
    """
    place = locate(target)
    where = place if isinstance(place, Path | str) else target
    try:
        store = readable(place)
        attributes = read_header(store, where)
    except FileNotFoundError:
        attributes = None
    except Unsealed as other:
        raise StoreError(_unsealed(other, kind, where)) from None
    except (OSError, ValueError) as error:
        if isinstance(error, StoreError):
            raise
        raise StoreError(f"the store cannot be opened: got {error!r}, at {where}. Check the path.") from error
    if attributes is None:
        raise StoreError(f"no {kind} is stored there: got {where}, expected a store written by attrib. Check the path.")
    header = attributes["attrib"]
    if header.get("kind") != kind:
        raise StoreError(
            f"the store is not a {kind}: got a {header.get('kind')}, at {where}. Open it with "
            f"{KINDS.get(str(header.get('kind')), 'what wrote it')}."
        )
    if header.get("format") != FORMAT:
        raise StoreError(_format(header, where))
    return CheckedStore(store, attributes, where, growing=kind == "run"), where


def _unsealed(other: Unsealed, kind: str, where: Any) -> str:
    header = other.attributes.get("attrib")
    if isinstance(header, dict) and "format" in header:
        return _format(header, where)
    return (
        f"the store is not a {kind}: got a Zarr group that attrib did not write, or wrote before results had digests, at "
        f"{where}. Check the path."
    )


def _format(header: dict[str, Any], where: Any) -> str:
    written, versions = header.get("format"), header.get("versions")
    by = versions.get("attrib") if isinstance(versions, dict) else "unknown"
    newer = isinstance(written, int) and written > FORMAT
    return (
        f"the store is of {'a newer' if newer else 'an older'} format: got format {written} (attrib {by}), expected "
        f"{FORMAT}, at {where}. "
        + ("Update attrib." if newer else "Open it with that attrib, or record the run again.")
    )


class Reader:
    """The arrays of a run, up to its last committed step.

    Args:
        target: path or zarr Store.

    Raises:
        StoreError: nothing there, not a run, of another format; on reading, a missing or damaged file.
    """

    def __init__(self, target: Any) -> None:
        self.store, self.target = open_checked(target, "run")
        self.header: dict[str, Any] = self.store.facts
        check_facts(self.header, self.target)
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
        return name in self.store.arrays

    def array(self, name: str) -> zarr.Array:
        if name not in self._arrays:
            if name not in self:
                raise StoreError(f"an array is missing: expected {name!r}, at {self.target}.")
            self._arrays[name] = open_array(self.store, name)
        return self._arrays[name]

    def read(self, name: str, rows: slice | int | None = None, more: int = 0) -> np.ndarray:
        """`array[rows]` along the first axis, after checking that its chunks are there. more: rows of vectors behind them,
        for the caller to fill."""
        array = self.array(name)
        if rows is None:
            chosen = slice(0, self.committed(name) if array.ndim else 0)
        else:
            chosen = slice(rows, rows + 1) if isinstance(rows, int) else rows
        if array.ndim and chosen.stop > array.shape[0]:
            raise StoreError(
                f"an array is too short: got {array.shape[0]} rows, expected {chosen.stop}, at {name!r} in "
                f"{self.target}."
            )
        slots = self._slots(name, array)
        check_present(self.store, array, self.keys(array, chosen))
        if vectors.are_vectors(array):
            values = self._vectors(array, chosen, more)
        else:
            values = read_array(array, (chosen, *slots) if array.ndim else ..., self.target)
            values = np.concatenate([values, np.empty((more, *values.shape[1:]), values.dtype)]) if more else values
        return values[0] if isinstance(rows, int) else values

    def _vectors(self, array: zarr.Array, rows: slice, more: int) -> np.ndarray:
        count = rows.stop - rows.start
        values = np.empty((count + more, array.shape[1]), array.dtype)
        for packed in vectors.take(self.store, array, rows.start, values[:count]):
            values[packed.start - rows.start : packed.stop - rows.start] = read_array(array, packed, self.target)
        return values

    def tensor(self, name: str, rows: slice | int | None = None, more: int = 0) -> Tensor:
        """The same as a tensor; what was stored as integers, because numpy lacks the parameters' type, in that type."""
        values = self.read(name, rows, more)
        return to_tensor(values, self.header["dtype"]) if values.dtype.kind == "i" else torch.from_numpy(values)

    @property
    def generators(self) -> np.ndarray:
        """(octets,) uint8: their state after the last step that was written."""
        return np.frombuffer(b64decode(self.header["generators"]), np.uint8)

    def facts(self, rows: slice | int) -> dict[str, np.ndarray]:
        """The numbers of some steps, by name: see `schema`."""
        values = self.read("facts", rows)
        return {name: values[..., n] for n, name in enumerate(FACTS)}

    def fact(self, name: str, rows: slice | int) -> np.ndarray:
        return self.facts(rows)[name]

    def passes(self, rows: slice) -> Passes:
        """Of which the gradients of some steps were made."""
        return Passes(self.read("passes", rows))

    def inputs(self, table: str, kind: int, rows: np.ndarray) -> list[np.ndarray]:
        """The given rows (n,) of the tables "examples" or "shared" of a kind, one array (n, ...) per leaf of the batch."""
        return [self._inputs(f"{table}/{kind}/{j}", rows) for j in range(counts(self._form(kind))[table == "shared"])]

    def batch(self, kind: int, rows: np.ndarray, shared: int) -> Batch:
        """The inputs that stand in the given rows (B,), and what they share."""
        form = self._form(kind)
        others = self.inputs("shared", kind, np.array([shared])) if counts(form)[1] else []
        return batch_of(form, self.inputs("examples", kind, rows), [a[0, ...] for a in others], len(rows))

    def _form(self, kind: int) -> Form:
        forms = self.header["forms"]
        if not 0 <= kind < len(forms):
            raise StoreError(f"inputs are missing: got kind {kind}, expected one of {len(forms)}, at {self.target}.")
        form: Form = forms[kind]
        return form

    def nbytes_stored(self) -> int:
        """Bytes on disk or in memory."""
        place = locate(self.target)
        if isinstance(place, Path) and place.is_dir():
            return folder_bytes(place)
        return int(sync(self.store.getsize_prefix("")))

    def names(self) -> list[str]:
        """Every array of the run."""
        return sorted(name for name in self.store.arrays if name != DIGESTS)

    def check_documents(self) -> None:
        """Raise StoreError where the document of a group that arrays stand in, or the digests, are missing or damaged."""
        open_array(self.store, DIGESTS)
        for name in sorted(self.store.groups):
            sync(self.store.get(f"{name}/{HEADER}", default_buffer_prototype()))

    def touch(self, name: str) -> int:
        """Read an array chunk by chunk, as far as steps are committed, and return how many there were."""
        array, stop = self.array(name), self.committed(name)
        length = max(1, array.chunks[0]) if array.ndim else 1
        starts = range(0, stop, length) if array.ndim else range(1)
        for start in starts:
            self.read(name, slice(start, min(start + length, stop)) if array.ndim else None)
        return len(starts)

    def committed(self, name: str) -> int:
        """Rows of an array that belong to committed steps."""
        array = self.array(name)
        names = dimensions(array)
        first = names[0] if array.ndim and names else None
        if first == "row":
            table, kind = name.split("/")[:2]
            return int(self.header["rows" if table == "examples" else table][int(kind)])
        lengths = Lengths(*(int(self.header[name]) for name in Lengths._fields))
        known = {
            **lengths.rows(self.steps, self.complete),
            **dict(zip(("id", "utf8"), self.header["ids"], strict=True)),
        }
        return known.get(first, array.shape[0]) if array.ndim and first else 0

    def _inputs(self, name: str, rows: np.ndarray) -> np.ndarray:
        table = self._tables.get(name)
        count = self.committed(name) if table is None else len(table)
        if len(rows) and int(rows.max()) >= count:
            raise StoreError(
                f"inputs are missing: got row {int(rows.max())}, expected at most {count - 1}, at {name!r} in {self.target}."
            )
        if table is None and self.array(name).nbytes > CACHED_BYTES:
            return read_array(self.array(name).oindex, rows, self.target)
        if table is None:
            table = self._tables[name] = self.read(name, slice(0, count))
        return table[rows]

    def _slots(self, name: str, array: zarr.Array) -> tuple[slice, ...]:
        """Of arrays (step, slot, ...) or (step, pass, ...), those that are filled."""
        (axis,) = dimensions(array)[1:2] or ("",)
        if axis not in WIDTHS:
            return ()
        width = int(self.header[WIDTHS[axis]])
        if width > array.shape[1]:
            raise StoreError(
                f"an array is too narrow: got {array.shape[1]} along {axis!r}, expected {width}, at {name!r} in "
                f"{self.target}."
            )
        return (slice(0, width),)

    def keys(self, array: zarr.Array, rows: slice) -> Iterator[str]:
        """Of the chunks that hold some rows."""
        lengths = [
            int(self.header[WIDTHS[name]]) if name in WIDTHS else n
            for name, n in zip(dimensions(array), array.shape, strict=True)
        ]
        grid = [range(-(-n // c)) for n, c in zip(lengths, array.chunks, strict=True)]
        if grid:
            grid[0] = range(rows.start // array.chunks[0], -(-rows.stop // array.chunks[0]))
        return chunk_keys(array, grid)


def dimensions(array: zarr.Array) -> tuple[str, ...]:
    return tuple(getattr(array.metadata, "dimension_names", None) or ())


def chunk_keys(array: zarr.Array, grid: list[range]) -> Iterator[str]:
    """The names of chunks, by their numbers along every axis."""
    for first in grid[0] if grid else [None]:  # not `product` over all of it, which would be laid out in memory
        for rest in product(*grid[1:]):
            chunk = () if first is None else (first, *rest)
            yield f"{array.path}/{array.metadata.encode_chunk_key(chunk)}"


def open_array(store: CheckedStore, name: str) -> zarr.Array:
    """One that the header names.

    Raises:
        StoreError: its metadata are damaged, or such as zarr does not take.
    """
    try:
        return zarr.open_array(store, path=name, mode="r", zarr_format=3)
    except StoreError:
        raise
    except Exception as error:
        raise StoreError(
            f"an array cannot be opened: got {str(error)[:200]!r}, at {name!r} in {store.where}. Restore its metadata from "
            f"a copy."
        ) from error


def read_array(array: Any, chosen: Any, where: Any) -> np.ndarray:
    """`array[chosen]`, to be written to as one likes.

    Raises:
        StoreError: a chunk is missing, damaged or does not decode.
    """
    try:
        values = np.asarray(array[chosen])
    except StoreError:
        raise
    except Exception as error:
        raise StoreError(
            f"a chunk does not decode: got {str(error)[:200]!r}, at an array of {where}. Restore it from a copy."
        ) from error
    return values if values.flags.writeable else values.copy()
