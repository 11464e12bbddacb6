"""A convolution as a linear layer on patches of its input, in one, two or three dimensions.

    patches   (m, C, *space) -> (m, positions, C k)     under every output position the inputs that it saw
    convolve  (m, C, *space), weight (O, C / groups, *kernel) -> (m, O, *positions)

Source: Rochette et al. 2019 (arXiv 1912.06015) for gradients of single examples through grouped convolutions.
"""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor


class Geometry(NamedTuple):
    """Of the kernel's axes; padding: numbers per axis, before and after it."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int


def geometry(kernel: tuple[int, ...], stride: object, padding: object, dilation: object, groups: int) -> Geometry:
    """From the arguments that torch's convolutions take: numbers, tuples, "same" or "valid"."""
    steps, spread = _per_axis(stride, kernel), _per_axis(dilation, kernel)
    if padding == "same":  # the odd one after
        whole = [d * (k - 1) for d, k in zip(spread, kernel, strict=True)]
        return Geometry(kernel, steps, tuple((w // 2, w - w // 2) for w in whole), spread, groups)
    sides = _per_axis(0 if padding == "valid" else padding, kernel)
    return Geometry(kernel, steps, tuple((p, p) for p in sides), spread, groups)


def _per_axis(value: object, kernel: tuple[int, ...]) -> tuple[int, ...]:
    numbers = tuple(value) if isinstance(value, tuple | list) else (value,)
    return numbers * (len(kernel) // len(numbers))


def convolve(x: Tensor, weight: Tensor, g: Geometry) -> Tensor:
    """Without bias."""
    if any(before != after for before, after in g.padding):
        x, g = _padded(x, g), g._replace(padding=((0, 0),) * len(g.kernel))
    function = (F.conv1d, F.conv2d, F.conv3d)[len(g.kernel) - 1]
    return function(x, weight, None, g.stride, tuple(before for before, _ in g.padding), g.dilation, g.groups)


def patches(x: Tensor, g: Geometry) -> Tensor:
    """(m, C, *space) -> (m, positions, C k)."""
    x = _padded(x, g).contiguous()
    axes = list(zip(x.shape[2:], x.stride()[2:], g.kernel, g.stride, g.dilation, strict=True))
    positions = [(n - d * (k - 1) - 1) // s + 1 for n, _, k, s, d in axes]
    over_positions, in_kernel = [step * s for _, step, _, s, _ in axes], [step * d for _, step, _, _, d in axes]
    strides = (x.stride(0), *over_positions, x.stride(1), *in_kernel)
    view = x.as_strided((len(x), *positions, x.shape[1], *g.kernel), strides)
    return view.flatten(1, len(positions)).flatten(2)


def _padded(x: Tensor, g: Geometry) -> Tensor:
    sides = [n for pair in reversed(g.padding) for n in pair]
    return F.pad(x, sides) if any(sides) else x
