"""What must not change between two recorded steps: parameters, buffers and frozen parameters, train and eval modes."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..errors import ChangedOutsideError
from ..functional import constants_of
from ..layout import Layout


class Guard:
    """Remembers a model's constants and modes, and the parameters after each step.

    Buffers are compared when their version counter moved, and on request (`constants`).
    """

    def __init__(self, model: nn.Module, layout: Layout) -> None:
        self._layout = layout
        self._constants = constants_of(model, layout)
        self._values = {name: t.clone() for name, t in self._constants.items()}
        self._versions = {name: t._version for name, t in self._constants.items()}
        self._modules = dict(model.named_modules())
        self._modes: list[bool] | None = None
        self._after: Tensor | None = None
        self._state: list[tuple[Tensor, int]] | None = None

    @property
    def values(self) -> dict[str, Tensor]:
        """The constants, by name."""
        return self._values

    def training(self) -> list[str]:
        """Names of the modules in train mode."""
        return [name for name, module in self._modules.items() if module.training]

    def resumed(self, training: Sequence[str], after: Tensor, optimizer: torch.optim.Optimizer) -> None:
        """Steps were made before: with these modules in train mode, and to these parameters (P,)."""
        self._modes = [name in set(training) for name in self._modules]
        self.stepped(after, optimizer)

    def stepped(self, after: Tensor, optimizer: torch.optim.Optimizer) -> None:
        """The parameters (P,) that a step ended with, and the optimizer that made it."""
        self._after = after
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

    def check_parameters(self, parameters: Sequence[Tensor], step: int) -> None:
        """Raise ChangedOutsideError where the parameters are not those that the last step ended with."""
        if self._after is None:
            return
        for (name, part), p in zip(self._layout.slices(), parameters, strict=True):
            if not torch.equal(p.detach().reshape(-1), self._after[part]):
                raise ChangedOutsideError(
                    f"a parameter changed between two steps: expected only recorder.step to move it, at {name!r}, step "
                    f"{step}. Restore it (recorded runs have no other source of change), or record a new run."
                )

    def check(self, parameters: Sequence[Tensor], step: int) -> Tensor:
        """The parameters as a vector (P,). Raises ChangedOutsideError, naming what changed since the last step."""
        self.check_parameters(parameters, step)
        if any(t._version != self._versions[name] for name, t in self._constants.items()):
            self.constants(step)
            self._versions = {name: t._version for name, t in self._constants.items()}
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

    def constants(self, step: int) -> None:
        """Compare every buffer and frozen parameter with its first value."""
        for name, t in self._constants.items():
            if not torch.equal(t, self._values[name]):
                raise ChangedOutsideError(
                    f"a buffer or frozen parameter changed between steps: expected it constant, at {name!r}, step {step}. "
                    f"Put the module that owns it into eval mode, or train it with this optimizer."
                )
