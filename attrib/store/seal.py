"""Digests over all that a store holds, so that what is read is what was written, where it was written.

Every chunk has a digest over the store's id, its name and its bytes; a store is the set of them. Those of full blocks stand
one after another in the array `digests [chunk]`, those of the block that is still growing in the header, with the digest of
the array's so far (`chain`) and one of each array's metadata. The header has a digest of itself (`seal`). Two chunks
exchanged, one of another run, an edited count, a swapped name: none is in the set.

XXH3 (Collet 2019), 64 bits: damage passes with a chance of 2^-64 a chunk. It is no signature: who means to deceive can.
"""

import json
import re
from typing import Any

import xxhash
from zarr.abc.store import Store
from zarr.core.buffer import Buffer, BufferPrototype, default_buffer_prototype
from zarr.core.sync import sync

from ..errors import StoreError
from .metadata import HEADER, Document, canonical, parse
from .schema import FORMAT

Attributes = dict[str, Any]
Words = tuple[int, ...]  # digests of a chunk: two while it is being replaced


def digest(store: str, name: str, content: Any) -> int:
    """Of some bytes under their name, in the store of an id."""
    return xxhash.xxh3_64_intdigest(content, seed=xxhash.xxh3_64_intdigest(f"{store}/{name}".encode()))


def begun(store: str, name: str) -> Any:
    """The state of `digest`, for bytes that come in parts."""
    return xxhash.xxh3_64(seed=xxhash.xxh3_64_intdigest(f"{store}/{name}".encode()))


def sealed(attributes: Attributes) -> bytes:
    """The document of a store's root. attributes: with those of attrib under "attrib", which gets the seal."""
    facts = {**attributes["attrib"], "seal": _seal(attributes)}
    return json.dumps({"zarr_format": 3, "node_type": "group", "attributes": {**attributes, "attrib": facts}}).encode()


def _seal(attributes: Attributes) -> str:
    facts = {key: value for key, value in attributes["attrib"].items() if key != "seal"}
    content = json.dumps({**attributes, "attrib": facts}).encode()  # in their order: names are numbered by it
    return f"{digest('', HEADER, content):016x}"


def opened(content: bytes, where: Any) -> Attributes:
    """The attributes of a store's root, as they were sealed.

    Raises:
        StoreError: damaged, or not sealed: attrib did not write it, or an attrib of before there were seals.
    """
    found = parse(content, HEADER, where).get("attributes")
    attributes: Attributes = found if isinstance(found, dict) else {}
    facts: Any = attributes.get("attrib")
    named = isinstance(facts, dict) and "seal" in facts and isinstance(facts.get("id"), str)
    if not named or not _are_lists(facts.get("sealed")):
        raise Unsealed(attributes)
    if _seal(attributes) != facts["seal"]:
        if isinstance(facts.get("format"), int) and facts["format"] > FORMAT:  # a newer one may be sealed otherwise
            raise Unsealed(attributes)
        raise StoreError(
            f"the header is damaged: its digest is another one, expected it as it was written, at file {HEADER} in {where}. "
            f"Restore it from a copy."
        )
    return attributes


def _are_lists(value: Any) -> bool:
    """Whether these are digests, as `sealing` writes them."""
    if (
        not isinstance(value, dict)
        or not isinstance(value.get("closed"), int)
        or not isinstance(value.get("chain"), str)
    ):
        return False
    texts = [value.get(name) for name in ("arrays", "recent")]
    return all(isinstance(t, dict) and all(re.fullmatch(r"[0-9a-f ]+", str(v)) for v in t.values()) for t in texts)


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
    value = sync(fetch_async(store, key))
    return None if value is None else value.to_bytes()


async def fetch_async(store: Store, key: str, prototype: BufferPrototype | None = None) -> Buffer | None:
    try:
        return await store.get(key, prototype or default_buffer_prototype())
    except StoreError:
        raise
    except FileNotFoundError:
        return None
    except Exception as error:
        raise StoreError(f"a file cannot be read: got {error!r}, at {key} in {store}. Look at the disk.") from error


def metadata_digest(store: str, key: str, document: Document, growing: bool) -> str:
    return f"{digest(store, key, canonical(document, growing)):016x}"


def words_of(text: str) -> Words:
    return tuple(int(word, 16) for word in text.split())
