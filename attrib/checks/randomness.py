"""The state of torch's generator before each forward pass, so that dropout can be drawn again."""

import logging
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ChangedOutsideError

log = logging.getLogger("attrib")


class RandomWatch:
    """Hooks on the model that note the generator's state; they hold nothing of the recorder, so a model may be copied.

    before: the state before the last forward pass with gradients, None before the first. drew: whether it drew numbers.
    stochastic: whether the run's loss does, settled at the first step.
    """

    def __init__(self, model: nn.Module) -> None:
        self.before: Tensor | None = None
        self.drew = False
        self.stochastic = False
        self.busy = False  # while the recorder runs the model itself
        self._hooks = [model.register_forward_pre_hook(self._enter), model.register_forward_hook(self._leave)]

    def _enter(self, module: nn.Module, args: Any) -> None:
        if not self.busy and torch.is_grad_enabled():
            self.before = torch.get_rng_state()

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if not self.busy and torch.is_grad_enabled() and self.before is not None:
            self.drew = not torch.equal(self.before, torch.get_rng_state())

    def __deepcopy__(self, memo: Any) -> "RandomWatch":
        copied = object.__new__(RandomWatch)
        copied.before, copied.drew, copied.stochastic, copied.busy, copied._hooks = None, False, False, True, []
        return copied

    def settle(self, step: int, drew: bool) -> None:
        """Whether the generator's state is stored is settled at the first step, and must not change.

        Raises:
            ChangedOutsideError: the loss draws numbers now, and did not then.
        """
        if step == 0:
            self.stochastic = drew
            if drew:
                log.info("the loss draws random numbers: the generator's state is recorded with every step")
        elif drew and not self.stochastic:
            raise ChangedOutsideError(
                f"the loss draws random numbers now: expected none, as at the first step, at step {step}. Keep dropout "
                f"rates and modes as they were, or record a new run. The step was refused."
            )

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
