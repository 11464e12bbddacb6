"""What training does not move, buffers and frozen parameters of any of torch's types: as arrays, and as digests.

A type that numpy lacks (bfloat16, the float8s) is held as integers of its width: the bits stay as they are. A digest is
xxh3_128 over type, shape and bytes, so that a large base can be recognised without a copy. Types of fewer bits than a pass
is made in also say how far it can be trusted.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
import xxhash
from torch import Tensor

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes


class Constant(NamedTuple):
    """What a run's header says of a buffer or frozen parameter. dtype: torch's name of it. digest: hexadecimal."""

    dtype: str
    shape: tuple[int, ...]
    digest: str


def is_type(name: Any) -> bool:
    """Whether it is torch's name of a type, such as "bfloat16"."""
    return isinstance(name, str) and isinstance(getattr(torch, name, None), torch.dtype)


def is_low(dtype: torch.dtype) -> bool:
    """Whether it is a floating-point type of less than single precision."""
    return dtype.is_floating_point and dtype.itemsize < 4


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type in which numbers of a type are added up and multiplied here: single precision for what is less."""
    return torch.float32 if is_low(dtype) else dtype


ROUNDINGS = 8  # that two passes over the same numbers may differ by, in a row, where a pass rounds to few bits


def rounding(dtype: torch.dtype) -> float:
    """By what part of themselves numbers may differ after a pass in a type of less than single precision: 2^-8 for each
    rounding to bfloat16. What is rounded is rounded either way, so sums of it differ as their 2-norm does."""
    return ROUNDINGS * torch.finfo(dtype).eps / 2


def precision(types: Iterable[torch.dtype], dtype: torch.dtype) -> torch.dtype:
    """What a pass in `dtype` rounds to where it goes through tensors of these types: the one of fewest bits; float8s are
    computed with in more."""
    known = {dtype, *types}
    low = set(filter(is_low, known))
    if low:
        return torch.float16 if low == {torch.float16} else torch.bfloat16
    return max((t for t in known if t.is_floating_point), key=lambda t: torch.finfo(t).eps)


def resolution(dtype: torch.dtype, precision: torch.dtype) -> float:
    """By what part of themselves neighbouring numbers of a type differ that come out of a pass which rounds to `precision`
    on its way; where that is less than single precision `rounding` says the rest."""
    return float(max(torch.finfo(dtype).eps, torch.finfo(wide(precision)).eps))


def to_array(t: Tensor) -> np.ndarray:
    """The values, bit for bit; of a tensor on the CPU a view where its memory allows.

    Raises:
        TypeError: it does not hold its values as plain numbers: sparse, quantized, on the device "meta", ...
    """
    if t.is_quantized:  # whose numbers are not its values
        raise TypeError(_described(t))
    try:
        held = t.detach().cpu().resolve_conj().resolve_neg().contiguous()
        try:
            return held.numpy()
        except TypeError:
            return held.view(_BITS[held.itemsize]).numpy()
    except (RuntimeError, TypeError, KeyError) as error:  # NotImplementedError is a RuntimeError
        raise TypeError(_described(t)) from error


def _described(t: Tensor) -> str:
    return f"{type(t).__name__} of {t.dtype}, {t.layout} on {t.device}"


def to_tensor(array: np.ndarray, dtype: str) -> Tensor:
    """The tensor that `to_array` was given. dtype: torch's name of its type, such as "bfloat16"."""
    t, wanted = torch.from_numpy(array), getattr(torch, dtype)
    return t if t.dtype == wanted else t.view(wanted)


def constant_of(t: Tensor) -> Constant:
    """Raises TypeError as `to_array` does."""
    dtype, shape, array = str(t.dtype).removeprefix("torch."), tuple(t.shape), to_array(t)
    digest = xxhash.xxh3_128(f"{dtype} {shape}".encode())
    digest.update(array.reshape(-1).view(np.uint8).data)
    return Constant(dtype, shape, digest.hexdigest())
