"""Digests over all that a store holds, so that what is read is what was written, where it was written.

Every chunk has a digest over its name and its bytes; a store is the set of them. Those of full blocks stand one after
another in the array `digests [chunk]`, those of the block that is still growing in the header, with the digest of the
array's so far (`chain`) and one of each array's metadata. The header has a digest of itself (`seal`). Two chunks exchanged,
one of another run, an edited count, a swapped name: none is in the set.

XXH3 (Collet 2019), 64 bits: damage passes with a chance of 2^-64 a chunk. It is no signature: who means to deceive can.

A commit writes, in this order: the new chunks; where chunks of the growing block are replaced, a header in which both their
old and new digests count, then those chunks; the digests; the header. Killed anywhere in it, a store holds what the last
commit, or this one, left.
"""

import json
from collections.abc import Iterable
from typing import Any

import numpy as np
import xxhash
import zarr
from zarr.abc.store import ByteRequest, Store
from zarr.core.buffer import Buffer, BufferPrototype, default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import WrapperStore

from ..errors import StoreError
from .disk import Disk
from .metadata import HEADER, Document, canonical, check_array, check_packed, chunk_bytes, parse
from .schema import DIGESTS, FORMAT, create, writable_array

Attributes = dict[str, Any]
GROUP = {"attributes": {}, "zarr_format": 3, "node_type": "group"}  # the document of an inner one
Words = tuple[int, ...]  # digests of a chunk: two while it is being replaced


def digest(name: str, content: Any) -> int:
    """Of some bytes under their name."""
    return xxhash.xxh3_64_intdigest(content, seed=xxhash.xxh3_64_intdigest(name.encode()))


def sealed(attributes: Attributes) -> bytes:
    """The document of a store's root. attributes: with those of attrib under "attrib", which gets the seal."""
    facts = {**attributes["attrib"], "seal": _seal(attributes)}
    return json.dumps({"zarr_format": 3, "node_type": "group", "attributes": {**attributes, "attrib": facts}}).encode()


def _seal(attributes: Attributes) -> str:
    facts = {key: value for key, value in attributes["attrib"].items() if key != "seal"}
    return f"{digest(HEADER, canonical({**attributes, 'attrib': facts})):016x}"


def opened(content: bytes, where: Any) -> Attributes:
    """The attributes of a store's root, as they were sealed.

    Raises:
        StoreError: damaged, or not sealed: attrib did not write it, or an attrib of before there were seals.
    """
    found = parse(content, HEADER, where).get("attributes")
    attributes: Attributes = found if isinstance(found, dict) else {}
    facts = attributes.get("attrib")
    if not isinstance(facts, dict) or "seal" not in facts:
        raise Unsealed(attributes)
    if _seal(attributes) != facts["seal"]:
        if isinstance(facts.get("format"), int) and facts["format"] > FORMAT:  # a newer one may be sealed otherwise
            raise Unsealed(attributes)
        raise StoreError(
            f"the header is damaged: its digest is another one, expected it as it was written, at file {HEADER} in {where}. "
            f"Restore it from a copy."
        )
    return attributes


class Unsealed(Exception):
    """A group whose header has no seal."""

    def __init__(self, attributes: Attributes) -> None:
        super().__init__("no seal")
        self.attributes = attributes


def fetch(store: Store, key: str) -> bytes | None:
    """The bytes under a key, None where there are none.

    Raises:
        StoreError: they cannot be read.
    """
    value = sync(_fetch(store, key))
    return None if value is None else value.to_bytes()


async def _fetch(store: Store, key: str, prototype: BufferPrototype | None = None) -> Buffer | None:
    try:
        return await store.get(key, prototype or default_buffer_prototype())
    except StoreError:
        raise
    except Exception as error:
        raise StoreError(f"a file cannot be read: got {error!r}, at {key} in {store}. Look at the disk.") from error


