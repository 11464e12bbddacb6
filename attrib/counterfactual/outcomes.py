"""Measured outcomes of retrainings: a labelled dataset, and the file that they are written to one by one.

The file is text, a line each: what was asked, then one line per retraining as it is done, in any order. Each begins with a
digest of the rest, so that what a kill left of the last line is known for what it is, and left out.

    9c1f... {"kind": "outcomes", "run": ..., "examples": [...], "changed": [...], "weight": [...], "base": [...], ...}
    51d0... {"subset": 0, "value": [...]}
"""

import base64
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from xxhash import xxh64_hexdigest

from ..errors import StoreError, StoreExistsError

FORMAT = 1
MEANING = "counterfactuals that were run: each value is the measurement of a model trained without those examples"


@dataclass(frozen=True)
class Outcomes:
    """What a measurement came to where a run was trained again without some of its examples, or with others of weight. Made
    by `attrib.retrain_subsets` or `attrib.open_outcomes`.

    dataset: xarray.Dataset with value (subset, query), base (query), changed (subset, example) bool, weight (subset): of the
        changed examples, NaN where they were left out. Subsets are called by their place in the list that was asked for;
        those that are not done yet are missing.

    Example:
        >>> outcomes
        <attrib.Outcomes: log_prob of 2 queries after 4 retrainings>
        >>> outcomes.changes.shape
        (4, 2)
    """

    dataset: xr.Dataset

    @property
    def values(self) -> xr.DataArray:
        """(subset, query): the measurement at the end of each retraining."""
        return self.dataset["value"]

    @property
    def base(self) -> xr.DataArray:
        """(query,): the measurement at the end of the run as it was."""
        return self.dataset["base"]

    @property
    def changes(self) -> xr.DataArray:
        """(subset, query): values - base. Negative: without them the measurement is lower."""
        return (self.values - self.base).rename("change")

    @cached_property
    def subsets(self) -> tuple[np.ndarray, ...]:
        """The ids of each subset, in the order of the run's examples."""
        examples = self.dataset["example"].values
        return tuple(examples[row] for row in self.dataset["changed"].values)

    @property
    def missing(self) -> int:
        """Retrainings that were asked for and are not done."""
        return int(self.dataset.attrs["asked"]) - self.dataset.sizes["subset"]

    def save(self, path: Any, overwrite: bool = False) -> None:
        """Write them to a file, to be opened again with `attrib.open_outcomes`, or gone on with: `retrain_subsets(store=)`.

        Raises:
            StoreExistsError: something is there and overwrite is False, or it holds no outcomes.
        """
        path = Path(path)
        if path.exists():
            _check_replaced(path, overwrite)
        _write(path, self._documents())

    def _documents(self) -> Iterator[dict[str, Any]]:
        yield self.dataset.attrs["header"]
        for number, value in zip(self.dataset["subset"].values.tolist(), self.values.values.tolist(), strict=True):
            yield {"subset": number, "value": value}

    def __repr__(self) -> str:
        sizes, attrs = self.dataset.sizes, self.dataset.attrs
        done = f"{sizes['subset']} retrainings" + (f", {self.missing} not done yet" if self.missing else "")
        return f"<attrib.Outcomes: {attrs['measurement']} of {sizes['query']} queries after {done}>"


def open_outcomes(path: Any) -> Outcomes:
    """Open what `Outcomes.save` or `retrain_subsets(store=path)` wrote, whether or not all is done (`missing`).

    Raises:
        StoreError: nothing there, something else, or damaged.

    Example:
        >>> outcomes.save("outcomes.txt")
        >>> attrib.open_outcomes("outcomes.txt").missing
        0
    """
    header, done, _ = _read(Path(path))
    return outcomes_of(header, done)


def outcomes_of(header: dict[str, Any], done: Mapping[int, Any]) -> Outcomes:
    """header: the first line of a file; done: subset -> its value (Q,)."""
    numbers, examples = sorted(done), header["examples"]
    labels = np.array(examples, dtype=object if examples and isinstance(examples[0], str) else np.int64)
    values = np.array([done[n] for n in numbers], dtype=np.float64).reshape(len(numbers), len(header["base"]))
    changed = np.stack([unpacked(row, len(examples)) for row in header["changed"]])[numbers]
    weight = np.array([np.nan if w is None else w for w in header["weight"]], dtype=np.float64)[numbers]
    dataset = xr.Dataset(
        {
            "value": (("subset", "query"), values),
            "base": ("query", np.array(header["base"], dtype=np.float64)),
            "changed": (("subset", "example"), changed),
            "weight": ("subset", weight),
        },
        {"subset": numbers, "query": np.arange(len(header["base"])), "example": labels},
        {key: header[key] for key in ("measurement", "units", "run")}
        | {"asked": len(header["weight"]), "meaning": MEANING, "header": header},
    )
    names = header["names"]
    return Outcomes(dataset.assign_coords(query_name=("query", names)) if names else dataset)


