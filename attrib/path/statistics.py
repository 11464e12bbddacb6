"""Norms by running statistics, written out: torch's own have no derivative by the statistics.

y = (x - mean) / sqrt(var + eps) * weight + bias
"""

from collections.abc import Callable
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

# norms of torch, and the argument that says whether they are by the statistics of the batch
OF_BATCH = {F.batch_norm: "training", F.instance_norm: "use_input_stats"}


class Statistics(TorchFunctionMode):
    """Within it batch norm and instance norm in eval mode are written out."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in OF_BATCH:
            given = signature(func).bind(*args, **(kwargs or {}))
            given.apply_defaults()
            if not given.arguments[OF_BATCH[func]]:
                names = ("input", "running_mean", "running_var", "weight", "bias", "eps")
                return _normed(*(given.arguments[name] for name in names))
        return func(*args, **(kwargs or {}))


def _normed(x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """x (B, C, ...), all others (C,)."""

    def over(t: Tensor) -> Tensor:
        return t.view(1, -1, *[1] * (x.dim() - 2))

    y = (x - over(mean)) * torch.rsqrt(over(var) + eps)
    y = y if weight is None else y * over(weight)
    return y if bias is None else y + over(bias)
