"""How abilities develop: what the final model cannot tell (Saphra, "Interpretability Creationism", and the work under
it).

    attrib study development

Two networks, a small one of digits (mini-batches, momentum, a schedule) and the grokking MLP (full batch, AdamW),
several seeds.

- `networks`: what is trained, what is looked at
- `planted`: a layer that is vestigial by construction, of which the right answer is known
- `recipe`: everything done with one seed, and between the seeds; `tables`, `claims`, `page`: to look at
"""

from ..frame import Study
from .networks import SETTINGS
from .page import write_page
from .recipe import study_seed

__all__ = ["SETTINGS", "study"]

study = Study("development", SETTINGS, study_seed, write_page)
