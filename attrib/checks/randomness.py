"""The state of torch's generator before each forward pass, so that dropout can be drawn again."""

from typing import Any

import torch
from torch import Tensor, nn


class RandomWatch:
    """Hooks on the model that note the generator's state; they hold nothing of the recorder, so a model may be copied.

    before: the state before the last forward pass with gradients, None before the first. drew: whether it drew numbers.
    """

    def __init__(self, model: nn.Module) -> None:
        self.before: Tensor | None = None
        self.drew = False
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
        copied.before, copied.drew, copied.busy, copied._hooks = None, False, True, []
        return copied

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
