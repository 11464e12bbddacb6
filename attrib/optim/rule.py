"""What an update rule is: its state, its hyper-parameters, and the coefficients that they freeze to."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..kernels.recurrence import Coefficients

Hyper = Mapping[str, float]
State = dict[str, Tensor]


def realised(value: float, dtype: torch.dtype) -> float:
    """A scalar as torch's kernels use it: rounded to the parameters' type.

    In float32, 1 - 0.01 is 0.99000001: over thousands of steps of weight decay the difference is no longer small.
    """
    return float(np.float32(value)) if dtype == torch.float32 else value


def read_kernels(group: Mapping[str, Any]) -> tuple[float, float]:
    """Which of torch's implementations a group asks for, `foreach` and `fused`: -1 where it leaves that to torch."""
    foreach, fused = (-1.0 if group.get(key) is None else float(group[key]) for key in ("foreach", "fused"))
    return foreach, fused


def kernels(h: Hyper) -> dict[str, bool | None]:
    """The inverse of `read_kernels`."""
    return {key: None if h[key] < 0 else bool(h[key]) for key in ("foreach", "fused")}


@dataclass(frozen=True)
class Rule:
    """An optimizer, as the linear recurrence that it is once its realised coefficients are frozen.

    name: stored with a run.
    momentum: key in torch's per-parameter state of the one accumulator that is linear in the gradients.
    moments: keys of the other accumulators (they make the preconditioner and are frozen).
    hyper: names of the numbers that a step of one parameter tensor depends on.
    read: (param group, torch state of one parameter) -> values of `hyper` before the step.
    freeze: (hyper, state before the step, gradient, theta), vectors (P,) ->
        (coefficients of the step, moments after it).
    options: values of `hyper` -> the options of the param group that they were read from.
    resume: (values of `hyper`, accumulators of one parameter) -> torch's state of it before the step; {} where it has none.
    """

    name: str
    momentum: str
    moments: tuple[str, ...]
    hyper: tuple[str, ...]
    read: Callable[[Mapping[str, Any], Mapping[str, Any]], tuple[float, ...]]
    freeze: Callable[[Hyper, State, Tensor, Tensor], tuple[Coefficients, State]]
    options: Callable[[Hyper], dict[str, Any]]
    resume: Callable[[Hyper, State], dict[str, Tensor]]

    @property
    def state(self) -> tuple[str, ...]:
        return (self.momentum, *self.moments)


def describe_options(options: dict[str, list[Any]]) -> str:
    """ ", lr 0.01, weight_decay 0 to 0.5": each option of an optimizer, and where it moved the range; flags only if set."""
    parts = []
    for name, (low, high) in options.items():
        if low != high:
            parts.append(f"{name} {_short(low)} to {_short(high)}")
        elif low is not False:
            parts.append(name if low is True else f"{name} {_short(low)}")
    return "".join(f", {part}" for part in parts)


def _short(value: Any) -> str:
    return " ".join(map(_short, value)) if isinstance(value, list) else f"{value:.4g}"
