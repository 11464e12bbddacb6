"""Rows of an array that is being recorded, written chunk by chunk past zarr, which takes a millisecond over each call.

What stands on the disk is what zarr would have written. An array grows by more rows than it has, so seldom: that is, while
a run is recorded its arrays are longer than what is in them. How much of them counts the header says; `trimmed` makes them
as long as that when the run is closed.
"""

import sys
from collections.abc import Iterator
from importlib import import_module
from itertools import product
from typing import Any, cast

import google_crc32c
import numpy as np
import zarr
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync

from .schema import continued

CODECS = ["bytes", "blosc", "crc32c"]
_blosc: Any = import_module("numcodecs.blosc")
_BLOSC = _blosc.Blosc("lz4", 5, _blosc.BITSHUFFLE)  # as `schema.compressors`


def grown(array: zarr.Array, rows: int) -> zarr.Array:
    """An array that holds at least so many rows, in whole chunks; itself where it does already."""
    if array.shape[0] >= rows:
        return array
    count = array.chunks[0]
    return trimmed(array, -(-max(rows, 2 * array.shape[0]) // count) * count)


def trimmed(array: zarr.Array, rows: int) -> zarr.Array:
    """The array with so many rows; chunks beyond them are left alone."""
    if array.shape[0] == rows:
        return array
    made = continued(array, array.store, rows)
    metadata: Any = made.metadata
    for name, document in metadata.to_buffer_dict(default_buffer_prototype()).items():
        sync(array.store.set(f"{array.path}/{name}", document))
    return made


def as_now(array: zarr.Array) -> bool:
    """Whether the chunks of an array are as `schema.create` has them now: runs of before may have others."""
    metadata: Any = array.metadata
    return [codec.to_dict()["name"] for codec in metadata.codecs] == CODECS and sys.byteorder == "little"


def put(array: zarr.Array, start: int, values: np.ndarray) -> None:
    """Write rows (n, ...) from row `start` on, the first of a chunk; what is left of the last chunk is filled up."""
    if not as_now(array):
        array[start : start + len(values)] = values
        return
    count, store = array.chunks[0], cast(Any, array.store)
    for first in range(0, len(values), count):
        for key, part in _parts(array, (start + first) // count, values[first : first + count]):
            packed = _BLOSC.encode(part)
            store.put(key, [packed, google_crc32c.value(packed).to_bytes(4, "little")])


def _parts(array: zarr.Array, block: int, values: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """The chunks of a block of rows, filled up, and their names."""
    chunk = array.chunks
    for place in product(*(range(-(-n // c)) for n, c in zip(array.shape[1:], chunk[1:], strict=True))):
        part = values[(slice(None), *(slice(n * c, (n + 1) * c) for n, c in zip(place, chunk[1:], strict=True)))]
        if part.shape != chunk:
            whole = np.full(chunk, array.fill_value, array.dtype)
            whole[tuple(map(slice, part.shape))] = part
            part = whole
        yield (
            f"{array.path}/{array.metadata.encode_chunk_key((block, *place))}",
            np.ascontiguousarray(part, array.dtype),
        )
