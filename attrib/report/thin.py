"""What is drawn of data too large to draw: steps in bins, the groups that move most, the examples that count most.

Sums are kept: whatever is folded together stands there as one entry that says of how many it is made.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import xarray as xr


@dataclass(frozen=True)
class Bins:
    """T consecutive steps in bins of `width`, of which the last may be shorter."""

    steps: int
    width: int

    @property
    def edges(self) -> np.ndarray:
        """(B + 1,): bin b holds the entries edges[b] to edges[b + 1] - 1 of an axis (T,)."""
        return np.append(np.arange(0, self.steps, self.width), self.steps)

    @property
    def count(self) -> int:
        return -(-self.steps // self.width)

    def merged(self, most: int) -> "Bins":
        """At most so many bins, each of several of these."""
        return Bins(self.steps, self.width * -(-self.count // max(1, most)))

    def sum(self, values: np.ndarray, axis: int) -> np.ndarray:
        """(..., T, ...) -> (..., B, ...): summed over the steps of each bin."""
        return np.add.reduceat(values, self.edges[:-1], axis)


def bin_steps(steps: int, most: int) -> Bins:
    """At most so many bins."""
    return Bins(steps, 1).merged(most)


def fold_groups(values: xr.DataArray, most: int, size: np.ndarray | None = None) -> xr.DataArray:
    """(..., group) -> (..., at most `most` groups): the largest in their order, and what is left as "other N groups".

    size: (G,), what they are ranked by; by default the sum of their absolute values.
    """
    count = values.sizes["group"]
    if count <= most:
        return values
    values = values.transpose(..., "group")
    size = np.abs(values.values).reshape(-1, count).sum(0) if size is None else size
    largest = np.sort(np.argsort(-size, kind="stable")[: most - 1])
    rest = np.setdiff1d(np.arange(count), largest)
    other = values.isel(group=rest).sum("group").expand_dims(group=[f"other {len(rest)} groups"], axis=-1)
    return xr.concat([values.isel(group=largest), other], "group", coords="minimal", compat="override")


def by_tag(contributions: np.ndarray, tags: Sequence[str], most: int = 12) -> list[tuple[str, float]]:
    """Contributions (N,) summed over the examples with one tag, N of them: the largest sums first; beyond `most`, the
    others are one entry."""
    names, member = np.unique(np.asarray(tags, dtype=object).astype(str), return_inverse=True)
    sums = np.bincount(member, contributions, len(names))
    order = np.argsort(-np.abs(sums), kind="stable")
    kept = order if len(names) <= most else order[: most - 1]
    found = [(str(names[k]), float(sums[k])) for k in kept]
    rest = order[len(kept) :]
    return [*found, (f"other {len(rest)} tags", float(sums[rest].sum()))] if len(rest) else found
