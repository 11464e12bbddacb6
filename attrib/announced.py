"""The batches of the step to come: announced before their forward passes, or given with the step."""

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from .batch import Batch
from .checks import check_batch, hold
from .errors import BatchError
from .generators import generators
from .inputs import Inputs

log = logging.getLogger("attrib")


class AnnouncedBatch(NamedTuple):
    """ids (B,), a copy of the batch, as it is stored, the generators' state when it was announced, None where that was after
    the pass; the batch itself; and how often a gradient had come by then."""

    ids: np.ndarray
    batch: Batch
    inputs: Inputs
    random: Tensor | None
    original: Batch
    backwards: int


class Announcements:
    """Of one step. ids: the type of those of the steps before, None at the first."""

    def __init__(self) -> None:
        self.ids: np.dtype[Any] | None = None
        self._batches: list[AnnouncedBatch] = []
        self._held: tuple[Batch, Inputs] | None = None  # of the last batch

    def __len__(self) -> int:
        return len(self._batches)

    def announce(self, index: Any, args: tuple[Any, ...], backwards: int, pulled: bool, step: int) -> None:
        """backwards: how often a gradient came; pulled: whether one of this step did, and of an announced batch.

        Raises:
            BatchError: it cannot be stored, or is not the first of its step though none was announced.
        """
        if pulled and not self._batches:
            raise BatchError(
                f"a batch was not announced: got a backward pass before the first of step {step}, expected "
                f"recorder.batch(index, *batch) before the forward pass of each. Call recorder.zero_grad() and begin the "
                f"step anew."
            )
        self._batches.append(self._batch(index, args, generators(), backwards))

    def of_step(self, index: Any, args: tuple[Any, ...], step: int) -> Sequence[AnnouncedBatch]:
        """Those that were announced, or the one that is given with the step.

        Raises:
            BatchError: there are none, or both.
        """
        if index is not None or args:
            if self._batches:
                raise BatchError(
                    f"the batch is there twice: got {len(self._batches)} announced and one with the step, expected either, "
                    f"at step {step}. Call recorder.step() without it. The step was refused."
                )
            return [self._batch(index, args, None, 0)]
        if not self._batches:
            raise BatchError(
                f"the batch is missing: got step() and no batch announced, expected recorder.batch(index, *batch) before "
                f"the forward pass of each batch, or recorder.step(index, *batch), at step {step}. Where a Trainer steps, "
                f"give it the optimizer itself, not the recorder, and write attrib.hf.record(trainer, store) for one of "
                f"transformers, Trainer(callbacks=[attrib.lightning.Record(store, loss)]) for one of Lightning. Under "
                f"accelerate call batch on the recorder that was given to accelerator.prepare. The step was refused."
            )
        return self._batches

    def clear(self, since: int | None = None) -> int:
        """They are recorded, or their gradients are gone. since: but for those after which no gradient came, so many having
        come so far. How many are left."""
        self._batches = [a for a in self._batches if since is not None and a.backwards == since]
        return len(self._batches)

    def drop(self, numbers: Sequence[int]) -> None:
        """Those of which no backward pass came: nothing of them is in the step."""
        log.info("%d announced batches had no backward pass: they are left out", len(numbers))
        self._batches = [a for n, a in enumerate(self._batches) if n not in numbers]

    def _batch(self, index: Any, args: tuple[Any, ...], random: Tensor | None, backwards: int) -> AnnouncedBatch:
        ids, batch = check_batch(index, args, self._batches[-1].ids.dtype if self._batches else self.ids)
        self._held = hold(batch, self._held)
        return AnnouncedBatch(ids, *self._held, random, batch, backwards)
