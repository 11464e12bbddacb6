"""The state of the random generators before the forward pass, so that dropout can be drawn again."""

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..autocast import Autocast, current
from ..errors import ChangedOutsideError
from ..functional import uncompiled
from ..generators import generators

log = logging.getLogger("attrib")


class RandomWatch:
    """Hooks on the model that note the generators' state; they hold nothing of the recorder, so a model may be copied. A
    compiled model is heard whether it is called itself or the one within; what is compiled holds no trace of the hooks.

    before, behind: the state around the last forward pass with gradients, None before the first: torch's generator, Python's
    and numpy's global ones. passes: how many there were since `clear`. forwards, firsts: of each batch that was announced
    how many followed, and the state before the first of them. autocasts: what they ran under, each once, the last one
    first. busy: while the recorder runs the model itself.
    """

    def __init__(self, model: nn.Module) -> None:
        self.before: Tensor | None = None
        self.behind: Tensor | None = None
        self.passes = 0
        self.forwards: list[int] = []
        self.firsts: list[Tensor | None] = []
        self.autocasts: tuple[Autocast | None, ...] = ()
        self.busy = False
        self._hooks = [
            handle
            for module in dict.fromkeys((model, uncompiled(model)))
            for handle in (module.register_forward_pre_hook(self._enter), module.register_forward_hook(self._leave))
        ]

    def _enter(self, module: nn.Module, args: Any) -> None:
        if not torch.compiler.is_compiling() and not self.busy and torch.is_grad_enabled():
            self.before, self.passes = generators(), self.passes + 1
            if self.forwards:
                self.forwards[-1] += 1
                self.firsts[-1] = self.before if self.firsts[-1] is None else self.firsts[-1]
            on = current(next((p.device.type for p in module.parameters()), "cpu"))
            self.autocasts = tuple(dict.fromkeys((on, *self.autocasts)))

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        heard = not torch.compiler.is_compiling() and not self.busy and torch.is_grad_enabled()
        if heard and self.before is not None:
            self.behind = generators()

    def __deepcopy__(self, memo: Any) -> "RandomWatch":
        copied = object.__new__(RandomWatch)
        copied.before, copied.behind, copied.passes, copied.busy, copied._hooks = None, None, 0, True, []
        copied.forwards, copied.firsts, copied.autocasts = [], [], ()
        return copied

    def announce(self) -> None:
        """What follows is of another batch."""
        self.forwards.append(0)
        self.firsts.append(None)

    def clear(self) -> None:
        """The step is over."""
        self.passes, self.forwards, self.firsts, self.autocasts = 0, [], [], ()

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()


@dataclass(frozen=True)
class Draws:
    """Whether the run's loss draws random numbers; beyond: from other generators than torch's."""

    stochastic: bool = False
    beyond: bool = False

    def settled(self, step: int, before: Tensor, after: Tensor) -> "Draws":
        """As the states around a pass say, at the first step; from then on it must not change.

        Raises:
            ChangedOutsideError: the loss draws numbers now, and did not then.
        """
        torchs = len(torch.get_rng_state())
        drew, beyond = not torch.equal(before, after), not torch.equal(before[torchs:], after[torchs:])
        if step == 0:
            if drew:
                log.info("the loss draws random numbers: the generators' state is recorded with every step")
            return Draws(drew, beyond)
        if (drew and not self.stochastic) or (beyond and not self.beyond):
            raise ChangedOutsideError(
                f"the loss draws random numbers now: expected none, as at the first step, at step {step}. Keep dropout "
                f"rates and modes as they were, or record a new run. The step was refused."
            )
        return self

    def stored(self, before: Tensor | None) -> Tensor | None:
        """What is kept of the generators' state with a step: nothing where the loss draws no numbers."""
        if not self.stochastic or before is None:
            return None
        return before if self.beyond else before[: len(torch.get_rng_state())]
