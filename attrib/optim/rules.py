"""Which optimizer moves each parameter tensor of a run, and by which rule; the numbers and accumulators of a step as arrays.

Of several optimizers over disjoint parameters each keeps its own rule. `hyper` is as wide as the longest rule's numbers and
whether the tensor takes part, the last column; shorter rows are filled with zeros.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor

from ..constants import is_low
from .rule import MOMENTUM, Rule
from .together import members


@dataclass(frozen=True)
class Moved:
    """One optimizer of a run. place: where its type is imported from, such as torch.optim.SGD."""

    place: str
    rule: Rule

    @property
    def name(self) -> str:
        return self.place.rpartition(".")[2]


@dataclass(frozen=True)
class Rules:
    """movers: the optimizers, in the order in which they step. owners: (K,), which of them moves each parameter tensor. low:
    the parameters' type where that is less than single precision, so that they round at every operation; else None."""

    movers: tuple[Moved, ...]
    owners: tuple[int, ...]
    low: torch.dtype | None = None

    @cached_property
    def _each(self) -> tuple[Rule, ...]:
        return tuple(self.movers[owner].rule for owner in self.owners)

    @overload
    def __getitem__(self, tensor: int) -> Rule: ...
    @overload
    def __getitem__(self, tensor: slice) -> tuple[Rule, ...]: ...
    def __getitem__(self, tensor: int | slice) -> Rule | tuple[Rule, ...]:
        return self._each[tensor]

    def __iter__(self) -> Iterator[Rule]:
        return iter(self._each)

    def __str__(self) -> str:
        return " + ".join(mover.name for mover in self.movers)

    @cached_property
    def state(self) -> tuple[str, ...]:
        """Names of the accumulators that are stored, vectors (P,); zeros where a tensor's rule has none."""
        return tuple(dict.fromkeys((MOMENTUM, *(name for mover in self.movers for name in mover.rule.state))))

    @cached_property
    def width(self) -> int:
        return 1 + max(len(mover.rule.hyper) for mover in self.movers)

    @property
    def unmodelled(self) -> bool:
        return self.low is not None or any(mover.rule.unmodelled for mover in self.movers)

    @property
    def rounds(self) -> bool:
        """Whether there are accumulators that are rounded at every step, beside what the rules make of them."""
        return self.low is not None and not self.read_off

    @property
    def read_off(self) -> bool:
        return any(mover.rule.read_off for mover in self.movers)

    def named(self, hyper: np.ndarray) -> list[dict[str, float]]:
        """(K, H + 1) -> the numbers of each tensor by name."""
        return [dict(zip(rule.hyper, row, strict=False)) for rule, row in zip(self, hyper.tolist(), strict=True)]

    def options(self, hyper: np.ndarray) -> dict[str, list[Any]]:
        """(T, K, H + 1) -> each option: its smallest and largest value over steps and tensors, with the optimizer's name
        before it where there are several."""
        found: dict[str, list[Any]] = {}
        for number, mover in enumerate(self.movers):
            rows = hyper[:, [tensor for tensor, owner in enumerate(self.owners) if owner == number]]
            rule, before = mover.rule.untyped(), f"{mover.name} " if len(self.movers) > 1 else ""
            low, high = (
                rule.options(dict(zip(mover.rule.hyper, values.tolist(), strict=False)))
                for values in (rows.min((0, 1)), rows.max((0, 1)))
            )
            for name in low:
                ends = [list(v) if isinstance(v, tuple) else v for v in (low[name], high[name])]
                if None not in ends:
                    found[before + name] = ends
        return found

    def described(self) -> dict[str, Any]:
        """For the header of a run, JSON."""
        return {
            "optimizer": str(self),
            "rule": " + ".join(mover.rule.name for mover in self.movers),
            "optimizers": [
                {"type": mover.place, "rule": mover.rule.name, "hyper": list(mover.rule.hyper)} for mover in self.movers
            ],
            "owners": list(self.owners),
        }


def read_hyper(rules: Rules, optimizer: torch.optim.Optimizer) -> np.ndarray:
    """(K, H + 1) float64: the rule's numbers for each parameter tensor before the step, and whether it takes part."""
    rows: list[tuple[float, ...]] = []
    state, filled = optimizer.state, rules.width - 1
    for group in optimizer.param_groups:
        values = rules[len(rows)].values(group) if group["params"] else ()
        for p in group["params"]:
            numbers = (*values, *rules[len(rows)].counted(group, state.get(p, {})))
            rows.append((*numbers, *(0.0,) * (filled - len(numbers)), p.grad is not None))
    return np.array(rows, np.float64)


def read_state(
    rules: Rules,
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[Tensor],
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """The accumulators of all parameters as new vectors (P,), as they begin where torch has made none yet. dtype: what they
    are computed with; None for their own type."""
    defaults = [member.defaults for member in members(optimizer)]
    states = [optimizer.state.get(p, {}) for p in parameters]
    if dtype is not None:
        states = [{key: v.to(dtype) if isinstance(v, Tensor) else v for key, v in s.items()} for s in states]
        parameters = [p.to(dtype) for p in parameters]
    found = {}
    for name in rules.state:
        parts = []
        for rule, owner, state, p in zip(rules, rules.owners, states, parameters, strict=True):
            begin = 0.0 if rule.begins is None or name == MOMENTUM else float(defaults[owner][rule.begins])
            parts.append(rule.accumulator(name, state, p.detach(), begin) if name in rule.state else _zeros(p))
        found[name] = torch.cat(parts)
    return found


def _zeros(p: Tensor) -> Tensor:
    return torch.zeros(p.numel(), dtype=p.dtype, device=p.device)


def assigned(optimizers: Sequence[torch.optim.Optimizer], movers: Sequence[Moved]) -> Rules:
    """Those of the optimizers, each of a rule."""
    held = [(n, p) for n, optimizer in enumerate(optimizers) for g in optimizer.param_groups for p in g["params"]]
    low = {p.dtype for _, p in held if is_low(p.dtype)}  # they share one type, see `names_of`
    return Rules(tuple(movers), tuple(n for n, _ in held), next(iter(low), None))
