"""Which index of a site's output belongs to which example of the batch.

Read off, not assumed: the output is computed again with one example replaced, and what changes must be that example's. So
(B, T, d), (T, B, d) and (B T, d) are told apart, and a module that couples examples is found out.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Batchwise:
    """Dimension `dim` has size B k: example-major (B, k) or, with `minor`, (k, B)."""

    dim: int
    minor: bool = False

    def split(self, t: Tensor, batch: int) -> Tensor:
        """(..., B k, ...) -> (B, ..., k, ...), the other dimensions in their order."""
        if self.minor:
            return t.unflatten(self.dim, (-1, batch)).movedim(self.dim + 1, 0)
        return t.unflatten(self.dim, (batch, -1)).movedim(self.dim, 0)

    def weighed(self, t: Tensor, weights: Tensor) -> Tensor:
        """t (..., B k, ...), each row times the weight (B,) of its example."""
        count = t.shape[self.dim] // len(weights)
        each = weights.repeat(count) if self.minor else weights.repeat_interleave(count)
        return t * each.to(t.dtype).view(-1, *(1,) * (t.dim() - 1 - self.dim))


def candidates(shape: Iterable[int], batch: int) -> list[Batchwise]:
    """All readings of a shape, the usual ones first."""
    divisible = [(d, n) for d, n in enumerate(shape) if n % batch == 0 and n > 0]
    whole = [Batchwise(d) for d, n in divisible if n == batch]
    major = [Batchwise(d) for d, n in divisible if n > batch]
    minor = [Batchwise(d, minor=True) for d, n in divisible if n > batch]
    return whole + major + minor


def find(shape: Iterable[int], batch: int, changes: list[tuple[int, Tensor]]) -> Batchwise | None:
    """The one reading under which each change, (example i, output with i replaced minus output), vanishes off example i.

    None where no reading does, or where more than one does and they differ: then nothing may be assumed.
    """
    fitting = [
        reading for reading in candidates(shape, batch) if all(_only(reading.split(d, batch), i) for i, d in changes)
    ]
    return fitting[0] if len(fitting) == 1 else None


def _only(rows: Tensor, i: int) -> bool:
    return not (rows[:i].any() or rows[i + 1 :].any())
