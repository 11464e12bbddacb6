"""leave_out(): the examples that score highest for a query are left out, more and more of them, beside random ones."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import xarray as xr
from torch import Tensor, nn

from ..functional import uncompiled
from ..query import query_of
from ..run import Run
from .retraining import retrain_subsets
from .scores import random_subsets, score_table


def leave_out(
    run: Run,
    scores: Any,
    measurement: Any,
    shares: Sequence[float] = (0.01, 0.05, 0.2),
    *,
    model: nn.Module,
    loss: Callable[..., Tensor],
    draws: int = 5,
    seed: int = 0,
    examples: Any = None,
    **options: Any,
) -> xr.Dataset:
    """Train again without the examples that score highest, for each query its own, and without as many random ones.

    Args:
        run, measurement, model, loss: as for `attrib.retrain_subsets`.
        scores: as for `attrib.lds`, positive where the example raised the measurement.
        shares: of the run's examples that are left out, between 0 and 1.
        draws: of random examples for each share.
        seed: of the draws.
        examples: the ids of an array's columns; None: those of the run.
        options: of `attrib.retrain_subsets`: store, executor, ...

    Returns:
        top (share, query): the measurement of each query without its own highest, minus that of the run as it was; random
        (share, draw, query): the same without random ones. Good scores make `top` fall far below `random`.

    Raises:
        ValueError: scores that do not fit. What `retrain_subsets` raises.

    Example:
        >>> shares = [0.1, 0.2]
        >>> curve = attrib.leave_out(run, result, measurement, shares, model=model, loss=loss, draws=2)
        >>> (curve["top"] - curve["random"].mean("draw")).dims
        ('share', 'query')
    """
    table = score_table(scores, run.examples if examples is None else examples)
    if not len(shares) or not all(0 < share < 1 for share in shares):
        raise ValueError(f"shares are none: got {shares!r}, expected numbers between 0 and 1, at leave_out.")
    whole = run.whole(run.steps).to(next(model.parameters()).device)
    measured = query_of(run, uncompiled(model), measurement, options.get("dtype"), whole, range(run.steps))
    if (count := measured.count) != table.sizes["query"]:
        raise ValueError(f"scores are of other queries: got {table.sizes['query']}, expected {count}, at leave_out.")
    order, ids = np.argsort(-table.values, axis=1, kind="stable"), table["example"].values
    sizes = [max(1, round(share * len(run.examples))) for share in shares]
    top = [ids[row[:size]] for size in sizes for row in order]
    random = [s for n, share in enumerate(shares) for s in random_subsets(run, share, draws, seed + n)] if draws else []
    outcomes = retrain_subsets(run, [*top, *random], measurement, model=model, loss=loss, **options)
    changes = outcomes.changes.values
    own = changes[: len(top)].reshape(len(shares), count, count)
    return xr.Dataset(
        {
            "top": (("share", "query"), np.diagonal(own, axis1=1, axis2=2).copy()),
            "random": (("share", "draw", "query"), changes[len(top) :].reshape(len(shares), draws, count)),
        },
        {"share": list(shares), "query": np.arange(count), "draw": np.arange(draws)},
        {"units": outcomes.dataset.attrs["units"]},
    )
