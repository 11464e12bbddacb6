"""Tables for the terminal."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd

from ..result import Labelled, Result
from .thin import bin_steps, fold_groups

BAR = 24
COLUMNS = 8  # groups beside each other


def largest(result: Result, query: int, n: int, describe: Callable[[Any], str]) -> str:
    """The n contributions of examples that are largest in size, signed, with a bar."""
    table = result.select([query]).top(n)
    order = np.argsort(-table["contribution"].abs().to_numpy(), kind="stable")[:n]
    return bars(table.iloc[order], describe)


def bars(table: pd.DataFrame, describe: Callable[[Any], str]) -> str:
    """Rows of `top` of a result, each with a bar."""
    values = table.iloc[:, -1].to_numpy()
    names = [" ".join(describe(e).split())[:60] for e in table["example"].tolist()]
    widest, width = np.abs(values).max(initial=1e-300), max([16, *(len(n) for n in names)])
    lines = []
    for name, value in zip(names, values, strict=True):
        mark = ("+" if value > 0 else "-") * max(1, round(BAR * abs(value) / widest))
        lines.append(f"{name:>{width}s} {value:+11.4f}  {mark}")
    return "\n".join(lines)


def binned(result: Labelled, query: int, bins: int, groups: int | None = None) -> dict[str, Any]:
    """The timeline in so many bins of steps: edges (B + 1), the measurement or sensitivity at each, and per group what
    stands in each bin (B,); at most so many `groups`, those that move most and the others as one."""
    changes, trace = result.timeline()[query], result.trace[query]
    changes = changes if groups is None else fold_groups(changes, groups)
    parts = bin_steps(changes.shape[0], bins)
    sums = parts.sum(changes.values, 0)
    return {
        "edges": (parts.edges + int(changes[changes.dims[0]].values[0])).tolist(),
        str(trace.name): trace.values[parts.edges].tolist(),
        "groups": {str(g): sums[:, k].tolist() for k, g in enumerate(changes["group"].values)},
    }


def timeline(result: Labelled, query: int, bins: int = 12) -> str:
    """The measurement and what each group's updates changed, bin by bin of steps; of a difference or an influence the
    sensitivity, and what stands at the steps. Of many groups those that move most are apart."""
    found = binned(result, query, bins, COLUMNS)
    edges, groups, name = found["edges"], found["groups"], str(result.trace.name)
    width = max(10, *(len(g) + 2 for g in groups))
    lines = ["steps".ljust(14) + name.rjust(13) + "".join(g.rjust(width) for g in groups)]
    for b, value in enumerate(found[name][1:]):
        label = f"{edges[b]} - {edges[b + 1] - 1}"
        lines.append(label.ljust(14) + f"{value:13.4f}" + "".join(f"{v[b]:+{width}.4f}" for v in groups.values()))
    lines.append("sum".ljust(27) + "".join(f"{sum(v):+{width}.4f}" for v in groups.values()))
    return "\n".join(lines)
