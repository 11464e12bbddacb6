"""What every study is: some settings, everything done with one seed, and a page made of all seeds.

    study = Study("grokking", SETTINGS, study_seed, write_page)
    study(folder, "quick", seeds=3)

A study keeps what it has done in its folder (`parts`) and goes on from there when it is started again.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import xarray as xr

from ..errors import SetupError
from ..report import to_json
from ..report.article import Article
from ..report.files import replacing
from .parts import Parts, SeedParts

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How much is done, and with what. seeds: how many, from `first_seed` on. version: raised when a part is computed in
    another way, so that what was left of an earlier one is not taken for it."""

    name: str
    about: str
    seeds: int
    first_seed: int = 0
    version: int = 1

    @property
    def facts(self) -> dict[str, Any]:
        """All that is not a function, JSON: what the parts of a study depend on."""
        told = [f.name for f in fields(self) if f.name not in ("seeds", "about")]
        return {name: v for name in told if not callable(v := getattr(self, name))}


@dataclass(frozen=True)
class Study:
    """A study, to be called.

    name: of its command. settings: by name, "quick" and "toy" among them. one: (setting, parts) -> everything done with
    one seed. write_page: (setting, found, parts) -> the page of all seeds, and what is done between them.
    """

    name: str
    settings: Mapping[str, Any]
    one: Callable[[Any, SeedParts], dict[str, Any]]
    write_page: Callable[[Any, Sequence[dict[str, Any]], Parts], Path]

    def __call__(self, folder: Path, setting: str = "quick", seeds: int | None = None, say: Say = print) -> Path:
        """Train, record, explain and intervene; write `index.html` to the folder. Started again, it goes on where it was.

        Args:
            folder: for runs, results, every trial, the data of all figures (`data/`) and the page.
            setting: one of `settings`.
            seeds: how many; None for the setting's own number.

        Returns:
            The page.

        Raises:
            SetupError: an unknown setting, or no seed. StoreExistsError: the folder holds something else.
        """
        if setting not in self.settings:
            known = ", ".join(self.settings)
            raise SetupError(f"there is no such setting: got {setting!r}, expected one of {known}.")
        chosen = self.settings[setting]
        count = chosen.seeds if seeds is None else seeds
        if count < 1:
            raise SetupError(f"there is nothing to study: got {count} seeds, expected at least 1.")
        parts = Parts(Path(folder), {"study": self.name, **chosen.facts})
        began = time.perf_counter()
        say(f"{self.name}, setting {setting}: {chosen.about}.")
        with torch.random.fork_rng(devices=()):
            all_seeds = range(chosen.first_seed, chosen.first_seed + count)
            found = [self.one(chosen, SeedParts(parts, seed, say)) for seed in all_seeds]
            place = self.write_page(chosen, found, parts)
        say(f"{place}: {time.perf_counter() - began:.0f} s")
        return place


class Page:
    """The article of a study, and the data of its figures beside it: data/*.json, each to be read with
    `xarray.DataArray.from_dict(json.load(file)).astype(float)`."""

    def __init__(self, title: str, lead: str, folder: Path) -> None:
        self.article, self._place = Article(title, lead), folder
        self.folder = folder / "data"
        self.folder.mkdir(exist_ok=True)

    def keep(self, name: str, data: xr.DataArray) -> xr.DataArray:
        """Saved under a name, and handed back to be drawn."""
        with replacing(self.folder / f"{name}.json") as beside:
            beside.write_text(to_json(data.drop_attrs().to_dict()))
        return data

    def ledgers(self, ledgers: Mapping[str, str], units: str = "nats") -> None:
        """The last section: the ledger of every run that the page is made of, as it was printed when it was checked."""
        self.article.section(
            "Ledgers", f"Of every run: initial + examples + decay + inherited + residual = final, in {units}."
        )
        for name, ledger in ledgers.items():
            self.article.lines(f"{name}\n{ledger}")

    def write(self) -> Path:
        return self.article.write(self._place / "index.html")