class SealingStore(WrapperStore[Store]):
    """A store being written: notes the digest of all that goes in. What replaces a committed chunk waits for `commit`.

    arrays: digest of each array's metadata. recent: chunk -> digests, in the block that grows, as committed.
    """

    def __init__(self, store: Store, growing: bool, attributes: Attributes | None = None) -> None:
        super().__init__(store)
        facts = (attributes or {}).get("attrib", {}).get("sealed")
        self._growing = growing
        self._attributes = attributes
        self.arrays: dict[str, str] = dict(facts["arrays"]) if facts else {}
        self.recent: dict[str, Words] = {k: _words(v) for k, v in facts["recent"].items()} if facts else {}
        self._closed = int(facts["closed"]) if facts else 0
        self._chain = xxhash.xxh3_64()
        self._new: dict[str, Words] = {}
        self._waiting: dict[str, Buffer] = {}
        self.root: Attributes = {}  # other attributes of the root

    def _with_store(self, store: Store) -> "SealingStore":
        raise NotImplementedError

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        return self._waiting.get(key) or await super().get(key, prototype, byte_range)

    async def exists(self, key: str) -> bool:
        return key in self._waiting or await super().exists(key)

    async def set(self, key: str, value: Buffer) -> None:
        if key.endswith(HEADER):
            self._note(key, value.to_bytes())
        elif not key.startswith(DIGESTS + "/"):
            self._new[key] = (digest(key, value.as_buffer_like()),)
            if key in self.recent:
                self._waiting[key] = value
                return
        await super().set(key, value)

    def _note(self, key: str, content: bytes) -> None:
        document: Document = json.loads(content)
        if key == HEADER:
            self.root = document["attributes"]
        elif document["node_type"] == "array":
            self.arrays[key.removesuffix("/" + HEADER)] = metadata_digest(key, document, self._growing)

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
            self._put_header(self._attributes["attrib"], {**now, **both})
            for key, value in self._waiting.items():
                sync(self._store.set(key, value))
        before = self._closed, self._chain
        if full:
            self._append(np.array([word for words in now.values() for word in words], dtype=np.uint64))
            now = {}
        self.flush()
        try:
            self._put_header(facts, now)
        except BaseException:
            self._closed, self._chain = before
            raise
        self.recent = now
        self._new.clear()
        self._waiting.clear()

    def resume(self, digests: np.ndarray) -> None:
        """Go on from the digests (n,) uint64 of the full blocks of a store that was opened again."""
        self._chain.update(digests.tobytes())

    def move(self, place: Any) -> None:
        """The folder has another name now."""
        if isinstance(self._store, Disk):
            self._store.root = place

    def flush(self) -> None:
        if isinstance(self._store, Disk):
            self._store.flush()

    def _append(self, words: np.ndarray) -> None:
        array = writable_array(self, DIGESTS)
        array.resize((self._closed + len(words),))
        array[self._closed :] = words
        self._closed, self._chain = self._closed + len(words), self._chain.copy()
        self._chain.update(words.tobytes())

    def _put_header(self, facts: Attributes, recent: dict[str, Words]) -> None:
        lists = {
            "arrays": dict(self.arrays),
            "closed": self._closed,
            "chain": self._chain.hexdigest(),
            "recent": {key: " ".join(f"{word:016x}" for word in words) for key, words in recent.items()},
        }
        attributes = {**self.root, "attrib": {**facts, "sealed": lists}}
        sync(self._store.set(HEADER, default_buffer_prototype().buffer.from_bytes(sealed(attributes))))
        self._attributes = attributes
        self.flush()


def _words(text: str) -> Words:
    return tuple(int(word, 16) for word in text.split())


def create_digests(group: zarr.Group) -> None:
    create(group, DIGESTS, (0,), (4096,), np.uint64, ("chunk",))


def metadata_digest(key: str, document: Document, growing: bool) -> str:
    return f"{digest(key, canonical(document, growing)):016x}"


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
        value = await _fetch(self._store, key, prototype)
        if value is None:
            raise missing(key, self.where)
        if name != DIGESTS:
            await self._check(key, value.as_buffer_like())
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
        content = await _fetch(self._store, key)
        if content is None or parse(content.to_bytes(), key, self.where) != GROUP:
            raise StoreError(
                f"a metadata file is {'missing' if content is None else 'damaged'}: expected a group without attributes, at "
                f"file {key} in {self.where}. Restore it from a copy."
            )
        return content

    async def _document(self, name: str) -> Document:
        if name not in self._documents:
            key = f"{name}/{HEADER}"
            content = await _fetch(self._store, key)
            if content is None:
                raise StoreError(
                    f"an array is missing: expected {name!r}, file {key} in {self.where}. Restore it from a copy."
                )
            document = parse(content.to_bytes(), key, self.where)
            check_array(document, key, self.where)
            if metadata_digest(key, document, self._growing) != self.arrays[name]:
                raise StoreError(
                    f"a metadata file is damaged: its digest is another one, expected it as it was written, at file {key} "
                    f"in {self.where}. Restore it from a copy."
                )
            self._documents[name] = document
        return self._documents[name]

    async def _check(self, key: str, content: Any) -> None:
        """Raise StoreError where a chunk is not in the set, as it is now: a run may go on while it is read."""
        word = np.uint64(digest(key, content))
        for again in (False, True):
            if self._known is None or again:
                self._known = await self._digests(again)
            at = int(np.searchsorted(self._known, word))
            if at < len(self._known) and self._known[at] == word:
                return
        raise StoreError(
            f"a chunk is damaged: its digest is another one, expected the bytes that were written there, at file {key} in "
            f"{self.where}. Restore the file from a copy; the rest of it is readable."
        )

    async def _digests(self, again: bool) -> np.ndarray:
        """All of them, in order."""
        facts = self.facts
        if again:
            content = await _fetch(self._store, HEADER)
            newer = facts if content is None else opened(content.to_bytes(), self.where)["attrib"]
            facts = newer if newer.get("id") == facts.get("id") else facts
        lists = facts["sealed"]
        words = await self._closed(int(lists["closed"]), str(lists["chain"]))
        recent = [word for text in lists["recent"].values() for word in _words(text)]
        return np.sort(np.concatenate([words, np.array(recent, dtype=np.uint64)]))

    async def _closed(self, count: int, chain: str) -> np.ndarray:
        if not count:
            return np.zeros(0, np.uint64)
        array = await zarr.api.asynchronous.open_array(store=self, path=DIGESTS, mode="r", zarr_format=3)
        words = np.asarray(await array.getitem(slice(0, count))).astype(np.uint64)
        if xxhash.xxh3_64_hexdigest(words.tobytes()) != chain:
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


def check_present(array: zarr.Array, keys: Iterable[str], where: Any) -> None:
    """Raise StoreError at the first chunk of an array that is not there, or too short for what it should hold."""
    decoded = int(np.prod(array.chunks, dtype=np.int64)) * array.dtype.itemsize
    for key in keys:
        try:
            size = sync(array.store.getsize(key))
        except FileNotFoundError:
            raise missing(key, where) from None
        check_packed(size, decoded, key, where)
