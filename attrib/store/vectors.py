"""Vectors (row, parameter), which are written from where they lie and read to where they are wanted.

What training leaves of a float hardly compresses (states to .87, gradients to .89 by lz4), and a compressor takes ten times
as long over it as a digest and four times as long as the file. So a chunk that is full is not compressed. It is a frame of
Blosc all the same, one that says "as it is": 16 bytes, then the chunk. Every reader of Zarr takes either kind of frame; what
is not full is compressed, so that its rest takes no room. `compact` compresses all.
"""

import struct
from collections.abc import Iterable, Iterator, Sequence
from io import FileIO
from math import prod
from typing import Any

import google_crc32c
import numpy as np
import zarr

from .checked import CheckedStore
from .chunks import as_now
from .seal import begun
from .sealing import SealingStore

AS_IT_IS = 0x26  # lz4, sorted by bits, "not compressed": the flags of such a frame as Blosc makes it
BLOCK = 8192  # of a frame, in bytes, at most: Blosc reads so much at a time
CHECKSUM = 4  # bytes behind a chunk
SLICE = 1 << 20  # bytes that the cache of a core holds
SMALL = 1 << 18  # bytes of a row up to which several are copied to one place, to be dealt with at once


def head(size: int, itemsize: int) -> bytes:
    """Of a frame of Blosc (format 2) that holds `size` bytes as they are."""
    return struct.pack("<4B3I", 2, 1, AS_IT_IS, itemsize, size, min(size, BLOCK), size + 16)


def are_vectors(array: zarr.Array) -> bool:
    """Whether full chunks of an array can be such frames."""
    metadata: Any = array.metadata
    return array.ndim == 2 and (metadata.dimension_names or ("",))[-1] == "parameter" and as_now(array)


def put(store: SealingStore, array: zarr.Array, start: int, rows: Sequence[np.ndarray]) -> int:
    """Write those of the rows (P,) from row `start` on that fill chunks, the first ones: how many they are."""
    count = array.chunks[0]
    if start % count or not are_vectors(array):
        return 0
    full = len(rows) // count * count
    for first in range(0, full, count):
        for key, part in _chunks(array, (start + first) // count):
            store.put(key, _frame([row[part] for row in rows[first : first + count]], array))
    return full


def take(store: CheckedStore, array: zarr.Array, first: int, out: np.ndarray) -> Iterator[slice]:
    """Read the rows (n, P) from row `first` on to `out`; those that are yielded could not be, they are compressed."""
    count, stop = array.chunks[0], first + len(out)
    other = np.empty(array.chunks[1], array.dtype)
    for block in range(first // count, -(-stop // count) if len(out) else 0):
        low, high = max(first, block * count), min(stop, (block + 1) * count)
        for key, part in _chunks(array, block):
            wanted: list[np.ndarray] = [row[part] for row in out[low - first : high - first]]
            if part.stop - part.start == array.chunks[1] == out.shape[1] and out.flags.c_contiguous:
                wanted = [out[low - first : high - first].reshape(-1)]  # one behind the other as in the chunk
            others = other[: part.stop - part.start]
            wanted = [others] * (low - block * count) + wanted + [others] * ((block + 1) * count - high)
            if not _read(store, key, wanted, array):
                yield slice(low, high)
                break


def _chunks(array: zarr.Array, block: int) -> Iterator[tuple[str, slice]]:
    """Of some rows, their names and parts of a row."""
    size, width = array.shape[1], array.chunks[1]
    for n, first in enumerate(range(0, size, width)):
        yield f"{array.path}/{array.metadata.encode_chunk_key((block, n))}", slice(first, min(size, first + width))


def _padding(rows: Sequence[np.ndarray], width: int) -> np.ndarray:
    """Behind each row of the last chunk, which is as wide as the others."""
    return np.zeros(max(0, width - len(rows[0])), rows[0].dtype)


def _frame(rows: Sequence[np.ndarray], array: zarr.Array) -> Iterator[Any]:
    """The bytes of a chunk's file, in parts."""
    chunks = array.chunks
    size, pad = prod(chunks) * rows[0].itemsize, _padding(rows, chunks[1])
    checksum = 0
    for part in _sliced([np.frombuffer(head(size, rows[0].itemsize), np.uint8), *_padded(_gathered(rows, pad), pad)]):
        checksum = google_crc32c.extend(checksum, part)
        yield part
    yield checksum.to_bytes(CHECKSUM, "little")


def _gathered(rows: Sequence[np.ndarray], pad: np.ndarray) -> Iterable[np.ndarray]:
    """The rows, short ones several in one."""
    if len(pad) or rows[0].nbytes >= SMALL:
        return rows
    count = SLICE // max(1, rows[0].nbytes)
    return (np.concatenate(rows[first : first + count]) for first in range(0, len(rows), count))


def _padded(rows: Iterable[np.ndarray], pad: np.ndarray) -> Iterator[np.ndarray]:
    """Their bytes."""
    for row in rows:
        yield row.view(np.uint8)
        if len(pad):
            yield pad.view(np.uint8)


def _sliced(parts: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Parts of a file, cut where SLICE of it are full: what is done to a slice finds it in the cache."""
    at = 0
    for part in parts:
        first = 0
        while first < len(part):
            piece = part[first : first + SLICE - at % SLICE]
            yield piece
            first, at = first + len(piece), at + len(piece)


def _read(store: CheckedStore, key: str, rows: Sequence[np.ndarray], array: zarr.Array) -> bool:
    """Fill the rows from a chunk's file, checked by its digest; False where it is no such frame."""
    size, pad = prod(array.chunks) * rows[0].itemsize, _padding(rows, array.chunks[1])
    file = store.file(key, len(head(0, 0)) + size + CHECKSUM)
    if file is None:
        return False
    with file:
        expected = head(size, rows[0].itemsize)
        if file.read(len(expected)) != expected:
            return False
        found = begun(store.facts["id"], key)
        found.update(expected)
        for part in _sliced(_padded(rows, pad)):
            _fill(file, part)
            found.update(part)
        found.update(file.read(CHECKSUM))
    store.check(key, int(found.intdigest()))
    return True


def _fill(file: FileIO, memory: np.ndarray) -> None:
    """With what comes next; the digest tells whether that was enough."""
    read = 0
    while read < len(memory) and (more := file.readinto(memory[read:].data)):
        read += more
