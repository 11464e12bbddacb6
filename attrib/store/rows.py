"""What is stored of a step by itself."""

from functools import cached_property

import numpy as np

from .reader import Reader

ROWS_BYTES = 64 << 20  # of shares of steps that are read together: all of a block, unless a longer one was asked for


class Rows:
    """Arrays with a row a step. Those of a block stand in the same chunks, each of which is decoded whole: they are read
    together, as many as fit ROWS_BYTES, and kept until others are asked for."""

    def __init__(self, reader: Reader) -> None:
        self._reader, self._block = reader, int(reader.header["block"])
        self._last: dict[str, tuple[int, np.ndarray]] = {}  # by name: the first step that was read, and the rows

    @cached_property
    def _together(self) -> int:
        """Steps. Of what is read here the shares of the examples alone are large."""
        shares = [self._reader.array(n) for n in self._reader.names() if n.startswith(("gradients", "factors/"))]
        size = sum(array.nbytes // array.shape[0] for array in shares)
        return max(1, min(self._block, ROWS_BYTES // max(1, size)))

    def at(self, name: str, step: int) -> np.ndarray:
        """The row of a step, the caller's to change."""
        if self._together == 1:
            return self._reader.read(name, step)
        block = step - step % self._block
        first = step - (step - block) % self._together
        if name not in self._last or self._last[name][0] != first:
            stop = min(first + self._together, block + self._block, self._reader.steps)
            self._last[name] = first, self._reader.read(name, slice(first, stop))
        return self._last[name][1][step - first].copy()
