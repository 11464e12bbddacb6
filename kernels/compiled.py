"""Loops that numba compiles. Whoever needs one imports it then: loading it takes half a second, cached or not."""

import numba
import numpy as np


@numba.njit(fastmath={"reassoc", "contract"}, cache=True)
def row_dots(first, second, out):  # pragma: no cover - compiled
    """out[b] = sum over m of first[b, m] second[b, m], accumulated in float64."""
    for b in range(first.shape[0]):
        total = 0.0
        for m in range(first.shape[1]):
            total += np.float64(first[b, m]) * np.float64(second[b, m])
        out[b] = total
