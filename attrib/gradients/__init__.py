"""Per-example gradient shares: traced where parameters meet data, contracted without being materialised.

- `sites`: follow one forward pass and note every call in which a parameter meets the data of the batch
- `functions`: FUNCTIONS, the table of such calls and the gradient of an example there as a factor (`kernels.factors`);
  everything else goes through forward-mode derivatives
- `batchwise`: which index of a site's output belongs to which example
- `plan`: how the sites of one kind of batch split, read off and checked
- `terms`: a parameter's share at its sites
- `checks`: what a loss and a model must be for the gradient to split
- `shares`: the whole: `Shares.total`, `contract`, `rows`, `factors`
- `watch`: the same from the user's own passes; `stored`: factors as named arrays
"""

from .functions import FUNCTIONS
from .shares import Shares
from .stored import describe, from_tensors, to_tensors
from .watch import Watch

__all__ = ["FUNCTIONS", "Shares", "Watch", "describe", "from_tensors", "to_tensors"]
