"""A table of 64-bit keys that grows: each key has a row, and a new one takes the next.

    rows(keys (B,), start)      known keys: the row they have; new ones: start, start + 1, ... in the order of the batch

Open addressing with linear probing (Knuth, The Art of Computer Programming 3, section 6.4): a key stands in the first free
slot from that of its low bits on. At most half of the slots are taken, and they double when they would be more, so a key
costs the same however many are known. That asks for keys whose low bits are spread evenly, as those of `hashing` are.

32 to 64 bytes a key. Measured with batches of 32 at 1.5 million keys: a quarter of the time of numba's typed.Dict and a
fifth of that of a dict, which takes three times the memory; pandas' factorizer copies all keys at every call.
"""

import numba
import numpy as np

SMALLEST = 1 << 10  # slots of an empty table, a power of two as all sizes are
FREE = -1  # the row of a slot that no key has taken


class KeyTable:
    """uint64 keys and their int64 rows, 0 or more."""

    def __init__(self) -> None:
        self._keys, self._rows = _empty(SMALLEST)
        self._count = 0

    def __len__(self) -> int:
        """How many keys are known."""
        return self._count

    def rows(self, keys: np.ndarray, start: int) -> tuple[np.ndarray, np.ndarray]:
        """(B,) uint64 -> (B,) int64, the row of each; and (n,) int64, where in the batch the n new keys stand first, whose
        rows are start .. start + n - 1."""
        self._grow(self._count + len(keys))
        rows, first = np.empty(len(keys), np.int64), np.empty(len(keys), np.int64)
        new = _place(self._keys, self._rows, keys, start, rows, first)
        self._count += new
        return rows, first[:new]

    def put(self, keys: np.ndarray, rows: np.ndarray) -> None:
        """Enter keys (n,) that are not there yet, each once, with their rows (n,)."""
        self._grow(self._count + len(keys))
        _move(keys, rows, self._keys, self._rows)
        self._count += len(keys)

    def _grow(self, count: int) -> None:
        """Make room for so many keys."""
        slots = len(self._keys)
        while slots < 2 * count:
            slots *= 2
        if slots > len(self._keys):
            larger = _empty(slots)
            _move(self._keys, self._rows, *larger)
            self._keys, self._rows = larger


def _empty(slots: int) -> tuple[np.ndarray, np.ndarray]:
    return np.zeros(slots, np.uint64), np.full(slots, FREE, np.int64)


@numba.njit(cache=True, nogil=True)
def _slot(table_keys, table_rows, key):  # pragma: no cover - compiled
    """Where a key stands, or the free slot that it would take."""
    last = np.uint64(len(table_keys) - 1)
    slot = key & last
    while table_rows[slot] != FREE and table_keys[slot] != key:
        slot = (slot + np.uint64(1)) & last
    return slot


@numba.njit(cache=True, nogil=True)
def _place(table_keys, table_rows, keys, start, rows, first):  # pragma: no cover - compiled
    """Look every key up, and enter those that are not there."""
    new = 0
    for b in range(len(keys)):
        slot = _slot(table_keys, table_rows, keys[b])
        if table_rows[slot] == FREE:
            table_keys[slot], table_rows[slot] = keys[b], start + new
            first[new] = b
            new += 1
        rows[b] = table_rows[slot]
    return new


@numba.njit(cache=True, nogil=True)
def _move(from_keys, from_rows, to_keys, to_rows):  # pragma: no cover - compiled
    """Enter keys with their rows into a table that has none of them; those of free slots are left out."""
    for n in range(len(from_keys)):
        if from_rows[n] != FREE:
            slot = _slot(to_keys, to_rows, from_keys[n])
            to_keys[slot], to_rows[slot] = from_keys[n], from_rows[n]
