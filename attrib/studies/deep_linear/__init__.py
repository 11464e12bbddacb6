"""Deep linear networks learn broad distinctions before details (Saxe, McClelland, Ganguli 2013, 2019).

    attrib study deep_linear

- `data`: what is learned: the toy set, a tree of items, a category in noise
- `theory`: closed forms, and the discrete oracle of each mode by itself
- `recipe`: everything done with one seed; `page`: to look at
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..frame import Say, conduct
from ..parts import Parts
from .recipe import SETTINGS, Setting, study_seed

__all__ = ["SETTINGS", "study"]


def study(folder: Path, setting: str = "quick", seeds: int | None = None, say: Say = print) -> Path:
    """Train networks recorded, explain the strength of each mode, and write `index.html`. Started again, it goes on where
    it was.

    Args:
        folder: for runs, results, the data of all figures (`data/`) and the page.
        setting: "quick" or "toy".
        seeds: how many; None for the setting's own number.

    Returns:
        The page.

    Raises:
        SetupError: an unknown setting, or no seed. StoreExistsError: the folder holds something else.
    """
    return conduct("deep_linear", SETTINGS, study_seed, _write, folder, setting, seeds, say)


def _write(setting: Setting, found: Sequence[dict[str, Any]], parts: Parts) -> Path:
    from .page import write_page  # brings matplotlib along

    return write_page(setting, found, parts.folder)
