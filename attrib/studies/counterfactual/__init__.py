"""Counterfactuals: what accounting says, what influence predicts, and what happens when examples are left out for real.

    attrib study counterfactual

- `recipe`: everything done with one seed; `page`: what is said of it, to look at
"""

from ..frame import Study
from .page import write_page
from .recipe import SETTINGS, study_seed

__all__ = ["SETTINGS", "study"]

study = Study("counterfactual", SETTINGS, study_seed, write_page)
