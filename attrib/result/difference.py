"""What `attrib.difference` gives: the ledger of a difference that was run.

m(changed) - m(base) = contributions + reduction + options + start + penalty + context + buffers + residual
"""

import numpy as np
import xarray as xr

from ..errors import CompletenessError
from ..ledger import Ledger, terms_of
from ..parts import check_parts
from .labelled import Labelled, grown

SAYS = {
    "cause": "what was done to each example, carried through the training that followed",
    "reaction": "what each example did otherwise: those that were left out no longer, and how all others reacted",
}
CHECKED = ("batch", "split")  # identities
LARGE = 100.0  # times that the terms may be of what they sum to before they say little
FAR = f"above {LARGE:.0f}: little can be read from each term"


class Difference(Labelled):
    """Why two runs differ. Made by `attrib.difference` or `attrib.open_result`.

    dataset: xarray.Dataset with initial (the base), final (the changed run), residual, gross (query); reduction, options,
        penalty, context (query, step, group) and start, buffers (query, group), those there are; growth (query, state), the
        norm of the sensitivity to the parameters; one array of contributions per set of axes that was kept.

    Example:
        >>> difference = attrib.difference(run, changed, model, measurement, loss=loss)
        >>> difference.by("example").shape
        (2, 24)
        >>> bool(abs(difference.residual).max() < 1e-10)
        True
    """

    question = "difference"

    @property
    def base(self) -> xr.DataArray:
        """(query,): the measurement after the last step of the base run."""
        return self.dataset["initial"].rename("base")

    @property
    def changed(self) -> xr.DataArray:
        """(query,): the measurement after the last step of the changed run."""
        return self.dataset["final"].rename("changed")

    @property
    def change(self) -> xr.DataArray:
        """(query,): what all terms sum to."""
        return (self.changed - self.base).rename("change")

    @property
    def residual(self) -> xr.DataArray:
        """(query,): changed minus base minus all terms; measured, never spread over them."""
        return self.dataset["residual"]

    @property
    def cancellation(self) -> xr.DataArray:
        """(query,): the gross size of the terms over what they sum to; where it is large, each says little by itself."""
        change = abs(self.change)
        return (self.dataset["gross"] / change.where(change > 0)).rename("cancellation")

    @property
    def trace(self) -> xr.DataArray:
        """(query, state): the norm of the sensitivity to the parameters, over that at the end."""
        return grown(self.dataset)

    @property
    def growth(self) -> xr.DataArray:
        """(query,): the largest of them."""
        return self.trace.max("state").rename("growth")

    @property
    def warning(self) -> str:
        """That the terms cancel, where they are more than a hundred times what they sum to."""
        times = float(self.cancellation.max())
        if not times > LARGE:
            return ""
        return (
            f"the terms cancel: they are {times:.3g} times what they sum to, so that little can be read from each. The runs "
            f'have come apart; compare fewer steps, a smaller change, or ask for via="reaction"'
        )

    def timeline(self) -> xr.DataArray:
        """(query, step, group): all that separates the runs and stands at a step, what is no example's included.

        With `start` and `buffers`, which stand at none, it sums to `change` less the residual.

        Raises:
            KeptAxesError: it was not kept along steps and groups.
        """
        rows = [self.dataset[name] for name in terms_of(self.dataset) if "step" in self.dataset[name].dims]
        return sum(rows, super().timeline()).rename("timeline")

    def ledger(self) -> Ledger:
        """The terms summed, per query, whether or not they add up: see `check`."""
        rows = {name: self.dataset[name] for name in terms_of(self.dataset)}
        terms = xr.Dataset(
            {
                "base": self.base,
                "examples": self.by(),
                **{name: row.sum([d for d in row.dims if d != "query"]) for name, row in rows.items()},
                "residual": self.residual,
                "changed": self.changed,
            }
        )
        via = str(self.dataset.attrs["via"])
        sizes = {
            "gross / |net|": f"at most {float(self.cancellation.max()):.3g}" + (f", {FAR}" if self.warning else ""),
            "sensitivity": f"grew to {float(self.growth.max()):.3g} times that at the end",
            f"via {via}": SAYS[via],
        }
        return Ledger(terms, {name: self.gap(name) for name in CHECKED}, sizes)

    def check(self, rtol: float = 1e-3) -> Ledger:
        """Check that base + terms == changed, and that all arrays say the same.

        Args:
            rtol: bound on |residual|, relative to |changed - base|; of runs in float64 1e-10 is to be had.

        Raises:
            BatchIdentityError, SplitIdentityError: model or loss are not those that were recorded, or shares not those of
                their examples; the sum would be right all the same.
            CompletenessError: with the worst query, its residual, and how far its terms cancel; also where a number is not
                finite, or two arrays do not add up to the same.
        """
        self.check_shares()
        residual, change = np.abs(self.residual.values), np.abs(self.change.values)
        gap = np.where(change > 0, residual / np.where(change > 0, change, 1.0), np.where(residual > 0, np.inf, 0.0))
        gap = np.where(np.isfinite(residual), gap, np.inf)
        worst = int(np.argmax(gap))
        if not gap[worst] <= rtol:
            raise CompletenessError(
                f"the terms do not add up: got a residual of {gap[worst]:.3g} of the change, expected at most {rtol:.3g}, "
                f"at query {self.dataset['query'].values[worst]}, whose terms are {float(self.cancellation[worst]):.3g} "
                f"times what they sum to. Are model and loss those that were recorded?\n{self.ledger()}"
            )
        check_parts(self.dataset, rtol)
        return self.ledger()

    def __repr__(self) -> str:
        sizes = self.dataset.sizes
        return (
            f"<attrib.Difference: {sizes['query']} queries over {sizes['step']} steps, {sizes['example']} examples, "
            f"{sizes['group']} groups>\n{self.ledger()}"
        )
