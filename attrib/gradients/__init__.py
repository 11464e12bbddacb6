"""Per-example gradient shares: traced where parameters meet data, contracted without being materialised.

- `sites`: follow one forward pass and note every call in which a parameter meets the data of the batch
- `functions`: FUNCTIONS, the table of such calls: what a change of the parameter does to the output, and the
  gradient rows; everything else goes through forward-mode derivatives
- `batchwise`: which index of a site's output belongs to which example
- `terms`: a parameter's share at its sites, contracted or as rows
- `checks`: what a loss and a model must be for the gradient to split
- `shares`: the whole: `Shares.total`, `Shares.contract`, `Shares.rows`
"""

from .functions import FUNCTIONS
from .shares import Shares

__all__ = ["FUNCTIONS", "Shares"]
