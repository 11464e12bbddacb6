"""How abilities develop: what the final model cannot tell (Saphra, "Interpretability Creationism", and the work under
it).

    attrib study development

Two networks, a small one of digits (mini-batches, momentum, a schedule) and the grokking MLP (full batch, AdamW),
several seeds.

- `networks`: what is trained, what is looked at
- `planted`: a layer that is vestigial by construction, of which the right answer is known
- `recipe`: everything done with one seed, and between the seeds; `tables`, `claims`, `page`: to look at
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..frame import Say, conduct
from ..parts import Parts
from .networks import SETTINGS, Setting
from .recipe import study_seed

__all__ = ["SETTINGS", "study"]


def study(folder: Path, setting: str = "quick", seeds: int | None = None, say: Say = print) -> Path:
    """Train, record, explain, freeze and suppress, walk the lines between states, and write `index.html`. Started again,
    it
    goes on where it was.

    Args:
        folder: for runs, results, every trial, the data of all figures (`data/`) and the page.
        setting: "quick" or "toy".
        seeds: how many; None for the setting's own number.

    Returns:
        The page.

    Raises:
        SetupError: an unknown setting, or no seed. StoreExistsError: the folder holds something else.
    """
    return conduct("development", SETTINGS, study_seed, _write, folder, setting, seeds, say)


def _write(setting: Setting, found: Sequence[dict[str, Any]], parts: Parts) -> Path:
    from .page import write_page  # brings matplotlib along

    return write_page(setting, found, parts)
