"""A store being read: what comes out of it is what was written, where it was written, or an error that names the file."""

from collections.abc import Iterable
from io import FileIO
from math import prod
from typing import Any

import numpy as np
import xxhash
import zarr
from zarr.abc.store import ByteRequest, Store
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.core.sync import sync
from zarr.storage import WrapperStore

from ..errors import StoreError
from .disk import Disk
from .metadata import HEADER, Document, bounded, canonical, check_array, check_packed, chunk_bytes, parse
from .schema import DIGESTS
from .seal import Attributes, Unsealed, digest, fetch_async, metadata_digest, opened, sealed, words_of

GROUP = {"attributes": {}, "zarr_format": 3, "node_type": "group"}  # the document of an inner one


class CheckedStore(WrapperStore[Store]):
    """A store being read: hands out what was written and nothing else. Arrays that the header does not name are not there.

    Raises, from whatever reads through it:
        StoreError: a file is missing, damaged, another one's, or no such as attrib writes; it is named.
    """

    def __init__(self, store: Store, attributes: Attributes, where: Any, growing: bool) -> None:
        super().__init__(store)
        self.where, self._growing = where, growing
        self._root = attributes
        self._known: np.ndarray | None = None
        self._documents: dict[str, Document] = {}

    @property
    def attributes(self) -> Attributes:
        """Of the root, those of attrib among them."""
        return self._root

    @property
    def facts(self) -> Attributes:
        """The header: the attributes of attrib."""
        facts: Attributes = self._root["attrib"]
        return facts

    @property
    def arrays(self) -> dict[str, str]:
        """Of those that the header names, the digest of their metadata."""
        arrays: dict[str, str] = self.facts["sealed"]["arrays"]
        return arrays

    async def getsize(self, key: str) -> int:
        return await self._store.getsize(key)

    def size(self, key: str) -> int:
        """Of a file, in bytes; on a disk of this machine forty times as fast as by way of zarr.

        Raises:
            FileNotFoundError.
        """
        return self._store.size(key) if isinstance(self._store, Disk) else sync(self._store.getsize(key))

    def with_read_only(self, read_only: bool = False) -> "CheckedStore":
        return self

    def _with_store(self, store: Store) -> "CheckedStore":
        return CheckedStore(store, self._root, self.where, self._growing)

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        if key.endswith(HEADER):
            content = sealed(self._root) if key == HEADER else await self._metadata(key)
            return None if content is None else prototype.buffer.from_bytes(content)
        name = key.rsplit("/c", 1)[0]
        if name not in self.arrays:  # what zarr looks for of other formats
            return None
        value = await fetch_async(self._store, key, prototype)
        if value is None:
            raise missing(key, self.where)
        if name != DIGESTS:
            await self._check(key, digest(self.facts["id"], key, value.as_buffer_like()))
        check_packed(len(value), chunk_bytes(await self._document(name)), key, self.where)
        return value

    async def _metadata(self, key: str) -> bytes | None:
        name = key.removesuffix("/" + HEADER)
        if name in self.arrays:
            return canonical(await self._document(name))
        return None if name not in self.groups else (await self._group(key)).to_bytes()

    @property
    def groups(self) -> set[str]:
        """Those that arrays stand in, below the root."""
        return {name.rsplit("/", n)[0] for name in self.arrays for n in range(1, name.count("/") + 1)}

    async def _group(self, key: str) -> Buffer:
        content = await fetch_async(self._store, key)
        if content is None or parse(content.to_bytes(), key, self.where) != GROUP:
            raise StoreError(
                f"a metadata file is {'missing' if content is None else 'damaged'}: expected a group without attributes, at "
                f"file {key} in {self.where}. Restore it from a copy."
            )
        return content

    async def _document(self, name: str) -> Document:
        if name not in self._documents:
            key = f"{name}/{HEADER}"
            content = await fetch_async(self._store, key)
            if content is None:
                raise StoreError(
                    f"an array is missing: expected {name!r}, file {key} in {self.where}. Restore it from a copy."
                )
            document = parse(content.to_bytes(), key, self.where)
            check_array(document, key, self.where)
            if metadata_digest(self.facts["id"], key, document, self._growing) != self.arrays[name]:
                await self._newest()
                raise StoreError(
                    f"a metadata file is damaged: its digest is another one, expected it as it was written, at file {key} "
                    f"in {self.where}. Restore it from a copy."
                )
            self._documents[name] = bounded(document, self._most()) if self._growing else document
        return self._documents[name]

    def _most(self) -> int:
        """Entries along any dimension that grows, as the header counts them."""
        facts = self.facts
        tables = *facts["rows"], *facts["shared"], *facts["ids"]
        return max(int(facts["written_steps"]) + 1, facts["slots"], facts["sealed"]["closed"], *tables)

    def file(self, key: str, size: int) -> FileIO | None:
        """A chunk's file, to be read past zarr and then checked; None where it is not of that size, or no file."""
        return self._store.file(key, size) if isinstance(self._store, Disk) else None

    def check(self, key: str, word: int) -> None:
        """Raise StoreError where a chunk's digest is not in the set."""
        if not self._knows(word):
            sync(self._check(key, word))

    def _knows(self, word: int) -> bool:
        if self._known is None:
            return False
        at = int(np.searchsorted(self._known, np.uint64(word)))
        return at < len(self._known) and int(self._known[at]) == word

    async def _check(self, key: str, word: int) -> None:
        """Raise StoreError where a chunk is not in the set, as it is now: a run may go on while it is read."""
        for again in (False, True):
            if self._known is None or again:
                self._known = await self._digests(again)
            if self._knows(word):
                return
        raise StoreError(
            f"a chunk is damaged: its digest is another one, expected the bytes that were written there, at file {key} in "
            f"{self.where}. Restore the file from a copy; the rest of it is readable."
        )

    async def _digests(self, again: bool) -> np.ndarray:
        """All of them, in order."""
        facts = await self._newest() if again else self.facts
        lists = facts["sealed"]
        words = await self._closed(int(lists["closed"]), str(lists["chain"]))
        recent = [word for text in lists["recent"].values() for word in words_of(text)]
        return np.sort(np.concatenate([words, np.array(recent, dtype=np.uint64)]))

    async def _newest(self) -> Attributes:
        """The header as it is now. Raises StoreError where another store stands there."""
        content = await fetch_async(self._store, HEADER)
        try:
            newer: Attributes = self.facts if content is None else opened(content.to_bytes(), self.where)["attrib"]
        except Unsealed:
            return self.facts
        if newer["id"] != self.facts["id"]:
            raise StoreError(
                f"the store is another one now: expected {self.facts['id']}, which was overwritten or compacted since it "
                f"was opened, at {self.where}. Open it again."
            )
        return newer

    async def _closed(self, count: int, chain: str) -> np.ndarray:
        if not count:
            return np.zeros(0, np.uint64)
        try:
            array = await zarr.api.asynchronous.open_array(store=self, path=DIGESTS, mode="r", zarr_format=3)
            words = np.asarray(await array.getitem(slice(0, count))).astype(np.uint64)
        except StoreError:
            raise
        except Exception as error:
            await self._newest()
            raise StoreError(
                f"the digests are damaged: got {str(error)[:200]!r}, expected what was written, at array {DIGESTS!r} in "
                f"{self.where}. Restore it from a copy."
            ) from error
        if xxhash.xxh3_64_hexdigest(words.tobytes()) != chain:
            await self._newest()
            raise StoreError(
                f"the digests are damaged: theirs is another one, expected it as it was written, at array {DIGESTS!r} in "
                f"{self.where}. Restore it from a copy."
            )
        return words

    def closed(self) -> np.ndarray:
        """The digests (n,) uint64 of all full blocks, in the order they were written."""
        lists = self.facts["sealed"]
        return sync(self._closed(int(lists["closed"]), str(lists["chain"])))

    async def list_dir(self, prefix: str) -> Any:
        """Names of the arrays and groups in a group, of those that the header names."""
        start = f"{prefix.strip('/')}/" if prefix.strip("/") else ""
        inside = (array[len(start) :] for array in self.arrays if array.startswith(start))
        for name in dict.fromkeys([HEADER, *(rest.split("/")[0] for rest in inside)]):
            yield name


def missing(key: str, where: Any) -> StoreError:
    return StoreError(
        f"a chunk is missing: expected file {key} in {where}. Restore it from a copy; the rest of it is readable."
    )


def check_present(store: CheckedStore, array: zarr.Array, keys: Iterable[str]) -> None:
    """Raise StoreError at the first chunk of an array that is not there, or too short for what it should hold."""
    decoded = prod(array.chunks) * array.dtype.itemsize
    for key in keys:
        try:
            size = store.size(key)
        except FileNotFoundError:
            raise missing(key, store.where) from None
        check_packed(size, decoded, key, store.where)
