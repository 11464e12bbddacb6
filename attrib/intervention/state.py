"""Interventions on the state that a replay starts from: parameters, and what becomes of their optimizer state.

state="kept"    the accumulators stay
      "reset"   they begin anew, as at a first step
      "taken"   they come along: from the other run, or permuted with the parameters
"""

from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ReplayError
from ..generators import random_state
from ..run import Run
from .base import Groups, Intervention, chosen

STATES = ("kept", "reset", "taken")


@dataclass(frozen=True)
class Transplant(Intervention):
    """Parameters from a state of a run, the same or another. Buffers and frozen parameters stay.

    Args:
        groups: names or patterns of the parameters.
        run: where they come from; names, shapes and dtype must fit.
        step: the state of `run`, 0 .. T.
        state: what becomes of their optimizer state: "kept", "reset" or "taken".
        share: of the entries of each tensor, drawn at random; "reset" and "taken" then concern those entries alone, while
            the age that Adam corrects its bias by stays the tensor's own (or, where it has none, the donor's).
        seed: of that draw.

    Example:
        >>> early = attrib.intervention.Transplant("hidden.*", run, 12)
        >>> again = attrib.replay(run, 4, early, model=model, loss=loss, store="again.zarr")
        >>> torch.equal(again.parameters(0)["hidden.weight"], run.parameters(12)["hidden.weight"])
        True
    """

    groups: Groups
    run: Run
    step: int
    state: str = "reset"
    share: float = 1.0
    seed: int = 0

    def check(self, run: Run, start: int, until: int) -> None:
        _check_state(self, STATES)
        own, other = (dict(zip(r.layout.names, r.layout.shapes, strict=True)) for r in (run, self.run))
        for name in chosen(run, self.groups, "Transplant"):
            if other.get(name) != own[name]:
                raise ReplayError(
                    f"the parameters do not fit: got {other.get(name, 'none of that name')}, expected {own[name]}, at "
                    f"{name!r} of {self.run.reader.target}. Transplant groups that both runs have in the same shape."
                )
        if not 0 <= self.step <= self.run.steps:
            raise ReplayError(
                f"there is no such state to transplant from: got step {self.step}, expected 0 to {self.run.steps}, at "
                f"{self.run.reader.target}."
            )
        if self.run.dtype != run.dtype:
            raise ReplayError(f"the runs differ in type: got {self.run.dtype}, expected {run.dtype}, at Transplant.")
        if self.state == "taken":
            self._check_accumulators(run)
        if not 0 < self.share <= 1:
            raise ReplayError(f"the share is none: got {self.share}, expected 0 < share <= 1, at Transplant.")

    def _check_accumulators(self, run: Run) -> None:
        """That those of the donor's optimizers are such as the run's have, and of the same kind."""
        rules = [dict(zip(r.groups, r.rules, strict=True)) for r in (self.run, run)]
        if any(rules[0][name].name != rules[1][name].name for name in chosen(run, self.groups, "Transplant")):
            raise ReplayError(
                f"the optimizer state cannot be taken along: got a run of {self.run.header['optimizer']}, expected one of "
                f'{run.header["optimizer"]}, at Transplant. Choose state="reset" or "kept".'
            )
        for option in ("amsgrad", "centered"):
            flags = [{n: v for n, v in r.options.items() if n.split()[-1] == option} for r in (self.run, run)]
            if flags[0] != flags[1]:
                got, expected = (next(iter(f.values()), None) for f in flags)
                raise ReplayError(
                    f"the optimizer state cannot be taken along: got {option} {got}, expected {expected}, at Transplant. "
                    f'Choose state="reset" or "kept".'
                )

    def begin(self, run: Run, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        values = self.run.parameters(self.step)
        donor = self.run.optimizer(values, self.step) if self.state == "taken" else None
        generator = torch.Generator().manual_seed(self.seed)
        for name, p in _tensors(run, model, self.groups):
            mask = torch.ones(p.shape, dtype=torch.bool)
            if self.share < 1:
                count = round(self.share * p.numel())
                mask = (torch.randperm(p.numel(), generator=generator) < count).view(p.shape)
            mask = mask.to(p.device)
            with torch.no_grad():
                p.copy_(torch.where(mask, values[name].to(p.device), p))
            if self.state != "kept":
                _replace(optimizer, p, {} if donor is None else donor.state.get(values[name], {}), mask)


@dataclass(frozen=True)
class Redraw(Intervention):
    """Parameters drawn anew.

    Args:
        groups: names or patterns of the parameters.
        init: fills a tensor in place, such as `lambda t: torch.nn.init.normal_(t, std=0.1)`; None: as the modules that own
            them draw their own, with `reset_parameters`.
        seed: of torch's generator while drawing; it is put back.
        state: what becomes of their optimizer state, "kept" or "reset".

    Example:
        >>> anew = attrib.intervention.Redraw("output.*", seed=1)
        >>> again = attrib.replay(run, 6, anew, model=model, loss=loss, store="again.zarr")
        >>> before, after = run.parameters(6), again.parameters(0)  # of the replay, step 0 is the state 6
        >>> [name for name in run.groups if not torch.equal(before[name], after[name])]
        ['output.weight', 'output.bias']
    """

    groups: Groups
    init: Callable[[Tensor], Any] | None = None
    seed: int = 0
    state: str = "reset"

    def check(self, run: Run, start: int, until: int) -> None:
        _check_state(self, STATES[:2])
        chosen(run, self.groups, "Redraw")

    def begin(self, run: Run, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        drawn = deepcopy(model).cpu()  # where the seed is that of torch's own generator
        with random_state(torch.Generator().manual_seed(self.seed).get_state()), torch.no_grad():
            if self.init is None:
                _reset(drawn, chosen(run, self.groups, "Redraw"))
            else:
                for _, q in _tensors(run, drawn, self.groups):
                    self.init(q)
        fresh = dict(drawn.named_parameters())
        for name, p in _tensors(run, model, self.groups):
            with torch.no_grad():
                p.copy_(fresh[name])
            if self.state == "reset":
                optimizer.state.pop(p, None)


@dataclass(frozen=True)
class Permute(Intervention):
    """Neurons in another order: one random permutation along an axis of each of the named tensors.

    With the tensors on both sides of a layer, {"hidden.weight": 0, "hidden.bias": 0, "output.weight": 1}, the function stays
    the same; with one side alone, what was learned together no longer fits.

    Args:
        axes: parameter name -> axis; all of one length.
        seed: of the permutation.
        state: what becomes of their optimizer state: "kept", "reset", or "taken": permuted along.

    Example:
        >>> neurons = {"hidden.weight": 0, "hidden.bias": 0, "output.weight": 1}
        >>> again = attrib.replay(
        ...     run, 6, attrib.intervention.Permute(neurons), model=model, loss=loss, store="again.zarr"
        ... )
        >>> as_before = attrib.evaluate(run, model, measurement, [6]), attrib.evaluate(again, model, measurement, [0])
        >>> np.allclose(*as_before)  # the same function
        True
    """

    axes: Mapping[str, int]
    seed: int = 0
    state: str = "taken"

    def check(self, run: Run, start: int, until: int) -> None:
        _check_state(self, STATES)
        chosen(run, list(self.axes), "Permute")
        shapes = dict(zip(run.layout.names, run.layout.shapes, strict=True))
        for name, axis in self.axes.items():
            if name not in shapes:
                raise ReplayError(f"that is no parameter: got {name!r}, expected a name, not a pattern, at Permute.")
            if not 0 <= axis < len(shapes[name]):
                last = len(shapes[name]) - 1
                raise ReplayError(f"there is no such axis: got {axis}, expected 0 to {last}, at {name!r}, Permute.")
        lengths = {name: shapes[name][axis] for name, axis in self.axes.items()}
        if len(set(lengths.values())) != 1:
            raise ReplayError(f"the axes differ in length: got {lengths}, expected one length, at Permute.")

    def begin(self, run: Run, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        own = dict(model.named_parameters())
        generator = torch.Generator().manual_seed(self.seed)
        name, axis = next(iter(self.axes.items()))
        order = torch.randperm(own[name].shape[axis], generator=generator)
        for name, axis in self.axes.items():
            p = own[name]
            at = order.to(p.device)
            with torch.no_grad():
                p.copy_(p.index_select(axis, at))
            if self.state == "reset":
                optimizer.state.pop(p, None)
            elif self.state == "taken":
                for key, value in optimizer.state.get(p, {}).items():
                    if value is not None and value.shape == p.shape:
                        optimizer.state[p][key] = value.index_select(axis, at)


def _tensors(run: Run, model: nn.Module, groups: Groups) -> Iterator[tuple[str, Tensor]]:
    own = dict(model.named_parameters())
    return ((name, own[name]) for name in chosen(run, groups, "groups"))


def _check_state(change: Any, known: tuple[str, ...]) -> None:
    if change.state not in known:
        raise ReplayError(
            f"the optimizer state cannot be that: got {change.state!r}, expected one of {', '.join(known)}, at "
            f"{type(change).__name__}."
        )


def _replace(optimizer: torch.optim.Optimizer, p: Tensor, new: Mapping[str, Any], mask: Tensor) -> None:
    """The accumulators of the entries in `mask` become the new ones, or zeros where there are none."""
    if bool(mask.all()):
        optimizer.state.pop(p, None)
        if new:
            optimizer.state[p] = {k: v.clone() if isinstance(v, Tensor) else v for k, v in new.items()}
        return
    old = optimizer.state.get(p, {})
    for key in set(old) | set(new):
        value, other = old.get(key), new.get(key)
        if any(isinstance(v, Tensor) and v.shape == p.shape for v in (value, other)):
            value, other = (torch.zeros_like(p) if v is None else v for v in (value, other))
            optimizer.state[p][key] = torch.where(mask, other, value)
        elif value is None:
            optimizer.state[p][key] = other.clone() if isinstance(other, Tensor) else other


def _reset(model: nn.Module, names: list[str]) -> None:
    """Every module that owns one of the parameters draws its own anew."""
    for name in names:
        path, _, _ = name.rpartition(".")
        owner: Any = model.get_submodule(path)
        if not callable(getattr(owner, "reset_parameters", None)):
            raise ReplayError(
                f"a module does not say how it is drawn: got {type(owner).__name__} without reset_parameters, at {name!r}. "
                f"Pass init=, such as lambda t: torch.nn.init.normal_(t, std=0.1)."
            )
        owner.reset_parameters()
