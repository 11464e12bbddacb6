"""Sensitivities times per-example gradients, summed within each parameter tensor.

    contract_rows   out[q, b, k] = sum over p in tensor k of U[q, p] g[b, p]      U (Q, P) float64, g (B, P) any float
    row_dots        out[b] = sum over m of a[b, m] c[b, m]                        output gradient times tangent

torch would first copy g to float64; here the rows are read as they are and accumulated in float64. One pass over g
for a few queries (numba); a matrix product per tensor, in slices of rows that fit the cache, for many.
"""

import itertools

import numba
import numpy as np

MANY = 8  # measured: from about eight queries on, BLAS on float64 slices beats the fused loop
SLICE_BYTES = 4 << 20


def contract_rows(sensitivity: np.ndarray, rows: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """(Q, P) float64, (B, P) float32/64, tensor bounds (K+1,) int -> (Q, B, K) float64."""
    sensitivity = np.ascontiguousarray(sensitivity, dtype=np.float64)
    out = np.zeros((sensitivity.shape[0], rows.shape[0], len(bounds) - 1))
    if sensitivity.shape[0] < MANY:
        _fused(sensitivity, np.ascontiguousarray(rows), np.asarray(bounds, dtype=np.int64), out)
        return out
    step = max(1, SLICE_BYTES // (8 * max(1, rows.shape[1])))
    for lo in range(0, len(rows), step):
        part = rows[lo : lo + step].astype(np.float64)
        for k, (a, b) in enumerate(itertools.pairwise(bounds)):
            out[:, lo : lo + step, k] = sensitivity[:, a:b] @ part[:, a:b].T
    return out


def row_dots(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Two arrays (B, M) of one float type -> (B,) float64: the inner product of each row, accumulated in float64.

    On one thread: it runs at the speed of memory, and a second pool of threads would disturb torch's.
    """
    out = np.empty(len(first))
    _row_dots(np.ascontiguousarray(first), np.ascontiguousarray(second), out)
    return out


@numba.njit(fastmath={"reassoc", "contract"}, cache=True)
def _row_dots(first, second, out):  # pragma: no cover - compiled
    for b in range(first.shape[0]):
        total = 0.0
        for m in range(first.shape[1]):
            total += np.float64(first[b, m]) * np.float64(second[b, m])
        out[b] = total


@numba.njit(parallel=True, fastmath={"reassoc", "contract"}, cache=True)
def _fused(sensitivity, rows, bounds, out):  # pragma: no cover - compiled
    for b in numba.prange(rows.shape[0]):
        for q in range(sensitivity.shape[0]):
            for k in range(bounds.shape[0] - 1):
                total = 0.0
                for p in range(bounds[k], bounds[k + 1]):
                    total += sensitivity[q, p] * np.float64(rows[b, p])
                out[q, b, k] = total
