"""Two results beside each other: do they end at the same value, by the same examples, in the same groups?"""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from ..errors import KeptAxesError
from ..result import Result


@dataclass(frozen=True)
class Comparison:
    """Two results beside each other, printed as tables. Made by `compare`.

    Args:
        queries: a row per query that both have: final values, and how alike the contributions of the common examples are:
            correlation, rank correlation, and the share of the `n` largest in size that is common.
        groups: a row per query and group, with the net change by each result.
        n: as it was chosen.

    Example:
        >>> other = attrib.attribute(changed, model, measurement, loss=loss)
        >>> attrib.report.compare(result, other, n=3).queries.columns.tolist()
        ['query', 'final a', 'final b', 'common examples', 'correlation', 'rank correlation', 'same of top 3']
    """

    queries: pd.DataFrame
    groups: pd.DataFrame
    n: int

    def __str__(self) -> str:
        lines = [self.queries.to_string(float_format="{:.4f}".format, index=False)]
        if len(self.groups):
            shown = _largest(self.groups).to_string(float_format="{:+.4f}".format, index=False)
            lines += ["", "net change per group", shown]
        return "\n".join(lines)


def _largest(groups: pd.DataFrame, most: int = 12) -> pd.DataFrame:
    """Of each query the groups that differ most, and what is left as one."""
    twins = groups.groupby(["query", "group"]).cumcount()  # of queries with one name
    tables = []
    for _, table in groups.groupby(["query", twins], sort=False):
        order = np.argsort(-(table["a"] - table["b"]).abs().to_numpy(), kind="stable")
        kept = order if len(order) <= most else order[: most - 1]
        rest = table.iloc[order[len(kept) :]]
        tables.append(table.iloc[np.sort(kept)])
        if len(rest):
            others = {"query": rest["query"].iloc[0], "group": f"other {len(rest)} groups"}
            tables.append(pd.DataFrame([{**others, "a": rest["a"].sum(), "b": rest["b"].sum()}]))
    return pd.concat(tables, ignore_index=True)


def compare(a: Result, b: Result, n: int = 10) -> Comparison:
    """Compare query by query: by their names where both have some, else by their numbers.

    Args:
        a, b: from `attrib.attribute`, of the same measurement, of one run or of two.
        n: how many of the largest contributions are looked for in both.

    Raises:
        ValueError: they have no query in common.

    Example:
        >>> other = attrib.attribute(changed, model, measurement, loss=loss)
        >>> print(attrib.report.compare(result, other))
        query  final a  final b  common examples  correlation  rank correlation  same of top 10
            0  ...
    """
    ours, theirs = _keys(a, b), _keys(b, a)
    common = [key for key in ours if key in theirs]
    if not common:
        raise ValueError(
            f"the results have no query in common: got {', '.join(a.names[:3])}, ... and {', '.join(b.names[:3])}, ... "
            f"Compare results of the same measurement."
        )
    rows, groups = [], []
    for key in common:
        one, two, name = a.select([ours[key]]), b.select([theirs[key]]), str(key[0])
        row = {"query": name, "final a": float(one.final[0]), "final b": float(two.final[0])}
        rows.append({**row, **_alike(one, two, n)})
        groups.append(_groups(name, one, two))
    return Comparison(pd.DataFrame(rows), pd.concat(groups, ignore_index=True), n)


def _keys(result: Result, other: Result) -> dict[tuple[object, int], int]:
    """(name or number, which of those called so) -> position."""
    named = all("query_name" in r.dataset.coords for r in (result, other))
    called: list[object] = [*(result.names if named else result.dataset["query"].values.tolist())]
    return {(name, called[:q].count(name)): q for q, name in enumerate(called)}


def _alike(a: Result, b: Result, n: int) -> dict[str, float]:
    try:
        one, two = (r.by("example")[0].to_series() for r in (a, b))
    except KeptAxesError:
        return {}
    both = one.index.intersection(two.index)
    one, two = one[both], two[both]
    largest = [set(v.abs().nlargest(n).index) for v in (one, two)]
    return {
        "common examples": len(both),
        "correlation": _correlation(one, two),
        "rank correlation": _correlation(one.rank(), two.rank()),
        f"same of top {n}": len(largest[0] & largest[1]) / max(1, min(n, len(both))),
    }


def _correlation(a: pd.Series, b: pd.Series) -> float:
    if len(a) < 2 or a.std() == 0 or b.std() == 0:
        return float("nan")
    return float(np.corrcoef(a.to_numpy(), b.to_numpy())[0, 1])


def _groups(name: str, a: Result, b: Result) -> pd.DataFrame:
    sums = {
        label: r.timeline()[0].sum("update_step").drop_vars(["query", "query_name"], errors="ignore").to_series()
        for label, r in (("a", a), ("b", b))
    }
    table = pd.DataFrame(sums).dropna().rename_axis("group").reset_index()
    table.insert(0, "query", name)
    return table
