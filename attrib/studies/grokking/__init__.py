"""Grokking: what memorises, what generalises, and whether a grokked representation can be put into an earlier step.

    attrib study grokking                         # five seeds of a small network, some 20 minutes on two cores
    attrib study grokking --setting explaind      # the network of ExPLAIND (arXiv 2505.20076), one seed

- `setting`: the networks, and how much is done with each
- `seed`: everything done with one seed; `account`, `fourier`, `grafts`, `pruning` are its parts
- `tables`: the seeds beside each other, as labelled arrays; `speeds`: compared; `claims`: what they say
- `page`: to look at; its sections are in `watched` and `moved`
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..frame import Say, conduct
from ..parts import Parts
from .seed import study_seed
from .setting import SETTINGS, Setting

__all__ = ["SETTINGS", "study"]


def study(folder: Path, setting: str = "quick", seeds: int | None = None, say: Say = print) -> Path:
    """Train, record, explain, exchange layers, and write `index.html` to the folder. Started again, it goes on where it was.

    Args:
        folder: for runs, results, every trial, the data of all figures (`data/`) and the page.
        setting: "quick", "explaind" or "toy".
        seeds: how many; None for the setting's own number.

    Returns:
        The page.

    Raises:
        SetupError: an unknown setting, or no seed. StoreExistsError: the folder holds something else.
    """
    return conduct("grokking", SETTINGS, study_seed, _write, folder, setting, seeds, say)


def _write(setting: Setting, found: Sequence[dict[str, Any]], parts: Parts) -> Path:
    from .page import write_page  # brings matplotlib along

    return write_page(setting, found, parts.folder)
