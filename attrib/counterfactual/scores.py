"""How well scores per example foretell what leaving examples out does: the linear datamodelling score, and detection.

    predicted(q, S) = sum over i in S of (w_i - 1) score(q, i)          w_i = 0 where i is left out
    lds(q)          = Spearman correlation over the subsets S of predicted(q, S) and outcome(q, S)

Sign, as throughout: a positive score says that the example raised the measurement, so that leaving it out lowers it.
Source: Park et al. 2023 (TRAK), with subsets that are left out in the place of those that are kept.
"""

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import xarray as xr

from ..run import Run
from .outcomes import Outcomes


def lds(
    scores: Any,
    subsets: Sequence[Collection[int | str]] | None,
    outcomes: Any,
    *,
    examples: Any = None,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> xr.Dataset:
    """Linear datamodelling score: the rank correlation over subsets of summed scores and real outcomes, per query
    (Park et al. 2023, with subsets that are left out in the place of those that are kept).

    Args:
        scores: of every example for every query, positive where it raised the measurement: a DataArray with dimensions
            query and example, anything whose `by("example")` is one (a `Result`), or an array (Q, N).
        subsets: the ids that were left out, one list per outcome; None: those of `outcomes`.
        outcomes: from `attrib.retrain_subsets`, or an array (S, Q) of measurements after leaving the subsets out.
        examples: (N,) the ids of an array's columns; None: those of the outcomes, or 0 to N - 1.
        resamples: of the subsets, with replacement, for the intervals. level: what these hold, 0 to 1.
        seed: of the draws.

    Returns:
        lds, low, high (query), and mean, mean_low, mean_high over the queries; NaN where all outcomes, or all predictions,
        of a query are the same.

    Raises:
        ValueError: shapes that do not fit, ids without a score, fewer than three subsets, numbers that are not finite.

    Example:
        >>> ids = [[0, 1], [1, 2], [2, 3], [0, 3]]
        >>> left_out = [[-3.0], [-5.0], [-7.0], [-5.0]]  # each example is worth its number plus one
        >>> float(attrib.lds([[1.0, 2.0, 3.0, 4.0]], ids, left_out)["mean"])
        1.0
        >>> attrib.lds(result, subsets, outcomes)["lds"].shape
        (2,)
    """
    table = score_table(scores, outcomes.dataset["example"].values if examples is None and _is(outcomes) else examples)
    changed, weight, values = _asked(subsets, outcomes, table)
    _check_numbers(table.values, values)
    if len(values) < 3 or resamples < 1 or not 0 < level < 1:
        raise ValueError(
            f"there is nothing to correlate: got {len(values)} subsets, {resamples} resamples, level {level}, expected at "
            f"least 3 subsets, 1 resample and a level between 0 and 1, at lds."
        )
    predicted = (changed * (weight - 1)[:, None]) @ table.values.T  # (S, Q)
    drawn = np.random.default_rng(seed).integers(0, len(values), (resamples, len(values)))
    found = np.array([spearman(predicted[None, :, q], values[None, :, q])[0] for q in range(values.shape[1])])
    spread = np.stack(
        [spearman(predicted[drawn, q], values[drawn, q]) for q in range(values.shape[1])]
    )  # (Q, resamples)
    ends = [50 * (1 - level), 50 * (1 + level)]
    low, high = _percentiles(spread, ends)
    mean_low, mean_high = _percentiles(_mean(spread, 0)[None], ends)[:, 0]
    return xr.Dataset(
        {"lds": ("query", found), "low": ("query", low), "high": ("query", high)}
        | {"mean": _mean(found, 0), "mean_low": mean_low, "mean_high": mean_high},
        {"query": table["query"].values},
        {"level": level, "subsets": len(values)},
    )


def mislabelled_auc(scores: Any, mislabelled: Collection[int | str], *, examples: Any = None) -> xr.DataArray:
    """How well low scores find mislabelled examples: the chance that one of them scores lower than one that is not.

    Args:
        scores: as for `lds`, of measurements that such examples lower, such as log-probabilities of clean data.
        mislabelled: their ids.
        examples: as for `lds`.

    Returns:
        (query,): the area under the curve, 0.5 for chance; ties count half.

    Raises:
        ValueError: ids without a score, none or all of the examples.

    Example:
        >>> attrib.mislabelled_auc([[3.0, -1.0, 2.0, 0.0]], [1]).values
        array([1.])
    """
    table = score_table(scores, examples)
    flags = members([mislabelled], table["example"].values, "mislabelled")[0]
    bad, clean = int(flags.sum()), int((~flags).sum())
    if not bad or not clean:
        raise ValueError(f"there is nothing to tell apart: got {bad} of {bad + clean} mislabelled, at mislabelled_auc.")
    ranks = ranked(-table.values)[:, flags].sum(1)
    area = (ranks - bad * (bad + 1) / 2) / (bad * clean)
    return xr.DataArray(area, {"query": table["query"].values}, name="auc")


def random_subsets(run: Run, share: float, count: int, seed: int = 0) -> list[np.ndarray]:
    """Sets of examples drawn at random without replacement, to be left out.

    Args:
        run: from `attrib.open_run`.
        share: of the run's examples, at least one.
        count: of the sets.
        seed: of the draws.

    Returns:
        The ids of each set, an array in the order of the run's examples: `subsets` of `attrib.retrain_subsets`.

    Raises:
        ValueError: a share that is not between 0 and 1, or no count.

    Example:
        >>> [len(subset) for subset in attrib.random_subsets(run, 0.25, 3)]
        [6, 6, 6]
    """
    if not 0 < share < 1 or count < 1:
        raise ValueError(
            f"no sets can be drawn: got {count} of {share}, expected 1 or more of a share between 0 and 1."
        )
    rng, size = np.random.default_rng(seed), max(1, round(share * len(run.examples)))
    return [run.examples[np.sort(rng.choice(len(run.examples), size, replace=False))] for _ in range(count)]


def score_table(scores: Any, examples: Any = None) -> xr.DataArray:
    """(query, example), with the ids as coordinate `example`.

    Raises:
        ValueError: it is none.
    """
    found = scores.by("example") if hasattr(scores, "by") else scores
    if isinstance(found, xr.DataArray):
        if set(found.dims) != {"query", "example"} or "example" not in found.coords:
            raise ValueError(
                f"scores are not one per query and example: got dimensions {found.dims}, expected 'query' and 'example', "
                f"with the ids as coordinate."
            )
        table = found.transpose("query", "example")
        return table if "query" in table.coords else table.assign_coords(query=np.arange(table.sizes["query"]))
    values = np.asarray(found, dtype=np.float64)
    ids = np.arange(values.shape[-1] if values.ndim else 0) if examples is None else np.asarray(examples)
    if values.ndim != 2 or ids.shape != values.shape[1:]:
        raise ValueError(
            f"scores are not one per query and example: got shape {values.shape} for {len(ids)} ids, expected (Q, N). Pass "
            f"the ids of the columns as examples=."
        )
    return xr.DataArray(values, {"query": np.arange(len(values)), "example": ids}, dims=("query", "example"))


def members(subsets: Sequence[Collection[Any]], examples: np.ndarray, where: str) -> np.ndarray:
    """(S, N) bool: which examples are in each subset.

    Raises:
        ValueError: an id that is none of the examples.
    """
    place = {example: n for n, example in enumerate(examples.tolist())}
    found = np.zeros((len(subsets), len(place)), dtype=bool)
    for n, subset in enumerate(subsets):
        ids = [e if isinstance(e, str) else int(e) for e in subset]
        unknown = [e for e in ids if e not in place]
        if unknown:
            raise ValueError(
                f"examples have no score: got {unknown[:5]}, expected some of the {len(place)} that have one, such as "
                f"{next(iter(place), None)!r}, at {where}."
            )
        found[n, [place[e] for e in ids]] = True
    return found


def ranked(values: np.ndarray) -> np.ndarray:
    """(R, S) -> of each row the ranks, ties at their mean."""
    from scipy.stats import rankdata  # a third of the time that importing attrib would take

    found: np.ndarray = rankdata(values, axis=1)
    return found


def spearman(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(R, S), (R, S) -> (R,): Pearson's correlation of the ranks, ties at their mean; NaN where all of one are equal."""
    a, b = (ranks - ranks.mean(1, keepdims=True) for ranks in (ranked(x), ranked(y)))
    size = np.sqrt((a * a).sum(1) * (b * b).sum(1))
    return np.divide((a * b).sum(1), size, out=np.full(len(size), np.nan), where=size > 0)


def _check_numbers(scores: np.ndarray, outcomes: np.ndarray) -> None:
    """(Q, N), (S, Q)"""
    if len(scores) != outcomes.shape[1]:
        raise ValueError(
            f"scores and outcomes are of different queries: got {len(scores)} and {outcomes.shape[1]}, expected as many, at "
            f"lds."
        )
    for name, array in (("scores", scores), ("outcomes", outcomes)):
        if not np.isfinite(array).all():
            raise ValueError(f"{name} are not finite: got {int((~np.isfinite(array)).sum())} that are not, at lds.")


def _is(outcomes: Any) -> bool:
    return isinstance(outcomes, Outcomes)


def _asked(subsets: Any, outcomes: Any, table: xr.DataArray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """changed (S, N) over the scored examples, weight (S,), the outcomes (S, Q)."""
    examples = table["example"].values
    if not _is(outcomes):
        values = np.asarray(outcomes, dtype=np.float64)
        if subsets is None or values.ndim != 2 or len(subsets) != len(values):
            raise ValueError(
                f"subsets and outcomes do not fit: got {None if subsets is None else len(subsets)} and shape "
                f"{values.shape}, expected S lists of ids and (S, Q), at lds."
            )
        return members(subsets, examples, "lds"), np.zeros(len(values)), values
    found = members(outcomes.subsets, examples, "lds")
    if subsets is not None:
        asked = [subsets[n] for n in outcomes.dataset["subset"].values if n < len(subsets)]
        if len(asked) < len(found) or not np.array_equal(members(asked, examples, "lds"), found):
            raise ValueError(
                f"the outcomes are of other subsets: got {len(subsets)} that are not theirs, expected those that "
                f"retrain_subsets was asked for, in order, at lds. Pass None for those of the outcomes."
            )
    return found, np.nan_to_num(outcomes.dataset["weight"].values, nan=0.0), outcomes.values.values


def _mean(values: np.ndarray, axis: int) -> Any:
    """Of those that are numbers; NaN where none is."""
    known = ~np.isnan(values)
    count = known.sum(axis)
    return np.where(count > 0, np.where(known, values, 0.0).sum(axis) / np.maximum(count, 1), np.nan)


def _percentiles(spread: np.ndarray, ends: Sequence[float]) -> np.ndarray:
    """(Q, resamples) -> (2, Q), of those that are numbers."""
    rows = [row[~np.isnan(row)] for row in spread]
    return np.array([np.percentile(row, ends) if len(row) else [np.nan, np.nan] for row in rows]).T
