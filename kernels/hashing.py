"""One 64-bit word per row of an array, to tell at a glance whether two rows hold the same bytes.

Every 8-byte word of a row is mixed with its position by the splitmix64 finaliser (Steele, Lea, Flood 2014) and
the mixed words are summed modulo 2^64: two different rows agree with a chance of about 2^-64.
"""

import numpy as np


def _mix(z: np.ndarray) -> np.ndarray:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def hash_rows(rows: np.ndarray) -> np.ndarray:
    """Any array (B, ...) -> (B,) uint64. The dtype does not enter, only the bytes."""
    flat = np.ascontiguousarray(rows).reshape(len(rows), -1)
    octets = flat.view(np.uint8).reshape(len(rows), -1)
    if missing := -octets.shape[1] % 8:
        octets = np.pad(octets, ((0, 0), (0, missing)))
    words = np.ascontiguousarray(octets).view(np.uint64)
    position = np.arange(1, words.shape[1] + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return _mix(_mix(words ^ position) + position).sum(axis=1, dtype=np.uint64)


def combine(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Order-dependent combination of two (B,) uint64 hashes."""
    return _mix(first * np.uint64(0x9E3779B97F4A7C15) + second)
