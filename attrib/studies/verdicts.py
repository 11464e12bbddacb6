"""Claims put as a yes or no for every run or trial, and numbers told with their range.

A claim holds where at least MOST say yes, fails where at most FEW do, and depends in between.
"""

from collections.abc import Sequence

import numpy as np

from ..report.article import Claim

MOST, FEW = 0.8, 0.2


def verdict(answers: Sequence[bool | None] | np.ndarray) -> str:
    """None is undecided: neither yes nor no."""
    given = list(answers)
    if not given:
        return "depends"
    if sum(a is not None and bool(a) for a in given) >= MOST * len(given):
        return "holds"
    if sum(a is not None and not a for a in given) >= (1 - FEW) * len(given):
        return "fails"
    return "depends"


def of(answers: Sequence[bool] | np.ndarray, what: str = "seeds") -> str:
    """How many say yes."""
    return f"{int(np.sum(answers))} of {len(answers)} {what}"


def claim(
    said: str, answers: Sequence[bool] | np.ndarray, numbers: str, what: str = "seeds", source: str = ""
) -> Claim:
    """A claim, its verdict by these answers, and how many say yes before its numbers."""
    return Claim(said, source or "this study", verdict(answers), f"{of(answers, what)}; {numbers}")


def span(values: Sequence[float] | np.ndarray, digits: int = 0, missing: float = np.inf) -> str:
    """Median and range. What is missing was not reached, and counts as `missing` in the median."""
    array = np.asarray(values, dtype=float)
    there = array[np.isfinite(array)]
    if not len(there):
        return "not reached" + (f" in any of {len(array)}" if len(array) > 1 else "")
    middle = np.median(np.where(np.isfinite(array), array, missing))
    said = f"{middle:.{digits}f}" if np.isfinite(middle) else "not reached"
    if len(array) == 1:
        return said
    low, high = (f"{end:.{digits}f}" for end in (there.min(), there.max()))
    if low == high == said and len(there) == len(array):
        return said
    lost = f", {len(array) - len(there)} of {len(array)} not reached" if len(there) < len(array) else ""
    return f"{said} ({low} to {high}{lost})"
