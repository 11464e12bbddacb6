"""What the long calls give: labelled datasets, of one kind for each question.

- `labelled`: what examples did to queries, along any axes that were kept; ranked, saved
- `result`: accounting: `Result`, whose terms add up to what the training did
- `difference`: `Difference`, whose terms add up to what separates two runs
- `influence`: `Influence`, derivatives, which do not add up
- `opening`: what was saved, opened again
"""

from .difference import Difference
from .influence import Influence
from .labelled import Labelled, check_place, join
from .opening import accounting, difference_of, open_result
from .result import IDENTITIES, Result

__all__ = [
    "IDENTITIES",
    "Difference",
    "Influence",
    "Labelled",
    "Result",
    "accounting",
    "check_place",
    "difference_of",
    "join",
    "open_result",
]
