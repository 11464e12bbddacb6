"""The state of the random generators before the forward pass, so that dropout can be drawn again."""

import logging
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..autocast import DEVICES, Autocast, current
from ..errors import ChangedOutsideError
from ..functional import wrappers
from ..generators import drew_beyond_torch, generators

log = logging.getLogger("attrib")


KEPT = 16  # forward passes before any batch was announced that are remembered


class ForwardPass:
    """One that was heard. batch: the number of the batch that was announced before it, -1 for none; before: the generators'
    state; reached: whether a backward pass went through what it returned, None where that cannot be heard."""

    def __init__(self, batch: int, before: Tensor) -> None:
        self.batch, self.before = batch, before
        self.reached: bool | None = None

    def listen(self, output: Any) -> None:
        for t in (output,) if isinstance(output, Tensor) else tree_leaves(output):
            if isinstance(t, Tensor) and t.requires_grad:
                with suppress(RuntimeError):  # of a tensor that takes no hooks
                    t.register_hook(self._reach)
                    self.reached = False

    def _reach(self, gradient: Tensor) -> None:
        self.reached = True


class RandomWatch:
    """Hooks on the model that note the generators' state; they hold nothing of the recorder, so a model may be copied. A
    compiled model is heard whether it is called itself or the one within; what is compiled holds no trace of the hooks.

    before, behind: the state around the last forward pass with gradients, None before the first: torch's generator, Python's
    and numpy's global ones. calls: the passes since `clear`. announced: batches since then. autocasts: what the passes ran
    under, each once, the last one first. busy: while the recorder runs the model itself.
    """

    def __init__(self, model: nn.Module) -> None:
        self.before: Tensor | None = None
        self.behind: Tensor | None = None
        self.calls: list[ForwardPass] = []
        self.announced = 0
        self.autocasts: tuple[Autocast | None, ...] = ()
        self.busy = False
        self._hooks = [
            handle
            for module in wrappers(model)
            if not isinstance(module, nn.parallel.DistributedDataParallel)  # what it wraps is called in its place
            for handle in (module.register_forward_pre_hook(self._enter), module.register_forward_hook(self._leave))
        ]

    def _enter(self, module: nn.Module, args: Any) -> None:
        if not torch.compiler.is_compiling() and not self.busy and torch.is_grad_enabled():
            self.before = generators()
            if not self.announced:  # what nothing was announced for is asked for once at most
                self.calls = self.calls[-KEPT:]
            self.calls.append(ForwardPass(self.announced - 1, self.before))
            device = next((p.device.type for p in module.parameters()), "cpu") if any(map(current, DEVICES)) else "cpu"
            self.autocasts = tuple(dict.fromkeys((current(device), *self.autocasts)))

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        heard = not torch.compiler.is_compiling() and not self.busy and torch.is_grad_enabled()
        if heard and self.before is not None:
            self.behind = generators()
            if self.calls:
                self.calls[-1].listen(output)

    def __deepcopy__(self, memo: Any) -> "RandomWatch":
        copied = object.__new__(RandomWatch)
        copied.before, copied.behind, copied.busy, copied._hooks = None, None, True, []
        copied.calls, copied.announced, copied.autocasts = [], 0, ()
        return copied

    def announce(self) -> None:
        """What follows is of another batch. An autocast that it is announced under may be around what the model is not."""
        self.announced += 1
        on = [autocast for autocast in map(current, DEVICES) if autocast is not None]
        self.autocasts = tuple(dict.fromkeys((*self.autocasts, *on)))

    def forget_skipped(self) -> list[int]:
        """The batches of which no backward pass came, though one of another did, or of theirs might have: they are none."""
        reached = {call.batch for call in self.calls if call.reached}
        skipped = (
            sorted({c.batch for c in self.calls if c.reached is False and c.batch >= 0} - reached) if reached else []
        )
        self.calls = [call for call in self.calls if call.batch not in skipped]
        for call in self.calls:
            call.batch -= sum(batch < call.batch for batch in skipped)
        self.announced -= len(skipped)
        return skipped

    def of_batches(self) -> list[list[Tensor]]:
        """Of each announced batch the states before its passes: those that a backward pass went through, where that can be
        heard."""
        some = any(call.reached for call in self.calls)
        counted = [call for call in self.calls if call.reached is not False or not some]
        return [[call.before for call in counted if call.batch == n] for n in range(self.announced)]

    def clear(self, keep: int = 0) -> None:
        """The step is over. keep: batches, the last ones, that were announced for the next."""
        first = self.announced - keep
        self.calls = [call for call in self.calls if keep and call.batch >= first]
        for call in self.calls:
            call.batch -= first
        self.announced, self.autocasts = keep, self.autocasts if keep else ()

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
        drew = not torch.equal(before, after)
        beyond = drew and drew_beyond_torch(before, after)
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
