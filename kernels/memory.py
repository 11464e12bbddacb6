"""Fresh memory for large arrays, and stacks that copy nothing.

numpy asks for huge pages from 4 MiB on, and torch does not: a copy to them takes a third of the time. (Where memory is short
they are waited for: vectors that come and go at every step are better off without.)
"""

from collections.abc import Sequence
from math import prod

import numpy as np
import torch
from torch import Tensor

LARGE = 4 << 20  # bytes


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """As `torch.empty`, on the CPU."""
    size = prod(shape) * dtype.itemsize
    if size < LARGE:
        return torch.empty(tuple(shape), dtype=dtype)
    return torch.from_numpy(np.empty(size, np.uint8)).view(dtype).view(tuple(shape))


def stacked(tensors: Sequence[Tensor]) -> Tensor:
    """As `torch.stack`; a single one is not copied."""
    return torch.stack(list(tensors)) if len(tensors) > 1 else tensors[0][None]
