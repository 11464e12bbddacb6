"""Grokking: what memorises, what generalises, and whether a grokked representation can be put into an earlier step.

    attrib study grokking                         # five seeds of a small network, some 20 minutes on two cores
    attrib study grokking --setting explaind      # the network of ExPLAIND (arXiv 2505.20076), one seed

- `setting`: the networks, and how much is done with each
- `seed`: everything done with one seed; `account`, `fourier`, `grafts`, `pruning` are its parts
- `tables`: the seeds beside each other, as labelled arrays; `speeds`: compared; `claims`: what they say
- `page`: to look at; its sections are in `watched` and `moved`
"""

import time
from collections.abc import Callable
from pathlib import Path

import torch

from ...errors import SetupError
from ..parts import Parts
from .seed import study_seed
from .setting import SETTINGS

__all__ = ["SETTINGS", "study"]


def study(folder: Path, setting: str = "quick", seeds: int | None = None, say: Callable[[str], None] = print) -> Path:
    """Train, record, explain, exchange layers, and write `index.html` to the folder. Started again, it goes on where it was.

    Args:
        folder: for runs, results, every trial, the data of all figures (`data.zarr`) and the page.
        setting: "quick", "explaind" or "toy".
        seeds: how many; None for the setting's own number.

    Returns:
        The page.

    Raises:
        SetupError: an unknown setting, or no seed. StoreExistsError: the folder holds something else.
    """
    if setting not in SETTINGS:
        raise SetupError(f"there is no such setting: got {setting!r}, expected one of {', '.join(SETTINGS)}.")
    chosen = SETTINGS[setting]
    count = chosen.seeds if seeds is None else seeds
    if count < 1:
        raise SetupError(f"there is nothing to study: got {count} seeds, expected at least 1.")
    parts = Parts(Path(folder), {"study": "grokking", **chosen.facts})
    began = time.perf_counter()
    say(f"Grokking, setting {setting}: {chosen.about}.")
    found = []
    with torch.random.fork_rng(devices=()):
        for seed in range(chosen.first_seed, chosen.first_seed + count):
            found.append(study_seed(chosen, seed, parts, say))
    from .page import write_page  # brings matplotlib along

    place = write_page(chosen, found, parts.folder)
    say(f"{place}: {time.perf_counter() - began:.0f} s")
    return place
