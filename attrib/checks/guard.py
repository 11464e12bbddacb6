"""What must not change between two recorded steps: parameters and who holds them, constants, train and eval modes."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..constants import Constant, constant_of
from ..errors import ChangedOutsideError
from ..functional import constants_of
from ..layout import Layout
from .moving import MovingBuffers

AT_ONCE = 1 << 18  # bytes up to which a copy of all parameters takes less time than a look at each


class Place(NamedTuple):
    """Where a module holds a tensor or another module. version: of a constant's counter, None of what else is held."""

    name: str
    holder: Mapping[str, Any]
    key: str
    held: Any
    version: int | None

    @property
    def uncounted(self) -> bool:
        """Whether it may be written to without its counter moving."""
        constant = self.version is not None and not isinstance(self.held, nn.Parameter)
        return constant and bool(self.held.is_floating_point())


def _equal(a: Tensor, b: Tensor) -> bool:
    """With NaN the same as NaN: what a step has spoilt nobody else has changed."""
    return torch.equal(a, b) or (a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True))


class Guard:
    """Remembers a model's parameters, the digests of its constants and its modes, and the parameters after each step.

    A constant is looked at where another tensor stands in its place, or its version counter moved; buffers of floating-point
    numbers at every step, since torch's batch norm writes to them past the counter. buffers: those that training changes,
    which are found at the first step.

    Raises:
        ValueError: a constant whose values cannot be had.
    """

    def __init__(self, model: nn.Module, layout: Layout) -> None:
        self._layout = layout
        self.constants = constants_of(model, layout)
        self.digests: dict[str, Constant] = {}
        for name, t in self.constants.items():
            try:
                self.digests[name] = constant_of(t)
            except TypeError as error:
                raise ValueError(
                    f"a buffer or frozen parameter cannot be stored: got {error}, expected a plain tensor, at {name!r}."
                ) from error
        self.buffers = MovingBuffers(model)
        self._modules = dict(model.named_modules())
        self._places = list(self._held(model))
        self._modes: list[bool] | None = None
        self._after: Tensor | None = None
        self._state: list[tuple[Tensor, int]] | None = None

    def training(self) -> list[str]:
        """Names of the modules in train mode."""
        return [name for name, module in self._modules.items() if module.training]

    def resumed(
        self, training: Sequence[str], after: Tensor, optimizer: torch.optim.Optimizer, buffers: Mapping[str, Tensor]
    ) -> None:
        """Steps were made before: with these modules in train mode, to these parameters (P,) and these buffers, which are
        put into the model."""
        self._modes = [name in set(training) for name in self._modules]
        self.buffers.put(buffers)
        self.stepped(after, optimizer)

    def stepped(self, after: Tensor, optimizer: torch.optim.Optimizer) -> None:
        """The parameters (P,) that a step ended with, and the optimizer that made it."""
        self._after = after
        self.buffers.stepped()
        states = optimizer.state.values()
        self._state = [(t, t._version) for state in states for t in state.values() if isinstance(t, Tensor)]

    def check_state(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Raise ChangedOutsideError where the optimizer's accumulators are not those that the last step left."""
        if self._state is None:
            return
        known = {id(t): version for t, version in self._state}
        found = [(key, t) for state in optimizer.state.values() for key, t in state.items() if isinstance(t, Tensor)]
        changed = [key for key, t in found if known.get(id(t)) != t._version]
        if len(found) == len(known) and not changed:
            return
        name = changed[0] if changed else "a tensor that is gone"
        raise ChangedOutsideError(
            f"the optimizer's state changed between steps: expected only recorder.step to change it, at {name!r}, step "
            f"{step}. Record a new run. The step was refused."
        )

    def check_optimizer(self, optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor], step: int) -> None:
        """Raise ChangedOutsideError where the optimizer no longer moves the very `parameters` of the run."""
        held = [(p, group) for group, g in enumerate(optimizer.param_groups) for p in g["params"]]
        if len(held) == len(parameters) and all(p is q for (p, _), q in zip(held, parameters, strict=True)):
            return
        known, kept = set(map(id, parameters)), {id(p) for p, _ in held}
        missing = [name for name, p in zip(self._layout.names, parameters, strict=True) if id(p) not in kept]
        added = [f"param group {group}" for p, group in held if id(p) not in known]
        parts = [f"{len(added)} more, first in {added[0]}"] if added else []
        parts += [f"none of {missing[0]!r}"] if missing else []
        raise ChangedOutsideError(
            f"the optimizer's parameters changed: got {' and '.join(parts) or 'another order'}, expected the "
            f"{len(parameters)} of attrib.record, at step {step}. Close this run, which keeps the steps before, and record "
            f"a new one with this optimizer; or give the optimizer all parameters first, and keep some still with "
            f"requires_grad_(False). The step was refused."
        )

    def check_parameters(self, parameters: Sequence[Tensor], step: int) -> None:
        """Raise ChangedOutsideError where the parameters are not those that the last step ended with."""
        if self._after is None or self._are_kept(parameters):
            return
        for (name, part), p in zip(self._layout.slices(), parameters, strict=True):
            kept = self._after[part]
            if (p.dtype, p.device) != (kept.dtype, kept.device) or not _equal(p.detach().reshape(-1), kept):
                raise ChangedOutsideError(
                    f"a parameter changed between two steps: expected only recorder.step to move it, at {name!r}, step "
                    f"{step}. Restore it (recorded runs have no other source of change), or record a new run."
                )

    def _are_kept(self, parameters: Sequence[Tensor]) -> bool:
        """Whether the parameters are what the last step ended with, at a glance: in one copy where that is quick."""
        after = self._after
        assert after is not None
        if any(p.dtype != after.dtype or p.device != after.device for p in parameters):
            return False
        if after.nbytes < AT_ONCE:
            return torch.equal(self._layout.flatten(parameters), after)
        parts = after.split([part.stop - part.start for _, part in self._layout.slices()])
        return all(torch.equal(p.detach().reshape(-1), part) for p, part in zip(parameters, parts, strict=True))

    def check(self, parameters: Sequence[Tensor], step: int) -> Tensor:
        """The parameters as a vector (P,). Raises ChangedOutsideError, naming what changed since the last step."""
        self.check_parameters(parameters, step)
        self._check_places(step)
        modes = [m.training for m in self._modules.values()]
        if self._modes is None:
            self._modes = modes
        elif modes != self._modes:
            name = next(n for n, a, b in zip(self._modules, modes, self._modes, strict=True) if a != b)
            raise ChangedOutsideError(
                f"a module changed between train and eval mode: expected the mode of the first step, at "
                f"{name or 'the model'!r}, step {step}. Call model.train() or .eval() before the step."
            )
        return self._layout.flatten(parameters) if self._after is None else self._after

    def _held(self, model: nn.Module) -> Iterator[Place]:
        """All that the modules of a model hold; what is held in two places has one name."""
        names = {id(t): name for name, t in [*model.named_parameters(), *model.named_buffers()]}
        for path, module in self._modules.items():
            for holder in (module._modules, module._parameters, module._buffers):
                for key, held in holder.items():
                    name = names.get(id(held), f"{path}.{key}".lstrip("."))
                    if held is not None:
                        yield Place(name, holder, key, held, held._version if name in self.digests else None)

    def _check_places(self, step: int) -> None:
        """Modules and parameters are those that were recorded, constants have their values; at the first step, buffers that
        have others are those that move."""
        moved: set[str] = set()
        self.buffers.check(step)
        for n, place in enumerate(self._places):
            held = place.holder.get(place.key)
            if place.name in self.buffers:
                continue
            if held is place.held and (place.version is None or held._version == place.version) and not place.uncounted:
                continue
            if place.version is None:
                raise ChangedOutsideError(
                    f"a part of the model was replaced: expected the {type(place.held).__name__} that it was recorded "
                    f"with, at {place.name!r}, step {step}. Put it back, or close this run and record a new one. The step "
                    f"was refused."
                )
            if not isinstance(held, Tensor) or constant_of(held) != self.digests[place.name]:
                if isinstance(place.held, nn.Parameter) and place.held.requires_grad:
                    raise ChangedOutsideError(
                        f"a parameter changed that the recorded optimizer does not move: got another value at "
                        f"{place.name!r}, step {step}. Where another optimizer trains it, record both as one run, "
                        f"attrib.record([one, other], ...); a part that stands still in a step has p.grad None. The step "
                        f"was refused."
                    )
                if self.buffers.names is None and isinstance(held, Tensor) and not isinstance(place.held, nn.Parameter):
                    moved.add(place.name)
                    continue
                raise ChangedOutsideError(_changed(place, step))
            self._places[n] = place._replace(held=held, version=held._version)
        if self.buffers.names is None:
            self.buffers.found(moved)
            self.buffers.check(step)


def _changed(place: Place, step: int) -> str:
    if isinstance(place.held, nn.Parameter):
        return (
            f"a buffer or frozen parameter changed between steps: expected it constant, at {place.name!r}, step {step}. "
            f"Train it with this optimizer, or make it a buffer of its module (register_buffer). The step was refused."
        )
    return (
        f"a buffer or frozen parameter changed between steps: expected a buffer to move from the first step on or never, at "
        f"{place.name!r}, step {step}. Put it back (the module that owns it into eval mode), or close this run, which keeps "
        f"the steps before, and record what follows as a new one. The step was refused."
    )
