"""Differences of floats along the first axis, as integers: lossless, and mostly small numbers.

Between two steps of training a parameter moves by a part in a thousand or less. Read as integers, the bits of the two floats
then differ by a small number d of either sign, and (d << 1) ^ (d >> 31), "zigzag", has zeros for its leading bits.
Wraps around, so every pattern of bits comes back, NaN and infinities included.
"""

from collections.abc import Callable

import numba
import numpy as np


def encode(values: np.ndarray) -> np.ndarray:
    """(T, ...) of a 4- or 8-byte type -> the same shape and type: the first row, then zigzag differences."""
    return _through({4: _encode_4, 8: _encode_8}, values)


def decode(values: np.ndarray) -> np.ndarray:
    """The inverse of `encode`, bit for bit."""
    return _through({4: _decode_4, 8: _decode_8}, values)


def _through(loops: dict[int, Callable[..., None]], values: np.ndarray) -> np.ndarray:
    rows = values.reshape(len(values), -1)
    integers = rows.view({4: np.int32, 8: np.int64}[rows.itemsize])
    out = np.empty(rows.shape, integers.dtype)
    loops[rows.itemsize](integers, out)
    return out.view(values.dtype).reshape(values.shape)


# one loop for each size: numba would do arithmetic on small integers in 64 bits, at a twentieth of the speed


@numba.njit(cache=True)
def _encode_4(rows, out):  # pragma: no cover - compiled
    out[0] = rows[0]
    for t in range(1, rows.shape[0]):
        for p in range(rows.shape[1]):
            d = np.int32(rows[t, p] - rows[t - 1, p])
            out[t, p] = (d << 1) ^ (d >> 31)


@numba.njit(cache=True)
def _decode_4(rows, out):  # pragma: no cover - compiled
    out[0] = rows[0]
    for t in range(1, rows.shape[0]):
        for p in range(rows.shape[1]):
            z = rows[t, p]
            out[t, p] = out[t - 1, p] + (((z >> 1) & 0x7FFFFFFF) ^ -(z & 1))


@numba.njit(cache=True)
def _encode_8(rows, out):  # pragma: no cover - compiled
    out[0] = rows[0]
    for t in range(1, rows.shape[0]):
        for p in range(rows.shape[1]):
            d = rows[t, p] - rows[t - 1, p]
            out[t, p] = (d << 1) ^ (d >> 63)


@numba.njit(cache=True)
def _decode_8(rows, out):  # pragma: no cover - compiled
    out[0] = rows[0]
    for t in range(1, rows.shape[0]):
        for p in range(rows.shape[1]):
            z = rows[t, p]
            out[t, p] = out[t - 1, p] + (((z >> 1) & 0x7FFFFFFFFFFFFFFF) ^ -(z & 1))
