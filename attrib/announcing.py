"""An optimizer to which batches are announced before it steps: what a recorder is to the loop that calls it."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .announced import AnnouncedBatch, Announcements
from .capture import Listeners
from .errors import AttribError
from .wrapper import Wrapper


class Announcing(Wrapper):
    """Hears the passes of a loop and the batches that are announced; what a step is stands in `_step`."""

    _announced: Announcements
    _listeners: Listeners
    _parameters: Sequence[Tensor]
    _penalized: bool

    def _listen(self, listeners: Listeners, penalized: bool) -> None:
        """penalized: whether a backward pass may be that of a penalty."""
        self._announced, self._listeners, self._penalized = Announcements(), listeners, penalized

    @property
    def steps(self) -> int:
        """Steps so far."""
        raise NotImplementedError

    def _step(self, index: Any, batch: tuple[Any, ...]) -> None:
        raise NotImplementedError

    def __deepcopy__(self, memo: Any) -> "Announcing":
        raise AttribError("a recorder cannot be copied: it writes one run. Copy the model or the optimizer instead.")

    def zero_grad(self, set_to_none: bool = True) -> None:
        heard = self._listeners
        # where no gradient came, what was announced is of passes that are still to come
        left = self._announced.clear(since=heard.backwards) if heard.pulled else len(self._announced)
        heard.zeroed(left)
        super().zero_grad(set_to_none)

    def batch(self, index: Any, *batch: Any) -> None:
        """Announce a batch, before its forward pass: any number of them a step, then `step()`.

        Args:
            index: (B,) ids of the training examples: integers of 0 or more, or strings without NUL; one kind throughout
                a run.
            batch: what `loss` takes after the model: tensors with B rows each, what all examples share (`attrib.shared`),
                numbers, texts and None, in dicts, lists and tuples.

        Raises:
            BatchError: it cannot be stored, or a backward pass came before it.
        """
        heard = self._listeners
        if heard.pulled and (not heard.finite or all(p.grad is None or not p.grad.any() for p in self._parameters)):
            self._forget()  # of a step that was never made
        missed = heard.pulled and not self._penalized
        with torch.inference_mode(False):
            self._announced.announce(index, batch, heard.backwards, missed, self.steps)
        heard.announce()

    def step(self, index: Any = None, *batch: Any, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Check, step the wrapped optimizer, check again, append.

        Args:
            index, batch: as `batch` takes them, where the step is made of one batch that was not announced.
            closure: called first, with gradients on; it announces batches and runs the backward pass. May stand in the place
                of the index. One that makes no gradient makes no step.

        Returns:
            What the closure returned.

        Raises:
            BatchError, LossError, BatchIdentityError, SplitIdentityError, ChangedOutsideError: the step was refused;
                parameters, optimizer and store are as they were. UnsupportedOptimizerError: likewise, an option cannot be
                replayed.
            StoreError, StoreExistsError: the store cannot be made, or was not written; they are as they were, too.
            StepIdentityError: the optimizer did something else than its rule; recording ends before this step.
            What the optimizer's own step raises: the step is not recorded.
        """
        if callable(index) and not batch and not isinstance(index, Tensor):
            index, closure = None, index
        with torch.inference_mode(False), torch.enable_grad():  # however it is called
            returned = None if closure is None else closure()
            if closure is not None and not self._listeners.pulled and all(p.grad is None for p in self._parameters):
                self._forget()  # the closure skipped its batches, and without a gradient torch's optimizers stand still
            else:
                self._step(index, batch)
        return returned

    def _of_step(self, index: Any, batch: tuple[Any, ...]) -> Sequence[AnnouncedBatch]:
        """The batches that a step is made of, but for those that no backward pass came of."""
        if skipped := self._listeners.forget_skipped():
            self._announced.drop(skipped)
        return self._announced.of_step(index, batch, self.steps)

    def _forget(self) -> None:
        """The passes that were heard, and the batches that were announced."""
        self._listeners.clear()
        self._announced.clear()
