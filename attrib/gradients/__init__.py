"""Per-example gradient shares: traced where parameters meet data, contracted without being materialised.

- `along`: the truth: the loss vector's derivative, of all examples at once, which asks nothing of the model
- `sites`: follow one forward pass and note every call in which a parameter meets the data of the batch
- `functions`: FUNCTIONS, the table of such calls and the gradient of an example there as a factor (`kernels.factors`);
  others go through forward-mode derivatives of the call
- `batchwise`: which index of a site's output belongs to which example
- `terms`: a parameter's share at its sites
- `directions`: what shares are multiplied with, in the form that costs least
- `assignment`: how the sites of one kind of batch split, read off and proven
- `mapped`: gradients written out by vmap
- `definition`: what a definition of a share answers: `Gradients.total`, `contract`, `rows`, `factors`; `examples`: the first
- `through`, `owners`, `rows`: the second definition, by rows: its truth, whose rows are whose, `RowGradients`
- `watch`: the same from the user's own passes; `stored`: factors as named arrays
"""

from .along import LossVector, random_weights
from .definition import Gradients
from .directions import Directions
from .examples import ExampleGradients
from .functions import FUNCTIONS
from .rows import RowGradients
from .stored import describe, from_tensors, parameter_of, to_tensors
from .terms import Term
from .watch import Watch

DEFINITIONS: dict[str, type[Gradients]] = {"example": ExampleGradients, "rows": RowGradients}  # what a share is

__all__ = [
    "DEFINITIONS",
    "FUNCTIONS",
    "Directions",
    "ExampleGradients",
    "Gradients",
    "LossVector",
    "RowGradients",
    "Term",
    "Watch",
    "describe",
    "from_tensors",
    "parameter_of",
    "random_weights",
    "to_tensors",
]
