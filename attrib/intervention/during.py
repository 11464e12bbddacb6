"""Interventions while training goes on, each during a window of steps: `steps`, a slice of the run's, None for all."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import ReplayError
from ..run import Run
from .base import Batch, Groups, Window, chosen


@dataclass(frozen=True)
class Freeze(Window):
    """Parameters that the optimizer leaves alone: no update, no weight decay, accumulators as they are."""

    groups: Groups
    steps: slice | None = None

    def check(self, run: Run, start: int, until: int) -> None:
        super().check(run, start, until)
        if len(chosen(run, self.groups, "Freeze")) == len(run.groups):
            raise ReplayError(
                f"nothing would train: got all {len(run.groups)} tensors, expected some of them, at Freeze."
            )

    def gradient(self, run: Run, step: int, model: nn.Module) -> None:
        if self.active(step):
            own = dict(model.named_parameters())
            for name in chosen(run, self.groups, "Freeze"):
                own[name].grad = None


@dataclass(frozen=True)
class Drop(Window):
    """Examples left out of their batches; a mean is over those that remain."""

    examples: Sequence[int]
    steps: slice | None = None

    def check(self, run: Run, start: int, until: int) -> None:
        super().check(run, start, until)
        _check_examples(run, self.examples, "Drop")

    def batch(self, step: int, batch: Batch) -> Batch:
        index, inputs = batch
        if not self.active(step):
            return batch
        left = np.flatnonzero(~np.isin(index, np.asarray(self.examples)))
        if not len(left):
            raise ReplayError(
                f"no example is left in a batch: got {len(index)} of {len(index)} dropped, expected fewer, at step {step}."
            )
        rows = torch.from_numpy(left)
        return index[left], tuple(t[rows.to(t.device)] for t in inputs)


@dataclass(frozen=True)
class Reweight(Window):
    """The losses of some examples times a weight; a mean is over all of the batch as before.

    The weights become the last tensor of every batch of the replay, and the loss that it is recorded with is
    `weighted(loss)`: pass that one to `attrib.attribute`.

    Args:
        weights: example id -> weight; 1 for all others.
    """

    weights: Mapping[int, float]
    steps: slice | None = None

    def check(self, run: Run, start: int, until: int) -> None:
        super().check(run, start, until)
        _check_examples(run, list(self.weights), "Reweight")
        if not all(np.isfinite(list(self.weights.values()))):
            raise ReplayError("a weight is not finite: expected numbers, at Reweight.")

    def apply(self, step: int, index: np.ndarray, weights: Tensor) -> Tensor:
        """The weights (B,) of a step's examples, times these."""
        if not self.active(step):
            return weights
        factors = [self.weights.get(int(i), 1.0) for i in index]
        return weights * torch.tensor(factors, dtype=weights.dtype, device=weights.device)


@dataclass(frozen=True)
class Options(Window):
    """Other options of the optimizer: {"lr": 0.1}, or {"lr": lambda step, recorded: recorded / 2}.

    Args:
        values: option -> its value, or a function of the step and the recorded value.
        groups: names or patterns of the parameters whose options they are.
    """

    values: Mapping[str, Any]
    steps: slice | None = None
    groups: Groups = "*"

    def check(self, run: Run, start: int, until: int) -> None:
        super().check(run, start, until)
        chosen(run, self.groups, "Options")
        known = list(run.rule.options(dict.fromkeys(run.rule.hyper, 0.0)))
        for name in self.values:
            if name not in known:
                raise ReplayError(
                    f"the optimizer has no such option: got {name!r}, expected one of {', '.join(known)}, at Options."
                )

    def options(self, run: Run, step: int, optimizer: torch.optim.Optimizer) -> None:
        if self.active(step):
            names = set(chosen(run, self.groups, "Options"))
            for name, group in zip(run.layout.names, optimizer.param_groups, strict=True):
                for key, value in self.values.items() if name in names else ():
                    group[key] = value(step, group[key]) if callable(value) else value


@dataclass(frozen=True)
class Penalty(Window):
    """`weight * function(model)` added to the reduced loss: no example's, it stands beside weight decay in the ledger.

    Args:
        function: model -> scalar; it must draw no random numbers.
        weight: its factor.
    """

    function: Callable[[nn.Module], Tensor]
    weight: float = 1.0
    steps: slice | None = None

    def penalty(self, step: int, model: nn.Module) -> Tensor | None:
        return self.weight * self.function(model) if self.active(step) else None


def weighted(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The loss (B,) times the last tensor of the batch, (B,): what a replay with `Reweight` is recorded with."""

    def weighted_loss(model: nn.Module, *batch: Tensor) -> Tensor:
        *inputs, weights = batch
        return weights * loss(model, *inputs)

    return weighted_loss


def _check_examples(run: Run, examples: Sequence[int], where: str) -> None:
    missing = sorted(set(map(int, examples)) - set(run.examples.tolist()))
    if missing or not len(examples):
        raise ReplayError(
            f"there are no such train examples: got {missing[:5] or 'none at all'}, expected some of the "
            f"{len(run.examples)} ids of the run, at {where}."
        )
