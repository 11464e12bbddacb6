"""The parts of a result, held against one another: each is stored by itself, and what they add up to is added up again.

Sums of the same numbers in another order differ by rounding: n numbers by at most n * eps times the sum of their sizes
(Higham 2002, 4.2).
"""

from collections.abc import Iterator

import numpy as np
import xarray as xr

from .errors import CompletenessError
from .ledger import said, terms_of

PREFIX = "contribution"
EPS = float(np.finfo(np.float64).eps)
UNCHECKED = "_identity"  # arrays of these names hold NaN where nothing was checked


def kept_axes(dataset: xr.Dataset, word: str = PREFIX) -> list[tuple[str, ...]]:
    """The axes that contributions, or whatever the word is, were kept along, an array each."""
    found = [tuple(str(v).split("_")[1:]) for v in dataset.data_vars if str(v).startswith(word + "_")]
    return sorted(found, key=lambda axes: (len(axes), axes))


def rounding_allowed(dataset: xr.Dataset) -> np.ndarray:
    """(Q,): what rounding makes of the residual: the part that was measured to come from rounding the stored parameters, as
    far as their spacing explains it, in float64 nothing; and one rounding of each contribution in the type that gradients
    were computed in, eps sum |c_i|, which where contributions cancel is much of what they sum to; at most half of the digits
    of that, beyond which contributions say little. A share that is wrong is off by its own size, not by eps of it. Of what
    was not measured nothing."""
    found = np.zeros(dataset.sizes["query"])
    if "rounding" in dataset:
        found = np.minimum(np.abs(dataset["rounding"].values), dataset["spacing"].values)
    if "sizes" in dataset:
        eps = float(dataset.attrs.get("eps", 0.0))
        found = found + np.minimum(eps * dataset["sizes"].values, eps**0.5 * size_of(dataset))
    return found


def size_of(dataset: xr.Dataset) -> np.ndarray:
    """(Q,): the gross size of what is summed, both ends of it among that."""
    return np.max([np.abs(dataset["initial"].values), np.abs(dataset["final"].values), dataset["gross"].values], axis=0)


def cancellation(dataset: xr.Dataset) -> float:
    """How many times what is summed, `size_of`, the sizes of the single examples' contributions make, at the worst query; 0
    where no array of examples was kept."""
    kept = [a for name, a in dataset.data_vars.items() if str(name).startswith(PREFIX) and "example" in a.dims]
    if not kept:
        return 0.0
    array = min(kept, key=lambda a: a.size)
    each = abs(array.sum([axis for axis in array.dims if axis not in ("query", "example")])).sum("example").values
    return float(np.max(each / np.maximum(size_of(dataset), np.finfo(float).tiny)))


def check_parts(dataset: xr.Dataset, rtol: float) -> None:
    """Add everything up again.

    Args:
        rtol: bound on what the timeline and the terms differ by, relative to `size_of`, as of the residual that this is:
            they are the same sum in two orders of the recurrence, not of the same numbers. What rounding the stored
            parameters makes of it is allowed for on top.

    Raises:
        CompletenessError: a number is not finite, or two arrays that hold the same sum do not agree.
    """
    for name, array in dataset.data_vars.items():
        if not str(name).endswith(UNCHECKED) and not np.isfinite(array.values).all():
            at = {str(d): int(n[0]) for d, n in zip(array.dims, np.nonzero(~np.isfinite(array.values)), strict=True)}
            raise CompletenessError(
                f"a number of the result is not finite: expected finite numbers throughout, at array {name!r}, positions "
                f"{at}. Attribute again."
            )
    loose = rtol * size_of(dataset) + rounding_allowed(dataset)
    for what, got, expected, slack in _sums(dataset):
        off = np.abs(got - expected) - slack - (loose if what == "timeline" else 0.0)
        if (off > 0).any():
            query = int(off.argmax())
            raise CompletenessError(
                f"two parts of the result do not agree: got {got[query]!r} from {what}, expected {expected[query]!r}, at "
                f"query {dataset['query'].values[query]}. One of them was changed; attribute again."
            )


def _sums(dataset: xr.Dataset) -> Iterator[tuple[str, np.ndarray, np.ndarray, np.ndarray]]:
    """What is added up, its sum, the sum that is expected, what rounding may leave between them: (Q,) each."""
    initial, final, residual = (dataset[name].values for name in ("initial", "final", "residual"))
    none = np.zeros(len(initial))
    if "curve" in dataset:
        curve = dataset["curve"].values
        yield "the first state of `curve`, against `initial`", curve[:, 0], initial, none
        yield "the last state of `curve`, against `final`", curve[:, -1], final, none
    rest, slack = np.zeros_like(initial), EPS * (np.abs(initial) + np.abs(final))
    names = terms_of(dataset)
    for name in names:
        total, rounding = _total(dataset[name])
        rest, slack = rest + total, slack + rounding
    explained = final - initial - residual
    for axes in kept_axes(dataset):
        name = "_".join((PREFIX, *axes))
        total, rounding = _total(dataset[name])
        yield (
            f"`{name}` with {', '.join(map(said, names))} and residual",
            total + rest,
            explained,
            4 * (rounding + slack),
        )
    if "timeline" in dataset:
        total, rounding = _total(dataset["timeline"])
        yield "timeline", total, explained, 4 * (rounding + slack)


def _total(array: xr.DataArray) -> tuple[np.ndarray, np.ndarray]:
    """Over everything but the queries, (Q,), and what the order of summation may change."""
    flat = array.transpose("query", ...).values.reshape(array.sizes["query"], -1)
    return flat.sum(1), flat.shape[1] * EPS * np.abs(flat).sum(1)
