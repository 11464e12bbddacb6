"""What `attrib.influence` gives: derivatives of the final measurement by the weight of each example's loss.

    influence(i, s, group) = d m(theta_T) / d w_i,   w_i in front of loss i at step s, through that group of parameters

They answer what would change if an example weighed a little more or less. They do not add up to anything.
"""

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import xarray as xr

from ..errors import InfluenceError, SplitIdentityError
from ..ledger import Ledger
from .labelled import Labelled, grown

PER_WEIGHT = " per unit of weight"
CHAOTIC = 1e3  # growth of the sensitivity from which on no derivative predicts what a change that is not tiny does


class Influence(Labelled):
    """Derivatives of a measurement by the weight of each example's loss: positive where more of it raises the measurement.
    They do not add up to anything. Made by `attrib.influence` or `attrib.open_result`.

    dataset: xarray.Dataset with final, tangent, swept, restored (query); lost, rescaled (query, example); growth (query,
        state), the norm of the sensitivity to the parameters; one array of influences per set of axes that was kept; where
        it was asked for, lds, lds_low, lds_high (query), how well they foretold retrainings.

    Example:
        >>> influence = attrib.influence(run, model, measurement, loss=loss)
        >>> influence.by("example").shape
        (2, 24)
        >>> influence.predict([[3, 14], [15]]).dims  # without examples 3 and 14, without example 15
        ('subset', 'query')
    """

    word = "influence"
    question = "influence"

    @property
    def final(self) -> xr.DataArray:
        """(query,): the measurement that is differentiated, after the last step."""
        return self.dataset["final"]

    @property
    def measured_units(self) -> str:
        """Of the measurement itself; `units` are those of its derivatives."""
        return self.units.removesuffix(PER_WEIGHT)

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
        """That no derivative will predict, where the training is chaotic."""
        return self.said if float(self.growth.max()) >= CHAOTIC else ""

    @property
    def tangent_gap(self) -> float:
        """Between a tangent carried forwards and the sensitivities, relative to the larger; NaN where not asked for."""
        tangent, swept = self.dataset["tangent"].values, self.dataset["swept"].values
        size = np.maximum(np.abs(tangent), np.abs(swept)).max()
        return float(np.abs(tangent - swept).max() / size) if size != 0 else 0.0

    def ledger(self) -> Ledger:
        """The measurement that is differentiated, and how it was checked that the derivatives are those of the training;
        they add up to nothing."""
        gaps = {"batch": self.gap("batch"), "split": self.gap("split"), "tangent": self.tangent_gap}
        sizes = {
            "sensitivity": f"grew to {float(self.growth.max()):.3g} times that at the end",
            "curvature": str(self.dataset.attrs.get("curvature", "exact")),
        }
        return Ledger(xr.Dataset({"final": self.final}), gaps, sizes)

    def without(self, mean: str = "remaining") -> xr.DataArray:
        """(query, example): to first order what leaving each example out would change. As scores, positive where an example
        raised the measurement, they are the negative: `attrib.lds(-found.without(), subsets, outcomes)`.

        Args:
            mean: "remaining": where a loss is a mean over the batch, it is over those that remain, so that they weigh more;
                "fixed": whatever divides the losses stays as it was.

        Raises:
            ValueError: another `mean`.
        """
        if mean not in ("remaining", "fixed"):
            raise ValueError(f"mean is none: got {mean!r}, expected 'remaining' or 'fixed'.")
        gained = self.dataset["rescaled"] if mean == "remaining" else 0.0
        return (gained - self.dataset["lost"]).rename("without")

    def predict(self, subsets: Sequence[Collection[Any]], mean: str = "remaining") -> xr.DataArray:
        """(subset, query): the measurement, to first order, had the examples of each subset been left out.

        Args:
            subsets: ids of the examples that are left out, of each subset.
            mean: as for `without`.

        Raises:
            ValueError: an id that is not among the examples, or another `mean`.
        """
        each = self.without(mean)
        known = {label: n for n, label in enumerate(each["example"].values.tolist())}
        unknown = [i for subset in subsets for i in subset if _plain(i) not in known]
        if unknown:
            raise ValueError(
                f"there are no such train examples: got {unknown[:5]}, expected some of the {len(known)} ids of the result."
            )
        changes = [each.values[:, [known[_plain(i)] for i in subset]].sum(1) for subset in subsets]
        whole = (self.final + self.dataset["restored"]).values  # with all of them, at the weights that they had
        values, queries = whole + np.reshape(changes, (len(subsets), -1)), {"query": self.dataset["query"]}
        return xr.DataArray(values, queries, ("subset", "query"), "predicted")

    def check(self, rtol: float | None = None) -> str:
        """Check that the derivatives are those of the training: for random weights of the last steps' examples, their sum
        against the change that a tangent makes which is carried forwards through these steps.

        Args:
            rtol: how far the two may be apart, relative to their size; None for what rounding of the run's type explains,
                1.5e-8 in float64, 3.5e-4 in float32.

        Returns:
            What it found, in words, and whether a derivative will predict.

        Raises:
            InfluenceError: they differ. BatchIdentityError, SplitIdentityError: model or loss are not those that were
                recorded, or influences not those of their examples.
        """
        if (failure := self.dataset.attrs.get("split_failure")) is not None:
            raise SplitIdentityError(str(failure))
        self.check_shares()
        gap = self.tangent_gap
        if np.isnan(self.dataset["tangent"].values).all():  # it was not asked for
            return f"tangent against sensitivity: not checked\n{self.said}"
        rtol = float(self.dataset.attrs["bound"]) if rtol is None else rtol
        if not gap <= rtol:
            raise InfluenceError(
                f"the derivatives are not those of the training: got a gap of {gap:.3g} between a tangent carried forwards "
                f"and the sensitivities carried backwards, expected at most {rtol:.3g}. Are model and loss those that were "
                f"recorded?"
            )
        return f"tangent against sensitivity: {gap:.2e}\n{self.said}"

    @property
    def said(self) -> str:
        """Whether a derivative will predict, in a sentence; and whether it did, where that was tried."""
        growth = float(self.growth.max())
        grew = f"the sensitivity to the parameters grew to {growth:.3g} times that at the end"
        if growth >= CHAOTIC:
            grew += (
                ": the training is chaotic, and no derivative predicts what leaving examples out does; compare runs by "
                "attrib.difference"
            )
        if "foretold" not in self.dataset.attrs:
            return grew
        count, part, mean, low, high = self.dataset.attrs["foretold"]
        return (
            f"{grew}\nof {count} retrainings without {part:.3g} of the examples, outcomes and predictions have a rank "
            f"correlation of {mean:.2f} ({low:.2f} to {high:.2f})"
        )

    def __repr__(self) -> str:
        sizes = self.dataset.sizes
        return (
            f"<attrib.Influence: {sizes['query']} queries over {sizes['step']} steps, {sizes['example']} examples, "
            f"{sizes['group']} groups>\n{self.said}"
        )


def _plain(label: Any) -> Any:
    return label if isinstance(label, str) else int(label)
