"""A finished run in less room: its vectors, which are recorded as they lie, compressed, and all else copied as it is.

The new store is written beside the old one, read again and compared, and then takes its place at one stroke. It has an id of
its own: whoever has the old one open meets chunks that are another store's, not bytes to be read by the wrong codec.
"""

import uuid
from pathlib import Path
from typing import Any, NamedTuple

import zarr
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync

from ..errors import StoreError
from .disk import Disk
from .lease import Lease
from .metadata import HEADER
from .owner import check_target
from .place import beside, discard, folder_bytes, locate, settle
from .reader import Reader, dimensions
from .schema import CHUNK_BYTES, create
from .sealing import SealingStore, create_digests


class Compaction(NamedTuple):
    """Bytes of a store before and after.

    Example:
        >>> before, after = attrib.compact("run.zarr")
        >>> 0 < after <= before
        True
    """

    before: int
    after: int


def compact(store: Any) -> Compaction:
    """Store a finished run in less room; every array keeps its values, bit for bit.

    Args:
        store: path of the run, a folder of this machine. While it is rewritten there are two of it.

    Returns:
        Bytes before and after.

    Raises:
        StoreError: it is no run in a folder, not finished, or damaged; it is as it was.
        StoreExistsError: it is being written, or something else is in it that attrib did not write.

    Example:
        >>> attrib.compact("run.zarr")
        Compaction(before=..., after=...)
        >>> attrib.open_run("run.zarr").steps
        12
    """
    reader = Reader(store)
    place = locate(store)
    if not isinstance(place, Path) or not place.is_dir():
        raise StoreError(
            f"the run cannot be rewritten: got {store}, expected a folder. Compact it before it is packed."
        )
    place = place.resolve()
    check_target(place, overwrite=True)
    held = Lease(place)
    try:
        if not reader.complete:
            raise StoreError(
                f"the run is not finished: got {reader.steps} steps of a run that ended early, at {place}. Go on with it "
                f"(attrib.record(..., resume=True)) and close it; it is as it was."
            )
        return _replaced(place, Reader(place))
    finally:
        held.release()


def _replaced(place: Path, reader: Reader) -> Compaction:
    made, before = beside(place), folder_bytes(place)
    try:
        _write(reader, made)
        _compare(reader, Reader(made))
        after = folder_bytes(made)
        replaced = settle(made, place, overwrite=True)
    except BaseException:
        if made.exists():
            discard(made)
        raise
    if replaced is not None:
        discard(replaced)
    return Compaction(before, after)


def _write(reader: Reader, made: Path) -> None:
    facts = {key: value for key, value in reader.header.items() if key not in ("sealed", "seal")}
    facts["id"] = uuid.uuid4().hex
    sealing = SealingStore(Disk(made), facts["id"], growing=True)
    group = zarr.create_group(sealing, zarr_format=3)
    sealing.root = {key: value for key, value in reader.store.attributes.items() if key != "attrib"}
    create_digests(group)
    for name in sorted(reader.store.groups):
        _copy(reader, f"{name}/{HEADER}", sealing)
    for name in reader.names():
        if _is_packed(reader, name):
            _pack(reader, name, group)
        else:
            for key in (f"{name}/{HEADER}", *reader.keys(reader.array(name), slice(0, reader.committed(name)))):
                _copy(reader, key, sealing)
    sealing.commit(facts, full=True)


def _is_packed(reader: Reader, name: str) -> bool:
    """Whether an array is written anew: vectors, and those that have rows."""
    array = reader.array(name)
    return array.ndim == 2 and dimensions(array)[-1] == "parameter" and reader.committed(name) > 0


def _copy(reader: Reader, key: str, sealing: SealingStore) -> None:
    """A file as it is; that it was what had been written is checked on the way."""
    content = sync(reader.store.get(key, default_buffer_prototype()))
    assert content is not None  # a missing one is an error before
    sync(sealing.set(key, content))


def _pack(reader: Reader, name: str, group: zarr.Group) -> None:
    """In chunks of as many rows as it had, which is how they are read."""
    array, rows = reader.array(name), reader.committed(name)
    size, count = array.shape[1], array.chunks[0]
    entries = min(size, max(1, 4 * CHUNK_BYTES // (count * array.dtype.itemsize)))
    states, attributes = name == "theta" and count > 1, dict(array.attrs)
    shape, chunks, fill = (rows, size), (count, entries), array.fill_value
    made = create(group, name, shape, chunks, array.dtype, dimensions(array), fill, states, attributes)
    for first in range(0, rows, count):
        made[first : first + count] = reader.read(name, slice(first, min(first + count, rows)))


def _compare(reader: Reader, made: Reader) -> None:
    """Raise StoreError where a vector is another one than it was."""
    for name in filter(lambda name: _is_packed(reader, name), reader.names()):
        count, rows = reader.array(name).chunks[0], reader.committed(name)
        for first in range(0, rows, count):
            part = slice(first, min(first + count, rows))
            if reader.read(name, part).tobytes() != made.read(name, part).tobytes():
                raise StoreError(
                    f"the rewritten run is not the same: got other bits, at {name!r}, rows {part.start} to {part.stop - 1}, "
                    f"of {reader.target}. The run is as it was; look at the disk."
                )
