"""Options with which torch computes a step as no rule can replay it: refused before it is made.

Scalars that torch computes on another device than the CPU, or numpy for it, are rounded in ways of their own. In float32
that is below the step identity; in float64 it is not.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import UnsupportedOptimizerError
from .numbers import TYPES

Refusal = tuple[str, str]  # what was expected, and what to do


def check_group_options(optimizer: torch.optim.Optimizer, when: str = "") -> None:
    """Raise UnsupportedOptimizerError at an option that cannot be replayed. when: such as ", step 3"."""
    for number, group in enumerate(optimizer.param_groups):
        for name, value in _options(group):
            if not isinstance(value, Tensor | np.floating) and name != "capturable":
                continue
            refusal = _refusal(group, name, value)
            if refusal is not None:
                expected, advice = refusal
                raise UnsupportedOptimizerError(
                    f"an option of the optimizer cannot be replayed: got {_described(value)}, expected {expected}, at "
                    f"{name!r} of param group {number}{when}. {advice}"
                )
        if getattr(optimizer, "decoupled_wd", False) and getattr(
            optimizer, "_init_lr", None
        ):  # Lion's, not in its groups
            raise UnsupportedOptimizerError(
                f"an option of the optimizer is not in its groups: got decoupled_weight_decay=True, expected False, of "
                f"{type(optimizer).__name__}{when}. Pass weight_decay=weight_decay / lr, which is the same."
            )


def _options(group: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in group.items():
        for part in value if isinstance(value, tuple | list) and name != "params" else (value,):
            if name != "params":
                yield name, part


def _refusal(group: Mapping[str, Any], name: str, value: Any) -> Refusal | None:
    double = any(p.dtype == torch.float64 for p in group["params"][:1]) and not group.get(
        "fused"
    )  # all are of one type
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.dtype not in TYPES:
            return "a number or a floating-point tensor of one element", "Pass a number."
        if "betas" in group and name in ("lr", "betas") and group.get("foreach") and not group.get("capturable"):
            return "a number beside foreach=True", "Pass a number, or foreach=None."
        if double and value.device.type != "cpu":
            return "a number or a tensor on the CPU, for float64 parameters", "Pass a number."
    if double and isinstance(value, np.floating) and not isinstance(value, float):
        return "a number of Python's, for float64 parameters", f"Pass float({name})."
    on_cpu = any(p.device.type == "cpu" for p in group["params"][:1])
    if name == "capturable" and value and on_cpu and "amsgrad" not in group:  # Adam's fused kernel takes it
        return (
            "False for parameters on the CPU, where torch has no capturable step of this optimizer",
            "Pass capturable=False.",
        )
    if double and name == "capturable" and value:
        return "False for float64 parameters", "Pass capturable=False."
    return None


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of {value.dtype} and shape {tuple(value.shape)} on {value.device}"
    return repr(value)
