"""The metadata documents of a store, looked at before zarr makes anything of them.

An array is one of Zarr v3, of plain numbers, in regular chunks, through codecs of a short list: what a document names is
made when the array is opened, so a document that names anything else is refused first. Its digest leaves out the lengths
that grow while a run is recorded; the header bounds those.
"""

import json
from math import prod
from typing import Any

import numpy as np

from ..errors import StoreError

Document = dict[str, Any]

CODECS = {"transpose", "bytes", "blosc", "crc32c"}
TYPES = {"bool", *(f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64))} | {
    *("float16", "float32", "float64", "complex64", "complex128")
}
GROWING = {
    "step",
    "state",
    "frame",
    "row",
    "slot",
    "chunk",
    "id",
    "utf8",
}  # dimensions of a run that is being recorded
LARGEST = 64 << 20  # bytes of a document
PACKED = 300  # a chunk's bytes for one of its file's, at most: lz4 packs 255 into one
HEADER = "zarr.json"


def parse(content: bytes, key: str, where: Any) -> Document:
    """A metadata document.

    Raises:
        StoreError: not JSON, not one of Zarr v3.
    """
    try:
        document = json.loads(content)
        if not isinstance(document, dict):
            raise ValueError("no JSON object")
    except (ValueError, RecursionError) as error:
        raise StoreError(
            f"a metadata file is damaged: got {str(error)[:100]}, expected a JSON object, at file {key} in {where}. Restore "
            f"it from a copy."
        ) from None
    if document.get("zarr_format") != 3 or document.get("node_type") not in ("array", "group"):
        raise StoreError(
            f"a metadata file is not Zarr's: got zarr_format {document.get('zarr_format')!r} and node_type "
            f"{document.get('node_type')!r}, expected 3 and 'array' or 'group', at file {key} in {where}. Restore it from a "
            f"copy."
        )
    return document


def canonical(document: Any, growing: bool = False) -> bytes:
    """The document in one spelling; with `growing`, without the lengths that recording changes."""
    if growing:
        names = document.get("dimension_names") or ()
        shape = [None if name in GROWING else n for name, n in zip(names, document["shape"], strict=False)]
        document = {**document, "shape": shape}
    return json.dumps(document, sort_keys=True, separators=(",", ":")).encode()


def check_array(document: Document, key: str, where: Any) -> None:
    """Raise StoreError where an array is not such as attrib writes."""
    wrong = _wrong(document)
    if wrong is not None:
        raise StoreError(
            f"an array is not one that attrib writes: got {wrong}, at file {key} in {where}. Restore the file from a copy; "
            f"if it came from somebody else, do not trust it."
        )


def _wrong(document: Document) -> str | None:
    try:
        shape, names = document["shape"], document.get("dimension_names") or ()
        chunks = document["chunk_grid"]["configuration"]["chunk_shape"]
        codecs = [codec if isinstance(codec, str) else codec["name"] for codec in document["codecs"]]
        if not all(isinstance(n, int) and n >= 0 for n in shape) or not all(
            isinstance(n, int) and n > 0 for n in chunks
        ):
            return f"shape {shape!r} in chunks {chunks!r}"
        if not len(shape) == len(chunks) == len(names):
            return f"shape {shape!r}, chunks {chunks!r}, dimensions {names!r}"
        if document["chunk_grid"]["name"] != "regular" or document["chunk_key_encoding"]["name"] != "default":
            return f"chunk grid {document['chunk_grid']!r}, keys {document['chunk_key_encoding']!r}"
        if unknown := [name for name in codecs if name not in CODECS]:
            return f"codec {unknown[0]!r}"
        if str(document["data_type"]) not in TYPES:
            return f"data type {document['data_type']!r}"
        if document.get("storage_transformers"):
            return "storage transformers"
    except (KeyError, TypeError, AttributeError) as error:
        return f"no {error}"
    return None


def bounded(document: Document, most: int) -> Document:
    """The document with no length that recording changes beyond `most`: the digest leaves those out."""
    names = document.get("dimension_names") or ()
    shape = [min(n, most) if name in GROWING else n for name, n in zip(names, document["shape"], strict=True)]
    return {**document, "shape": shape}


def chunk_bytes(document: Document) -> int:
    """Of one chunk, decoded."""
    return prod(document["chunk_grid"]["configuration"]["chunk_shape"]) * np.dtype(document["data_type"]).itemsize


def check_packed(size: int, decoded: int, key: str, where: Any) -> None:
    """Raise StoreError where a chunk's file cannot hold what the metadata say, before memory is asked for it."""
    if decoded > PACKED * size + 4096:
        raise StoreError(
            f"a chunk is too short for its array: got a file of {size} bytes, expected one that {decoded} bytes fit in, at "
            f"file {key} in {where}. Restore it from a copy."
        )
