"""Interventions while training goes on, each during a window of steps: `steps`, a slice of the run's, None for all."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..batch import Batch
from ..errors import ReplayError
from ..layout import match_names
from ..run import Run
from .base import Groups, IndexedInputs, Window, chosen

NONE_LEFT = "no example is left in a batch: got all dropped, expected some to remain, at step {step}, Drop."
_FLAGS = ("amsgrad", "foreach", "fused")  # of what state there is, and of who computes


@dataclass(frozen=True)
class Freeze(Window):
    """Parameters that the optimizer leaves alone: no update, no weight decay, accumulators as they are.

    Args:
        groups: names or patterns of the parameters, not all of them.
        steps: during which, a slice of the run's; None for all.

    Example:
        >>> frozen = attrib.intervention.Freeze("hidden.*", steps=slice(4, None))
        >>> again = attrib.replay(run, 0, frozen, model=model, loss=loss, store="again.zarr")
        >>> torch.equal(again.parameters(12)["hidden.weight"], again.parameters(4)["hidden.weight"])
        True
    """

    groups: Groups
    steps: slice | None = None

    def check(self, run: Run, start: int, until: int) -> None:
        super().check(run, start, until)
        if len(chosen(run, self.groups, "Freeze")) == len(run.groups):
            raise ReplayError(
                f"nothing would train: got all {len(run.groups)} tensors, expected some of them, at Freeze."
            )

    def captures(self) -> tuple[str, ...]:
        return ("replay",)  # stored shares are those of the backward pass, in which nothing was frozen

    def gradient(self, run: Run, step: int, model: nn.Module) -> None:
        if self.active(step):
            own = dict(model.named_parameters())
            for name in chosen(run, self.groups, "Freeze"):
                own[name].grad = None


@dataclass(frozen=True)
class Drop(Window):
    """Examples left out of their batches; a mean is over those that remain. Where the loss draws random numbers, those that
    remain draw others than before: `Reweight` with 0 keeps them.

    Args:
        examples: their ids; of every batch some must remain.
        steps: during which, a slice of the run's; None for all.

    Example:
        >>> without = attrib.intervention.Drop([3, 14])
        >>> again = attrib.replay(run, 0, without, model=model, loss=loss, store="again.zarr")
        >>> len(run.examples), len(again.examples)
        (24, 22)
    """

    examples: Collection[int | str]
    steps: slice | None = None

    def check(self, run: Run, start: int, until: int) -> None:
        super().check(run, start, until)
        _check_examples(run, self.examples, "Drop")
        first, stop = max(start, (self.steps or slice(None)).start or 0), min(until, run.steps)
        dropped = run.numbers[_among(run.examples, self.examples)]
        index = run.reader.read("index", slice(first, max(first, stop)))
        left = (index >= 0) & ~np.isin(index, dropped)
        for step in (first + np.flatnonzero(~left.any(1))).tolist():
            if self.active(step):
                raise ReplayError(NONE_LEFT.format(step=step))

    def batch(self, step: int, batch: IndexedInputs) -> IndexedInputs:
        index, inputs = batch
        if not self.active(step):
            return batch
        left = np.flatnonzero(~_among(index, self.examples))
        return index[left], Batch.of(inputs, len(index)).take(torch.from_numpy(left)).said


@dataclass(frozen=True)
class Reweight(Window):
    """The losses of some examples times a weight; a mean is over all of the batch as before.

    The weights become the last tensor of every batch of the replay, and the loss that it is recorded with is
    `weighted(loss)`: pass that one to `attrib.attribute`.

    Args:
        weights: example id -> weight, finite; 1 for all others.
        steps: during which, a slice of the run's; None for all.

    Example:
        >>> half = attrib.intervention.Reweight({3: 0.5})
        >>> again = attrib.replay(run, 0, half, model=model, loss=loss, store="again.zarr")
        >>> *inputs, weights = again.batch(0)
        >>> weights.shape
        torch.Size([8])
    """

    weights: Mapping[Any, float]
    steps: slice | None = None

    def check(self, run: Run, start: int, until: int) -> None:
        super().check(run, start, until)
        _check_examples(run, self.weights, "Reweight")
        if not all(np.isfinite(list(self.weights.values()))):
            raise ReplayError("a weight is not finite: expected numbers, at Reweight.")

    def loss(self, step: int, losses: Tensor, ids: np.ndarray) -> Tensor:
        if not self.active(step):
            return losses
        weights = [self.weights.get(i, 1.0) for i in ids.tolist()]
        return torch.tensor(weights, dtype=losses.dtype, device=losses.device) * losses


@dataclass(frozen=True)
class Options(Window):
    """Other options of the optimizer: {"lr": 0.1}, or {"lr": lambda step, recorded: recorded / 2}.

    Args:
        values: option -> its value, or a function of the step and the recorded value.
        steps: during which, a slice of the run's; None for all.
        groups: names or patterns of the parameters whose options they are.

    Example:
        >>> lower = attrib.intervention.Options({"lr": lambda step, recorded: recorded / 2}, slice(6, None))
        >>> again = attrib.replay(run, 0, lower, model=model, loss=loss, store="again.zarr")
        >>> again.options["lr"]  # the smallest and the largest
        [0.025, 0.05]
    """

    values: Mapping[str, Any]
    steps: slice | None = None
    groups: Groups = "*"

    def check(self, run: Run, start: int, until: int) -> None:
        super().check(run, start, until)
        names = chosen(run, self.groups, "Options")
        theirs = [
            [n.key for n in rule.numbers if n.key not in (*_FLAGS, *rule.counts)]
            for rule, name in zip(run.rules, run.groups, strict=True)
            if name in names
        ]
        known = [name for name in theirs[0] if all(name in others for others in theirs)]
        for name, value in self.values.items():
            if name not in known:
                raise ReplayError(
                    f"the optimizer has no such option to change: got {name!r}, expected one of {', '.join(known)}, at "
                    f"Options."
                )
            parts = value if isinstance(value, tuple | list) else (value,)
            if not callable(value) and not all(isinstance(part, Real) for part in parts):
                raise ReplayError(f"an option is no number: got {value!r}, expected such as 0.1, at {name!r}, Options.")
        if not self.values:
            raise ReplayError("no option is named: got none, expected such as {'lr': 0.1}, at Options.")

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
        steps: during which, a slice of the run's; None for all.

    Example:
        >>> sparse = attrib.intervention.Penalty(lambda model: model.output.weight.abs().sum(), weight=0.1)
        >>> again = attrib.replay(run, 0, sparse, model=model, loss=loss, store="again.zarr")
        >>> bool(again.parameters(12)["output.weight"].abs().sum() < run.parameters(12)["output.weight"].abs().sum())
        True
    """

    function: Callable[[nn.Module], Tensor]
    weight: float = 1.0
    steps: slice | None = None

    def penalty(self, step: int, model: nn.Module) -> Tensor | None:
        return self.weight * self.function(model) if self.active(step) else None


