"""What an update rule is: its state, its hyper-parameters, and the coefficients that they freeze to."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..kernels.recurrence import Coefficients
from .numbers import TYPE, Numbers

Hyper = Mapping[str, float]
Options = Mapping[
    str, Any
]  # of a param group: numbers, or tensors with which torch computes in their type; and the age
State = dict[str, Tensor]


def realised(value: float | Tensor, dtype: torch.dtype) -> float:
    """A scalar as torch's kernels use it: rounded to the parameters' type.

    In float32, 1 - 0.01 is 0.99000001: over thousands of steps of weight decay the difference is no longer small.
    """
    return float(np.float32(float(value))) if dtype == torch.float32 else float(value)


@dataclass(frozen=True, kw_only=True)
class Rule:
    """An optimizer, as the linear recurrence that it is once its realised coefficients are frozen.

    name: stored with a run.
    momentum: key in torch's per-parameter state of the one accumulator that is linear in the gradients.
    moments: keys of the other accumulators (they make the preconditioner and are frozen), each with the number in whose
        absence torch keeps none; None: always kept.
    clock: key in torch's per-parameter state of the number of steps; None: all that counts is whether there is a momentum.
    numbers: the options of a param group that a step of one parameter tensor depends on.
    freeze: (options of the param group and "age", state before the step, gradient, theta), vectors (P,) ->
        (coefficients of the step, moments after it). Scalars are computed from the options as torch does it.
    """

    name: str
    momentum: str
    moments: Mapping[str, str | None]
    clock: str | None
    numbers: tuple[Numbers, ...]
    freeze: Callable[[Options, State, Tensor, Tensor], tuple[Coefficients, State]]

    @property
    def state(self) -> tuple[str, ...]:
        return (self.momentum, *self.moments)

    @property
    def hyper(self) -> tuple[str, ...]:
        """Names of the numbers of a step; "age" is the clock."""
        return (*(name for numbers in self.numbers for name in numbers.names), "age")

    def read(self, group: Mapping[str, Any], state: Mapping[str, Any]) -> tuple[float, ...]:
        """Param group, torch's state of one parameter -> values of `hyper` before the step."""
        return (*self.values(group), self.age(state))

    def values(self, group: Mapping[str, Any]) -> tuple[float, ...]:
        """Those of a param group, which all of its parameters share."""
        return tuple(value for numbers in self.numbers for value in numbers.of(group))

    def age(self, state: Mapping[str, Any]) -> float:
        """That of one parameter, from torch's state of it."""
        return float(state.get(self.momentum) is not None if self.clock is None else state.get(self.clock, 0.0))

    def options(self, hyper: Hyper) -> dict[str, Any]:
        """The options of the param group that `hyper` was read from."""
        return {numbers.key: numbers.option(hyper) for numbers in self.numbers}

    def untyped(self) -> "Rule":
        """The rule whose options are numbers, whatever they were."""
        plain = (replace(n, names=tuple(name for name in n.names if not name.endswith(TYPE))) for n in self.numbers)
        return replace(self, numbers=tuple(plain))

    def resume(self, hyper: Hyper, accumulators: State) -> State:
        """Torch's state of one parameter before the step that `hyper` was read from; {} where it has none."""
        if not hyper["age"]:
            return {}
        clock = {self.clock: torch.tensor(hyper["age"], dtype=torch.get_default_dtype())} if self.clock else {}
        absent = {key for key, needed in self.moments.items() if needed is not None and not hyper[needed]}
        return clock | {key: value for key, value in accumulators.items() if key not in absent}


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
