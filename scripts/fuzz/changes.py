"""What can happen to the files of a store: functions of all files, of other stores like it and of a generator.

A change returns the files as they are afterwards; what it is given stays as it is. A quarter exchanges valid chunks.
"""

import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

Files = dict[str, bytes]  # by name within the folder
ROOT = "zarr.json"


class Change(NamedTuple):
    """apply: files, those of other stores like it, a generator -> files."""

    kind: str
    apply: Callable[[Files, list[Files], Random], Files]


def files_in(folder: Path) -> Files:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def lay(folder: Path, before: Files, after: Files) -> None:
    """Make a folder that holds `before` hold `after`."""
    for name in before.keys() - after.keys():
        (folder / name).unlink()
        parent = (folder / name).parent
        while not any(parent.iterdir()):  # a file may be a folder afterwards, and back
            parent.rmdir()
            parent = parent.parent
    for name, content in after.items():
        if before.get(name) != content:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)


def chunks(files: Files) -> list[str]:
    return sorted(name for name in files if not name.endswith(ROOT))


def documents(files: Files) -> list[str]:
    return sorted(name for name in files if name.endswith(ROOT))


def array_of(chunk: str) -> str:
    return chunk.rsplit("/c", 1)[0]


# the bytes of a file


def _flip(content: bytes, others: list[bytes], rng: Random) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _truncate(content: bytes, others: list[bytes], rng: Random) -> bytes:
    return content[: rng.choice((0, 1, 4, len(content) // 2, len(content) - 4, len(content) - 1))]


def _extend(content: bytes, others: list[bytes], rng: Random) -> bytes:
    return content + rng.choice((b"\0", b"\n", rng.randbytes(4), bytes(4096), content, rng.choice(others)))


def _zero(content: bytes, others: list[bytes], rng: Random) -> bytes:
    start = rng.choice((0, rng.randrange(len(content))))
    stop = rng.choice((len(content), rng.randrange(start, len(content)) + 1))
    return content[:start] + bytes(stop - start) + content[stop:]


def _overwrite(content: bytes, others: list[bytes], rng: Random) -> bytes:
    """A piece by a piece of another chunk, or by noise."""
    start = rng.randrange(len(content))
    piece = rng.choice((rng.randbytes(len(content)), rng.choice(others)))[: rng.randrange(len(content)) + 1]
    return (content[:start] + piece + content[start + len(piece) :])[: len(content)]


def _become(content: bytes, others: list[bytes], rng: Random) -> bytes:
    return rng.choice(others)


def on_bytes(edit: Callable[[bytes, list[bytes], Random], bytes]) -> Callable[[Files, list[Files], Random], Files]:
    """The change of a file, mostly of a chunk."""

    def apply(files: Files, others: list[Files], rng: Random) -> Files:
        name = rng.choice(chunks(files) if rng.random() < 0.8 else sorted(files))
        contents = [files[other] for other in chunks(files) if other != name]
        return {**files, name: edit(files[name], contents, rng) if files[name] else b"\0"}

    return apply


def _delete(files: Files, others: list[Files], rng: Random) -> Files:
    """A file, or a whole folder."""
    name = rng.choice(sorted(files))
    if rng.random() < 0.2 and "/" in name:
        folder = "/".join(name.split("/")[: rng.randrange(1, name.count("/") + 1)])
        return {other: content for other, content in files.items() if not other.startswith(folder + "/")}
    return {other: content for other, content in files.items() if other != name}


def _folder(files: Files, others: list[Files], rng: Random) -> Files:
    """A folder where a file was, with the file in it."""
    name = rng.choice(sorted(files))
    return {**_without(files, name), f"{name}/{name.split('/')[-1]}": files[name]}


def _without(files: Files, *names: str) -> Files:
    return {name: content for name, content in files.items() if name not in names}


# valid chunks where others should be


def _exchanged(files: Files, a: str, b: str) -> Files:
    return {**files, a: files[b], b: files[a]}


def _shape(files: Files, array: str) -> tuple[Any, ...]:
    document = json.loads(files[f"{array}/{ROOT}"])
    return document["data_type"], document["chunk_grid"]["configuration"]["chunk_shape"], document["codecs"]


def _within(files: Files, others: list[Files], rng: Random) -> Files:
    name = rng.choice(chunks(files))
    alike = [other for other in chunks(files) if array_of(other) == array_of(name)]
    return _exchanged(files, name, rng.choice(alike))


def _between(files: Files, others: list[Files], rng: Random) -> Files:
    """The chunks of the same number of two arrays of equal shape, or of any two."""
    name = rng.choice(chunks(files))
    shape, number = _shape(files, array_of(name)), name[len(array_of(name)) :]
    alike = [other + number for other in _arrays(files) if _shape(files, other) == shape and other + number in files]
    return _exchanged(files, name, rng.choice(alike if len(alike) > 1 else chunks(files)))


def _anothers(files: Files, others: list[Files], rng: Random) -> Files:
    """The same chunk of another run."""
    other = rng.choice(others)
    name = rng.choice(sorted(set(chunks(files)) & set(chunks(other))))
    return {**files, name: other[name]}


def _copied(files: Files, others: list[Files], rng: Random) -> Files:
    """One chunk of an array stands at another's place too."""
    name = rng.choice(chunks(files))
    alike = [other for other in chunks(files) if array_of(other) == array_of(name)]
    return {**files, name: files[rng.choice(alike)]}


def _arrays(files: Files) -> list[str]:
    return sorted({array_of(name) for name in chunks(files)})


def _folders(files: Files, others: list[Files], rng: Random) -> Files:
    """Two whole arrays exchanged, metadata and all, or another run's put there."""
    if rng.random() < 0.3:
        other = rng.choice(others)
        name = rng.choice(sorted(set(_arrays(files)) & set(_arrays(other))))
        rest = {key: content for key, content in files.items() if not key.startswith(name + "/")}
        return {**rest, **{key: content for key, content in other.items() if key.startswith(name + "/")}}
    a, b = rng.sample(_arrays(files), 2)
    return {_renamed(key, {a: b, b: a}): content for key, content in files.items()}


def _renamed(key: str, names: dict[str, str]) -> str:
    array = key.split("/c/")[0].removesuffix("/" + ROOT)
    return names.get(array, array) + key[len(array) :]


def _numbers(files: Files, others: list[Files], rng: Random) -> Files:
    """The chunks of one block, of all arrays, exchanged with those of another: a run in another order."""
    numbers = sorted({name.split("/c/")[1].split("/")[0] for name in chunks(files) if "/c/" in name})
    a, b = rng.choice(numbers), rng.choice(numbers)
    turned = {}
    for key, content in files.items():
        array, inside, number = key.partition("/c/")
        first, rest = number.split("/")[0], number.split("/")[1:]
        new = {a: b, b: a}.get(first, first)
        swapped = "/".join([array + inside + new, *rest])
        turned[swapped if inside and swapped in files else key] = content
    return turned if turned.keys() == files.keys() else files


# metadata

WORDS = ("shape", "committed_steps", "written_steps", "data_type", "dtype", "fill_value", "codecs", "dimension_names",
         "names", "shapes", "chunk_shape", "rows", "slots", "block", "format", "kind", "attributes", "closed", "chain",
         "recent", "arrays", "seal", "id", "name", "configuration", "node_type", "zarr_format", "facts", "constants",
         "attrib_labels", "coordinates")  # fmt: skip
NUMBERS = (0, 1, -1, 2, 10**6, 2**31, 2**63, 2**64, 10**18, 10**30, 10**400, 0.5, 1e300, math.nan, math.inf, -math.inf)
OTHERS = (None, True, False, "", "x", "0", "int8", "float16", "object", "\ud800", [], {}, [[]], [1, 2], {"name": "x"})
STRINGS = ("bool", "int64", "uint8", "float32", "float64", "r8", "step", "state", "row", "parameter", "chunk", "vlen-utf8",
           "pickle", "gzip", "bytes", "blosc", "sharding_indexed", "attrib.step_delta", "NaN", "run", "result")  # fmt: skip


def _nodes(document: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of everything in a JSON document below its root."""
    inside = document.items() if isinstance(document, dict) else enumerate(document)
    for key, value in inside:
        yield (*path, key)
        if isinstance(value, dict | list):
            yield from _nodes(value, (*path, key))


def _edited(files: Files, others: list[Files], rng: Random) -> Files:
    """A value in a document deleted or put to another."""
    name = rng.choice(documents(files) if rng.random() < 0.7 else [ROOT])
    document = json.loads(files[name])
    paths = sorted(_nodes(document), key=str)
    chosen = [path for path in paths if path[-1] in WORDS or (len(path) > 1 and path[-2] in WORDS)]
    *way, last = rng.choice(chosen if chosen and rng.random() < 0.6 else paths)
    parent = document
    for key in way:
        parent = parent[key]
    if rng.random() < 0.15:
        del parent[last]
    elif rng.random() < 0.1:
        return {**files, name: _deep(document, parent, last, rng)}
    else:
        parent[last] = _other(parent, last, rng)
    return {**files, name: _dumped(document)}


def _other(parent: Any, last: Any, rng: Random) -> Any:
    """Than what stands there: a number for a number mostly, a neighbour, anything."""
    value = parent[last]
    if rng.random() < 0.2:
        return rng.choice((*NUMBERS, *OTHERS))
    if isinstance(value, bool) or value is None:
        return rng.choice((not value, 1, 0, None, "true"))
    if isinstance(value, int | float):
        return rng.choice((value + 1, value - 1, 2 * value, -value, float(value), str(value), *NUMBERS))
    if isinstance(value, str):
        siblings = [v for v in (parent.values() if isinstance(parent, dict) else parent) if isinstance(v, str)]
        return rng.choice((rng.choice(siblings), rng.choice(STRINGS), value + "x", value[:-1], value.upper()))
    items = list(value.items()) if isinstance(value, dict) else list(value)
    rng.shuffle(items)
    items = rng.choice((items, items[1:], items + items[:1]))
    return dict(items) if isinstance(value, dict) else items


def _dumped(document: Any) -> bytes:
    return json.dumps(document, ensure_ascii=True).encode()


def _deep(document: Any, parent: Any, last: Any, rng: Random) -> bytes:
    """Lists in lists, or objects in objects, about as deep as Python goes, or far deeper."""
    parent[last] = "HERE"
    depth = rng.choice((rng.randrange(2, 900), rng.randrange(900, 1100), 3000, 100_000))
    opening, inner, closing = rng.choice((("[", "1", "]"), ('{"a":', "1", "}")))
    return _dumped(document).replace(b'"HERE"', (opening * depth + inner + closing * depth).encode())


def _spoiled(files: Files, others: list[Files], rng: Random) -> Files:
    """A document that is no JSON any more, or written otherwise."""
    name = rng.choice(documents(files))
    content, at = files[name], rng.randrange(len(files[name]))
    document = json.loads(content)
    return {**files, name: rng.choice((
        b"", content[:at], content[:at] + b"}" + content[at:], content[:at] + rng.randbytes(1) + content[at:],
        content + b"]",
        b"\xef\xbb\xbf" + content, content.decode().encode("utf-16"), b"null", b"[]", b"7", b'"x"', b"{}", b"\xff" * 9,
        content.replace(b"{", b'{"zarr_format": 2, ', 1), b" " * 5000 + content, json.dumps(document, indent=1).encode(),
        json.dumps(document, sort_keys=True).encode(), content.replace(b'"', b"'"), content.replace(b"attrib", b"Attrib"),
    ))}  # fmt: skip


def _bits(files: Files, others: list[Files], rng: Random) -> Files:
    name = rng.choice(documents(files) if rng.random() < 0.6 else [ROOT])
    return {**files, name: rng.choice((_flip, _flip, _truncate, _zero, _extend))(files[name], [files[ROOT]], rng)}


def _documents(files: Files, others: list[Files], rng: Random) -> Files:
    """Two documents exchanged, one deleted, or another run's put there."""
    a, b = rng.choice(documents(files)), rng.choice(documents(files))
    other = rng.choice(others)
    return rng.choice(
        (_exchanged(files, a, b), _without(files, a), {**files, a: other.get(a, b"")}, {**files, a: files[b]})
    )


METADATA = [Change("value edited", _edited)] * 5 + [
    Change("document spoiled", _spoiled),
    Change("document's bytes", _bits),
    Change("documents exchanged", _documents),
]
BYTES = [
    Change("bits flipped", on_bytes(_flip)),
    Change("truncated", on_bytes(_truncate)),
    Change("extended", on_bytes(_extend)),
    Change("zeroed", on_bytes(_zero)),
    Change("overwritten", on_bytes(_overwrite)),
    Change("another chunk's bytes", on_bytes(_become)),
    Change("deleted", _delete),
    Change("folder for a file", _folder),
]
EXCHANGES = [
    Change("chunks of one array exchanged", _within),
    Change("chunks of two arrays exchanged", _between),
    Change("chunk of another run", _anothers),
    Change("chunk copied", _copied),
    Change("arrays exchanged", _folders),
    Change("blocks exchanged", _numbers),
]


def drawn(files: Files, others: list[Files], rng: Random, only_metadata: bool = False) -> tuple[str, Files]:
    """A change that changes something: what it is called, and the files after it."""
    while True:
        share = rng.random()
        table = METADATA if only_metadata or share < 0.25 else EXCHANGES if share < 0.5 else BYTES
        change = rng.choice(table)
        after = change.apply(files, others, rng)
        if after != files:
            return change.kind, after


def touched(before: Files, after: Files) -> set[str]:
    """The names of the files that are others, or gone, or new."""
    names = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    return {os.path.dirname(name) if os.path.dirname(name) in before else name for name in names}