@dataclass(frozen=True)
class Suppress(Window):
    """Parameters pulled towards zero: `weight / 2 * |theta|^2` of them added to the reduced loss, as a `Penalty`.

    Args:
        groups: names or patterns of the parameters.
        weight: of the pull, above 0.
        steps: during which, a slice of the run's; None for all.

    Example:
        >>> weaker = attrib.intervention.Suppress("hidden.weight", 0.5)
        >>> again = attrib.replay(run, 0, weaker, model=model, loss=loss, store="again.zarr")
        >>> bool(again.parameters(12)["hidden.weight"].norm() < run.parameters(12)["hidden.weight"].norm())
        True
    """

    groups: Groups
    weight: float
    steps: slice | None = None

    def check(self, run: Run, start: int, until: int) -> None:
        super().check(run, start, until)
        chosen(run, self.groups, "Suppress")
        if not (isinstance(self.weight, Real) and np.isfinite(self.weight) and self.weight > 0):
            raise ReplayError(f"the weight is none: got {self.weight!r}, expected a number above 0, at Suppress.")

    def penalty(self, step: int, model: nn.Module) -> Tensor | None:
        if not self.active(step):
            return None
        own = dict(model.named_parameters())
        pulled = [own[name].square().sum() for name in match_names(list(own), self.groups, "Suppress")]
        return 0.5 * self.weight * torch.stack(pulled).sum()


def weighted(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The loss (B,) times the last tensor of the batch, (B,): what a replay whose losses are changed is recorded with.

    Example:
        >>> weighted_loss = attrib.intervention.weighted(loss)
        >>> torch.equal(weighted_loss(model, x, y, torch.full((24,), 0.5)), 0.5 * loss(model, x, y))
        True
    """

    def weighted_loss(model: nn.Module, *batch: Tensor) -> Tensor:
        *inputs, weights = batch
        return weights * loss(model, *inputs)

    return weighted_loss


def _ids(examples: Collection[Any]) -> list[int | str]:
    return [e if isinstance(e, str) else int(e) for e in examples]


def _among(ids: np.ndarray, examples: Collection[Any]) -> np.ndarray:
    """(B,): which of the ids are among the examples."""
    if ids.dtype == object:
        known = set(_ids(examples))
        return np.fromiter((name in known for name in ids), bool, len(ids))
    return np.isin(ids, np.fromiter(map(int, examples), np.int64))


def _check_examples(run: Run, examples: Collection[int | str], where: str) -> None:
    if isinstance(examples, str):
        raise ReplayError(f"examples are a string: got {examples!r}, expected a list of ids, at {where}.")
    known = set(run.examples.tolist())
    missing = [e for e in _ids(examples) if e not in known]
    if missing or not len(examples):
        raise ReplayError(
            f"there are no such train examples: got {missing[:5] or 'none at all'}, expected some of the {len(known)} ids "
            f"of the run, such as {run.examples.tolist()[0]!r}, at {where}."
        )
