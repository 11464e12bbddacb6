"""Whether two runs owe a prediction to the same examples, steps or groups."""

from collections.abc import Mapping

import numpy as np
import xarray as xr

from ..result import Result

KINDS = ("cosine", "rank")


def similarity(results: Mapping[str, Result], *axes: str, kind: str = "cosine") -> xr.DataArray:
    """Similarity of the contributions of two results to the same queries, for all pairs.

    Args:
        results: name -> result; of the same queries, in the same order.
        axes: that contributions are compared along, such as "example" or "group"; by their labels, of which those that all
            results have count.
        kind: "cosine" of the contributions, or "rank", the correlation of their ranks (Spearman).

    Returns:
        (query, run, other), -1 to 1; NaN where all contributions are zero (or equal).

    Raises:
        ValueError: no axes, another kind, fewer than two results, other numbers of queries, or no labels in common.
        KeptAxesError: a result was not kept along these axes.

    Example:
        >>> other = attrib.attribute(changed, model, measurement, loss=loss)
        >>> found = attrib.similarity({"as it was": result, "changed": other}, "example", "group")
        >>> found.dims, found.shape
        (('query', 'run', 'other'), (2, 2, 2))
    """
    if kind not in KINDS or not axes or len(results) < 2:
        raise ValueError(
            f"there is nothing to compare: got kind {kind!r}, axes {axes} and {len(results)} results, expected one of "
            f"{', '.join(KINDS)}, at least one axis and two results, at similarity."
        )
    counts = {name: r.dataset.sizes["query"] for name, r in results.items()}
    if len(set(counts.values())) > 1:
        raise ValueError(f"the results are not of the same queries: got {counts}, expected as many, at similarity.")
    arrays = [r.by(*axes).drop_vars("query_name", errors="ignore") for r in results.values()]
    shared = xr.align(*arrays, join="inner")
    if not shared[0].size:
        raise ValueError(f"the results share no labels: got none in common along {axes}, expected some, at similarity.")
    rows = np.stack([a.values.reshape(len(a), -1) for a in shared], 1)  # (Q, runs, n)
    if kind == "rank":
        from scipy.stats import rankdata  # slow to import

        rows = rankdata(rows, axis=-1)
        rows = rows - rows.mean(-1, keepdims=True)
    sizes = np.linalg.norm(rows, axis=-1, keepdims=True)
    unit = np.divide(rows, sizes, out=np.full_like(rows, np.nan), where=sizes > 0)
    names = list(results)
    first = next(iter(results.values())).names
    return xr.DataArray(unit @ unit.swapaxes(1, 2), {"query": first, "run": names, "other": names}, name=kind)
