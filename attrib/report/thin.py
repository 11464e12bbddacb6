"""What is drawn of data too large to draw: steps in bins, the groups that move most, the examples that count most.

Sums are kept: whatever is folded together stands there as one entry that says of how many it is made.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import xarray as xr


@dataclass(frozen=True)
class Bins:
    """Consecutive steps in bins: bin b holds the entries edges[b] to edges[b + 1] - 1 of an axis (T,)."""

    edges: np.ndarray

    @property
    def count(self) -> int:
        return len(self.edges) - 1

    @property
    def widest(self) -> int:
        """Steps of the largest bin."""
        return int(np.diff(self.edges).max())

    def sum(self, values: np.ndarray, axis: int) -> np.ndarray:
        """(..., T, ...) -> (..., B, ...): summed over the steps of each bin."""
        return np.add.reduceat(values, self.edges[:-1], axis)


def bin_steps(steps: int, most: int) -> Bins:
    """At most so many bins of a length, or of two lengths that differ by one."""
    return Bins(np.linspace(0, steps, min(steps, most) + 1).round().astype(np.int64))


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


def by_tag(
    contributions: xr.DataArray, tag: Callable[[int], object] | None, most: int = 12
) -> tuple[Sequence[str], np.ndarray]:
    """Contributions (..., example) summed over the examples with one tag: names (K,), sums (..., K).

    The tags with the largest sums come first; beyond `most`, the others are one entry.
    """
    values = contributions.transpose(..., "example").values
    if tag is None:
        return ["examples"], values.sum(-1, keepdims=True)
    tags = [str(tag(int(e))) for e in contributions["example"].values]
    names, member = np.unique(tags, return_inverse=True)
    sums = np.stack([values[..., member == k].sum(-1) for k in range(len(names))], -1)
    size = np.abs(sums).reshape(-1, len(names)).max(0)
    order = np.argsort(-size, kind="stable")
    if len(names) <= most:
        return [str(n) for n in names[order]], sums[..., order]
    kept, rest = order[: most - 1], order[most - 1 :]
    labels = [*(str(n) for n in names[kept]), f"other {len(rest)} tags"]
    return labels, np.concatenate([sums[..., kept], sums[..., rest].sum(-1, keepdims=True)], -1)