class Journal:
    """The file of outcomes, added to. path: None keeps nothing. header: what is asked."""

    def __init__(self, path: Path | None, header: dict[str, Any]) -> None:
        self._path, self.header = path, header
        self.done: dict[int, list[float]] = {}
        if path is None:
            return
        if path.exists():
            held, self.done, end = _read(path)
            _check_same(path, held, header)
            os.truncate(path, end)
        else:
            _write(path, [header])

    def add(self, numbers: Any, values: np.ndarray) -> None:
        """values: (R, Q), of the subsets of these numbers."""
        rows = dict(zip(map(int, numbers), values.tolist(), strict=True))
        self.done |= rows
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.writelines(_line({"subset": n, "value": row}) for n, row in rows.items())
                _flush(file)

    def outcomes(self) -> Outcomes:
        return outcomes_of(self.header, self.done)


def packed(row: np.ndarray) -> str:
    """(N,) bool -> text, a bit each."""
    return base64.b64encode(np.packbits(row).tobytes()).decode()


def unpacked(text: str, count: int) -> np.ndarray:
    bits = np.unpackbits(np.frombuffer(base64.b64decode(text), np.uint8), count=count)
    return bits.astype(bool)


def _line(document: dict[str, Any]) -> str:
    text = json.dumps(document)
    return f"{xxh64_hexdigest(text.encode())} {text}\n"


def _write(path: Path, documents: Iterable[dict[str, Any]]) -> None:
    """A whole file, or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    with beside.open("w", encoding="utf-8") as file:
        file.writelines(map(_line, documents))
        _flush(file)
    beside.replace(path)


def _flush(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _read(path: Path) -> tuple[dict[str, Any], dict[int, list[float]], int]:
    """The header, the values by subset, and the bytes up to the last whole line."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise StoreError(f"no outcomes can be read: got {error}, expected a file of attrib's, at {path}.") from error
    end = data.rfind(b"\n") + 1
    documents = [_document(line, n, path) for n, line in enumerate(data[:end].splitlines())]
    if not documents or documents[0].get("kind") != "outcomes" or documents[0].get("format") != FORMAT:
        raise StoreError(
            f"the file holds no outcomes: got another beginning, expected a line of retrain_subsets, format {FORMAT}, at "
            f"{path}. Choose another path."
        )
    return documents[0], {int(d["subset"]): d["value"] for d in documents[1:]}, end


def _document(line: bytes, number: int, path: Path) -> dict[str, Any]:
    digest, _, text = line.partition(b" ")
    if digest.decode("ascii", "replace") != xxh64_hexdigest(text):
        raise StoreError(
            f"the file holds no outcomes, or is damaged: got another digest, expected that of the line, at line {number} of "
            f"{path}. Choose another path, or delete the line."
        )
    found: dict[str, Any] = json.loads(text)
    return found


_ASKED = {
    "run": "another run",
    "steps": "a run of another length",
    "changed": "other subsets",
    "weight": "other weights",
    "dtype": "another type of the measurement",
    "measurement": "another measurement",
    "start": "another measurement, or of another model",
    "base": "another measurement, or of another model",
}  # what must be the same, and what it means where it is not


def _check_same(path: Path, held: dict[str, Any], asked: dict[str, Any]) -> None:
    for key, what in _ASKED.items():
        close = key in ("start", "base") and _close(held.get(key), asked[key])
        if not close and held.get(key) != asked[key]:
            got, expected = (_short(document.get(key)) for document in (asked, held))
            raise StoreExistsError(
                f"the file holds outcomes of {what}: got {key} {got}, expected {expected}, at {path}. Choose another path, "
                f"or ask as before to go on with it."
            )


def _close(held: Any, asked: list[float]) -> bool:
    """Values of a measurement, which another machine may round otherwise."""
    return (
        isinstance(held, list)
        and len(held) == len(asked)
        and np.allclose(held, asked, rtol=1e-6, atol=1e-9, equal_nan=True)
    )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _check_replaced(path: Path, overwrite: bool) -> None:
    try:
        _read(path)
    except StoreError as error:
        raise StoreExistsError(f"what is there is not attrib's to replace: {error}") from None
    if not overwrite:
        raise StoreExistsError(
            f"outcomes are there already: got {path}, expected nothing there. Pass overwrite=True, or choose another path."
        )
