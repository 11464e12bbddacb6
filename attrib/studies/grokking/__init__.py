"""Grokking: what memorises, what generalises, and whether a grokked representation can be put into an earlier step.

    attrib study grokking                         # five seeds of a small network, some 20 minutes on two cores
    attrib study grokking --setting explaind      # the network of ExPLAIND (arXiv 2505.20076), one seed

- `setting`: the networks, and how much is done with each
- `seed`: everything done with one seed; `account`, `fourier`, `grafts`, `pruning` are its parts
- `tables`: the seeds beside each other, as labelled arrays; `speeds`: compared; `claims`: what they say
- `page`: to look at; its sections are in `watched` and `moved`
"""

from ..frame import Study
from .page import write_page
from .seed import study_seed
from .setting import SETTINGS

__all__ = ["SETTINGS", "study"]

study = Study("grokking", SETTINGS, study_seed, write_page)
