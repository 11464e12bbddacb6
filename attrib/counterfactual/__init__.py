"""Ground truth: a run trained again without some of its examples, and what scores per example foretold of it.

- `retraining`: train again without each of some subsets, resumable, by workers, many side by side
- `work`, `together`: what one worker does; retrainings side by side
- `outcomes`: what was measured, and the file it is kept in
- `scores`: the linear datamodelling score, finding mislabelled examples, random subsets
- `curves`: what leaving out the highest does, beside random ones

Counterfactuals that were run, not contributions: those of `attrib.attribute` account for what happened.
"""

from .curves import leave_out
from .outcomes import Outcomes, open_outcomes
from .retraining import retrain_subsets
from .scores import lds, mislabelled_auc, random_subsets

__all__ = ["Outcomes", "lds", "leave_out", "mislabelled_auc", "open_outcomes", "random_subsets", "retrain_subsets"]
