"""Fresh memory for large arrays.

numpy asks for huge pages from 4 MiB on, and torch does not: to fill a new array of tens of MiB takes twice to three times as
long where every page of 4 KiB has to be had by itself. Measured on two vectors of 11M numbers in float64.
"""

from collections.abc import Sequence
from math import prod

import numpy as np
import torch
from torch import Tensor

LARGE = 4 << 20  # bytes


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """As `torch.empty`."""
    size = prod(shape) * dtype.itemsize
    if size < LARGE or torch.device(device).type != "cpu":
        return torch.empty(tuple(shape), dtype=dtype, device=device)
    return torch.from_numpy(np.empty(size, np.uint8)).view(dtype).view(tuple(shape))


def converted(t: Tensor, dtype: torch.dtype) -> Tensor:
    """`t.to(dtype)`, itself where it is of that type."""
    return t if t.dtype == dtype else empty(t.shape, dtype, t.device).copy_(t)


def stacked(tensors: Sequence[Tensor]) -> Tensor:
    """As `torch.stack`; a single one is not copied."""
    return torch.stack(list(tensors)) if len(tensors) > 1 else tensors[0][None]
