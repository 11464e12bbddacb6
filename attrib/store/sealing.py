"""A store being written: every chunk gets its digest (`seal`), and a commit makes them count.

A commit writes, in this order: the new chunks; where chunks of the growing block are replaced, a header in which both their
old and new digests count, then those chunks; the digests; the header. Killed anywhere in it, a store holds what the last
commit, or this one, left.
"""

import json
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import xxhash
import zarr
from zarr.abc.store import ByteRequest, Store
from zarr.core.buffer import Buffer, BufferPrototype, default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import WrapperStore

from . import chunks
from .disk import Disk
from .metadata import HEADER, Document
from .schema import DIGESTS, create, writable_array
from .seal import Attributes, Words, begun, digest, metadata_digest, sealed, words_of


class SealingStore(WrapperStore[Store]):
    """A store being written: notes the digest of all that goes in. What replaces a committed chunk waits for `commit`.

    name: the store's id. arrays: digest of each array's metadata. recent: chunk -> digests, in the block that grows, as
    committed.
    """

    def __init__(self, store: Store, name: str, growing: bool, attributes: Attributes | None = None) -> None:
        super().__init__(store)
        self._id = name
        facts = (attributes or {}).get("attrib", {}).get("sealed")
        self._growing = growing
        self._attributes = attributes
        self.arrays: dict[str, str] = dict(facts["arrays"]) if facts else {}
        self.recent: dict[str, Words] = {k: words_of(v) for k, v in facts["recent"].items()} if facts else {}
        self._closed = int(facts["closed"]) if facts else 0
        self._chain = xxhash.xxh3_64()
        self._digests: zarr.Array | None = None  # the array
        self._tail = np.zeros(0, np.uint64)  # of the digests that count those in its last chunk
        self._new: dict[str, Words] = {}
        self._waiting: dict[str, Any] = {}
        self.root: Attributes = {}  # other attributes of the root

    def _with_store(self, store: Store) -> "SealingStore":
        raise NotImplementedError

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        if key in self._waiting:
            return prototype.buffer.from_bytes(self._waiting[key])
        return await super().get(key, prototype, byte_range)

    async def exists(self, key: str) -> bool:
        return key in self._waiting or await super().exists(key)

    async def set(self, key: str, value: Buffer) -> None:
        if key.endswith(HEADER):
            self._note(key, value.to_bytes())
        elif not key.startswith(DIGESTS + "/"):
            self._new[key] = (digest(self._id, key, value.as_buffer_like()),)
            if key in self.recent:
                self._waiting[key] = value.as_buffer_like()
                return
        await super().set(key, value)

    def put(self, key: str, parts: Iterable[Any]) -> None:
        """The same of a chunk that comes in parts, and not by way of zarr."""
        if key.startswith(DIGESTS + "/"):
            self._put(key, parts)
            return
        state = begun(self._id, key)

        def noted() -> Iterator[Any]:
            for part in parts:
                state.update(part)
                yield part

        if key in self.recent:
            self._waiting[key] = b"".join(noted())
        else:
            self._put(key, noted())
        self._new[key] = (int(state.intdigest()),)

    def _put(self, key: str, parts: Iterable[Any]) -> None:
        if isinstance(self._store, Disk):
            self._store.put(key, parts)
        else:
            sync(self._store.set(key, default_buffer_prototype().buffer.from_bytes(b"".join(parts))))

    def _note(self, key: str, content: bytes) -> None:
        document: Document = json.loads(content)
        if key == HEADER:
            self.root = document["attributes"]
        elif document["node_type"] == "array":
            self.arrays[key.removesuffix("/" + HEADER)] = metadata_digest(self._id, key, document, self._growing)

    def begin(self, facts: Attributes) -> None:
        """Write a header with no chunk yet; the arrays are there."""
        self._put_header(facts, {})

    def commit(self, facts: Attributes, full: bool) -> None:
        """Make all that was written since the last commit count. full: the block is, and does not grow any more.

        Where it fails nothing counts that did not before, and it may be done again with the same chunks.
        """
        now = {**self.recent, **self._new}
        if self._waiting:
            assert self._attributes is not None
            both = {key: (*self.recent[key], *now[key]) for key in self._waiting}
            self.flush()
            before = self._attributes["attrib"]
            self._put_header(before, {**now, **both}, before["sealed"]["arrays"])  # new ones do not count yet
            for key, content in self._waiting.items():
                self._put(key, [content])
        lengths = self._closed, self._chain, self._tail
        if full:
            self._append(np.array([word for words in now.values() for word in words], dtype=np.uint64))
            now = {}
        self.flush()
        try:
            self._put_header(facts, now)
        except BaseException:
            self._closed, self._chain, self._tail = lengths
            raise
        self.recent = now
        self._new.clear()
        self._waiting.clear()

    def resume(self, digests: np.ndarray) -> None:
        """Go on from the digests (n,) uint64 of the full blocks of a store that was opened again."""
        self._chain.update(digests.tobytes())
        self._digests = writable_array(self, DIGESTS)
        count = self._digests.chunks[0]
        self._tail = digests[len(digests) // count * count :]

    def move(self, place: Any) -> None:
        """The folder has another name now."""
        if isinstance(self._store, Disk):
            self._store.root = place

    def flush(self) -> None:
        if isinstance(self._store, Disk):
            self._store.flush()

    def _append(self, words: np.ndarray) -> None:
        array = writable_array(self, DIGESTS) if self._digests is None else self._digests
        first, closed, tail = self._closed - len(self._tail), self._closed + len(words), np.append(self._tail, words)
        self._digests = array = chunks.grown(array, closed)
        chunks.put(array, first, tail)
        full = (closed - first) // array.chunks[0] * array.chunks[0]
        self._closed, self._chain, self._tail = closed, self._chain.copy(), tail[full:]
        self._chain.update(words.tobytes())

    def _put_header(self, facts: Attributes, recent: dict[str, Words], arrays: dict[str, str] | None = None) -> None:
        lists = {
            "arrays": dict(self.arrays if arrays is None else arrays),
            "closed": self._closed,
            "chain": self._chain.hexdigest(),
            "recent": {key: " ".join(f"{word:016x}" for word in words) for key, words in recent.items()},
        }
        attributes = {**self.root, "attrib": {**facts, "sealed": lists}}
        sync(self._store.set(HEADER, default_buffer_prototype().buffer.from_bytes(sealed(attributes))))
        self._attributes = attributes
        self.flush()


def create_digests(group: zarr.Group) -> None:
    create(group, DIGESTS, (0,), (4096,), np.uint64, ("chunk",))
