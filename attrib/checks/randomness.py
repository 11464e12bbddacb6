"""The state of the random generators before each forward pass, so that dropout can be drawn again."""

import logging
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ChangedOutsideError
from ..generators import generators

log = logging.getLogger("attrib")


class RandomWatch:
    """Hooks on the model that note the generators' state; they hold nothing of the recorder, so a model may be copied.

    before: the state before the last forward pass with gradients, None before the first: torch's generator, Python's and
    numpy's global ones. passes: how many there were since `clear`. stochastic: whether the run's loss draws from any,
    settled at the first step; beyond: whether from others than torch's.
    """

    def __init__(self, model: nn.Module) -> None:
        self.before: Tensor | None = None
        self.passes = 0
        self.stochastic = self.beyond = False
        self.busy = False  # while the recorder runs the model itself
        self._drawn: Tensor | None = None  # where the state differs behind a pass
        self._hooks = [model.register_forward_pre_hook(self._enter), model.register_forward_hook(self._leave)]

    def _enter(self, module: nn.Module, args: Any) -> None:
        if not self.busy and torch.is_grad_enabled():
            self.before, self.passes = generators(), self.passes + 1

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if not self.busy and torch.is_grad_enabled() and self.before is not None:
            self._drawn = generators()

    def __deepcopy__(self, memo: Any) -> "RandomWatch":
        copied = object.__new__(RandomWatch)
        copied.before, copied.passes, copied.stochastic, copied.beyond, copied.busy = None, 0, False, False, True
        copied._drawn, copied._hooks = None, []
        return copied

    def clear(self) -> None:
        """The step is over."""
        self.passes = 0

    @property
    def stored(self) -> Tensor | None:
        """What is kept of `before` with the step: nothing where the loss draws no numbers."""
        if not self.stochastic or self.before is None:
            return None
        return self.before if self.beyond else self.before[: len(torch.get_rng_state())]

    def check(self, step: int) -> None:
        """Raise ChangedOutsideError where the user's own pass drew numbers that the first step did not."""
        if self.before is not None and self._drawn is not None:
            self.settle(step, self.before, self._drawn)

    def settle(self, step: int, before: Tensor, after: Tensor) -> None:
        """Which generators' states are stored is settled at the first step, and must not change.

        Raises:
            ChangedOutsideError: the loss draws numbers now, and did not then.
        """
        torchs = len(torch.get_rng_state())
        drew, beyond = not torch.equal(before, after), not torch.equal(before[torchs:], after[torchs:])
        if step == 0:
            self.stochastic, self.beyond = drew, beyond
            if drew:
                log.info("the loss draws random numbers: the generators' state is recorded with every step")
        elif (drew and not self.stochastic) or (beyond and not self.beyond):
            raise ChangedOutsideError(
                f"the loss draws random numbers now: expected none, as at the first step, at step {step}. Keep dropout "
                f"rates and modes as they were, or record a new run. The step was refused."
            )

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
