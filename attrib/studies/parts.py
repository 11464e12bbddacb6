"""What a study has done so far, in its folder: a study that is started again goes on where it was.

parts = Parts(folder, {"study": "grokking", "setting": "quick"})
mine = SeedParts(parts, 0, print)
found = mine.part("training", "train, recorded", lambda: train(...))     # JSON, computed once
steps = mine.trial("inner from 1400 to 150", lambda: ...)                # many small ones, a line each
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import xarray as xr

from ..errors import StoreExistsError
from ..report import to_json
from ..report.files import replacing


class Parts:
    """Results by name. A part is there when it is done; a line that was cut off is done again.

    Args:
        folder: of the study; made where there is none.
        facts: what all parts depend on, JSON.

    Raises:
        StoreExistsError: the folder holds something else, or a study of other facts.
    """

    def __init__(self, folder: Path, facts: dict[str, Any]) -> None:
        self.folder = folder
        self._trials: dict[str, dict[str, Any]] = {}
        known = folder / "study.json"
        if known.exists():
            if json.loads(known.read_text()) != json.loads(to_json(facts)):
                raise StoreExistsError(
                    f"another study is in this folder: got {known.read_text()}, expected {to_json(facts)}, at {folder}. "
                    f"Choose another folder, or remove it."
                )
        elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise StoreExistsError(
                f"something other than a study is there: got {folder}, expected a new or empty folder. Choose another."
            )
        else:
            folder.mkdir(parents=True, exist_ok=True)
            _write(known, facts)

    def part(self, name: str, compute: Callable[[], Any]) -> Any:
        """A part as JSON gives it back, computed where it is not there yet."""
        path = self.folder / f"{name}.json"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            _write(path, compute())
        return json.loads(path.read_text())

    def trial(self, name: str, key: str, compute: Callable[[], Any]) -> Any:
        """One of many small parts that share a file, a line each."""
        path = self.folder / f"{name}.jsonl"
        if name not in self._trials:
            self._trials[name] = _lines(path)
        known = self._trials[name]
        if key not in known:
            line = to_json([key, compute()])
            with path.open("a") as file:
                file.write(f"{line}\n")
            known[key] = json.loads(line)[1]
        return known[key]


class SeedParts:
    """The parts of one seed, in a folder of their own; `say` tells of each that is begun."""

    def __init__(self, parts: Parts, seed: int, say: Callable[[str], None]) -> None:
        self.seed, self.say, self.folder = seed, say, parts.folder / f"seed{seed}"
        self._parts = parts

    def part(self, name: str, what: str, compute: Callable[[], Any]) -> Any:
        """A part as JSON gives it back; `what` is told where it has to be computed."""
        if not (self.folder / f"{name}.json").exists():
            self.say(f"   seed {self.seed}: {what}")
        return self._parts.part(f"{self.folder.name}/{name}", compute)

    def dataset(self, name: str, what: str, compute: Callable[[], xr.Dataset]) -> xr.Dataset:
        """A part of labelled arrays of numbers, in memory; kept as NAME.zarr."""
        place = self.folder / f"{name}.zarr"
        if not place.exists():
            self.say(f"   seed {self.seed}: {what}")
            beside = place.with_suffix(".part")
            compute().to_zarr(beside, mode="w", zarr_format=3, consolidated=False)
            beside.rename(place)
        with xr.open_zarr(place, chunks=None, consolidated=False) as found:
            return found.load()

    def trial(self, key: str, compute: Callable[[], Any]) -> Any:
        """One of many small parts, kept a line each."""
        return self._parts.trial(f"{self.folder.name}/trials", key, compute)


def _write(path: Path, value: Any) -> None:
    with replacing(path) as beside:
        beside.write_text(to_json(value))


def _lines(path: Path) -> dict[str, Any]:
    """The whole lines of a file; what a kill left of the last one is cut off."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        return {}
    whole, _, rest = path.read_text().rpartition("\n")
    if rest:
        with replacing(path) as beside:
            beside.write_text(f"{whole}\n" if whole else "")
    return dict(json.loads(line) for line in whole.splitlines())
