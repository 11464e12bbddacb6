"""Deep linear networks learn broad distinctions before details (Saxe, McClelland, Ganguli 2013, 2019).

    attrib study deep_linear

- `data`: what is learned: the toy set, a tree of items, a category in noise
- `theory`: closed forms, and the discrete oracle of each mode by itself
- `recipe`: everything done with one seed; `page`: to look at
"""

from ..frame import Study
from .page import write_page
from .recipe import SETTINGS, study_seed

__all__ = ["SETTINGS", "study"]

study = Study("deep_linear", SETTINGS, study_seed, write_page)
