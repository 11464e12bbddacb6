"""Opposing signals: a few examples pull in opposite directions, and training balances them at the edge of stability
(Rosenfeld and Risteski 2023, arXiv 2311.04163).

    attrib study opposing_signals

- `setting`: the images, the network, and how much is done
- `recipe`: everything done with one seed: who changed whose loss, the groups that follow from it, what becomes without
them
- `measures`: how groups move; `tables`, `claims`, `page`: the seeds beside each other, to look at
"""

from ..frame import Study
from .page import write_page
from .recipe import study_seed
from .setting import SETTINGS

__all__ = ["SETTINGS", "study"]

study = Study("opposing_signals", SETTINGS, study_seed, write_page)
