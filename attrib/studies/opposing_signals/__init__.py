"""Opposing signals: a few examples pull in opposite directions, and training balances them at the edge of stability
(Rosenfeld and Risteski 2023, arXiv 2311.04163).

    attrib study opposing_signals

- `setting`: the images, the network, and how much is done
- `recipe`: everything done with one seed: who changed whose loss, the groups that follow from it, what becomes without
them
- `measures`: how groups move; `tables`, `claims`, `page`: the seeds beside each other, to look at
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..frame import Say, conduct
from ..parts import Parts
from .recipe import study_seed
from .setting import SETTINGS, Setting

__all__ = ["SETTINGS", "study"]


def study(folder: Path, setting: str = "quick", seeds: int | None = None, say: Say = print) -> Path:
    """Train to the edge of stability, find who opposes whom, intervene, and write `index.html`. Started again, it goes on
    where it was.

    Args:
        folder: for runs, matrices, every trial, the data of all figures (`data/`) and the page.
        setting: "quick" or "toy".
        seeds: how many; None for the setting's own number.

    Returns:
        The page.

    Raises:
        SetupError: an unknown setting, or no seed. StoreExistsError: the folder holds something else.
    """
    return conduct("opposing_signals", SETTINGS, study_seed, _write, folder, setting, seeds, say)


def _write(setting: Setting, found: Sequence[dict[str, Any]], parts: Parts) -> Path:
    from .page import write_page  # brings matplotlib along

    return write_page(setting, found, parts.folder)
