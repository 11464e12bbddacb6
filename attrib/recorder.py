"""Record a training run: an optimizer wrapped round the user's own.

At each step, in order: the batch and the model are checked, the shares of the examples are compared with p.grad (batch
identity), at the first step the store is made, the user's optimizer steps, the update is replayed by its rule (step
identity), the step is appended. Nothing moves before all that can fail has been tried, but for the optimizer itself and the
replay of its update; a first step that fails there leaves no store either.
"""

import logging
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .announced import AnnouncedBatch
from .announcing import Announcing
from .buffers import packed
from .capture import Announced, Capture, Captured, CaptureOptions, Heard, Settled, Step
from .checks import Guard, check_gradient, names_of
from .constants import to_array, wide
from .errors import AttribError, ChangedOutsideError, StepIdentityError
from .functional import uncompiled
from .interrupt import shielded
from .layout import Layout
from .loop import Loop, RecordOptions, check_unmodelled, header_of, replayed_step, settled_facts
from .optim import check_group_options, read_hyper, read_state, rules_of, together
from .ranks import Alone, Follow, Follower, Lead, ranks_of
from .resume import Resumed
from .resume import resume as resume_run
from .store import PassRecord, StepRecord, Writer, close_dropped

log = logging.getLogger("attrib")

CHECK_EVERY = 50  # a check costs about one step: 2 % of the training time


def record(
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
    model: nn.Module,
    loss: Callable[..., Tensor],
    store: Any,
    capture: str = "replay",
    overwrite: bool = False,
    *,
    resume: bool = False,
    check_every: int = CHECK_EVERY,
    block: int | None = None,
    states_every: int = 1,
    penalty: Callable[[nn.Module], Tensor] | None = None,
    constants: str = "values",
    remainder: str = "refuse",
    rule: str | None = None,
    shares: str = "example",
) -> "Recorder":
    """Wrap `optimizer` so that every step is recorded to `store`.

    Args:
        optimizer: one of `attrib.optim.RULES` over parameters of `model`, in one floating type; or several, a list, in turn.
        model: under training, as the loop calls it, compiled or DistributedDataParallel; left as is.
        store: path or Store.
        loss: `loss(model, *batch) -> (B,)`, of each example, unreduced; with shares="rows" a scalar objective will do.
        capture: "replay" stores states and inputs, gradients are recomputed when attributing; "gradients" the shares of
            the examples too, (B, P) a step; "factors" the same in the form that layers give, where that is shorter.
        overwrite: replace the run that is there.
        resume: go on with a run that ended early, if one is there, else begin it: parameters, optimizer and generators are
            put to what they were after its last step, `recorder.steps`; scheduler and place in the data by the loop.
        check_every: the first two steps are checked, and every so many after; by the step identity at starts of blocks.
        block: steps written and committed together; None chooses by size, and commits every few seconds too.
        states_every: store the parameters of every so many steps only, rounded up to whole blocks. Those in between are made
            again when read, bit for bit, by torch's optimizer from the stored gradients, with the same version of torch.
        penalty: `penalty(model) -> scalar`, what the loop adds to the reduced loss that is no example's. Its gradient is
            stored, and its contribution stands with weight decay in the ledger. It must draw no random numbers.
        constants: "values" stores buffers and frozen parameters, of whatever type, bit for bit; "digest" only what they are
            recognised by, 128 bits each: for a large frozen base, which then has to be at hand when attributing.
        remainder: "refuse" steps whose p.grad holds more than the shares (noise, hooks, clipping by value), or "account".
        rule: "frozen" for an optimizer that has none: its coefficients are read off each update, see `optim.frozen`.
        shares: what an example's share is: "example", what its own loss asked for; "rows", what passed through its rows.

    Returns:
        A `Recorder`: an Optimizer whose `step` takes the example ids and the batch, or batches announced by `batch`.

    Raises:
        UnsupportedOptimizerError, StoreExistsError, ChangedOutsideError, ValueError: before anything is written.
        ResumeError, ModelMismatchError, StoreError: the run that is there cannot be gone on with; nothing was changed.

    Example:
        >>> with attrib.record(optimizer, model, loss, "new.zarr") as recorder:
        ...     for index, x, y in loader:
        ...         recorder.zero_grad()
        ...         loss(model, x, y).mean().backward()
        ...         recorder.step(index, x, y)
    """
    captured = CaptureOptions(capture, check_every, penalty, remainder, shares)
    options = RecordOptions(captured, overwrite, resume, block, states_every, constants, rule)
    options.check()
    return _recorder(together(optimizer), model, loss, store, options)


def _recorder(
    optimizer: torch.optim.Optimizer, model: nn.Module, loss: Callable[..., Tensor], store: Any, options: RecordOptions
) -> "Recorder":
    ranks = ranks_of(model, options)
    if isinstance(ranks, Follow):
        follower: Any = Follower(optimizer, model, options, ranks)  # does what a recorder does, but for writing
        return follower
    with ranks.failing():
        recorder = Recorder(optimizer, model, loss, store, options, ranks)
        ranks.go()
    return recorder


class Recorder(Announcing):
    """An optimizer that records. Parameter groups, state and defaults are the wrapped optimizer's own.

    Example:
        >>> recorder = attrib.record(optimizer, model, loss, "new.zarr")
        >>> for index, x, y in loader:
        ...     recorder.zero_grad()
        ...     recorder.batch(index, x, y)  # before its forward pass; then step needs no arguments
        ...     loss(model, x, y).mean().backward()
        ...     recorder.step()
        >>> recorder.close()
        >>> recorder.steps
        12
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: nn.Module,
        loss: Callable[..., Tensor],
        store: Any,
        options: RecordOptions,
        ranks: Alone | Lead,
    ) -> None:
        if options.overwrite and options.resume:
            raise ValueError("a run is either replaced or gone on with: got overwrite=True and resume=True. Pass one.")
        self._rules = rules_of(optimizer, options.rule)
        check_unmodelled(self._rules, options)
        super().__init__(optimizer)
        self.model, self._options = uncompiled(model), options
        check_group_options(optimizer)
        names = names_of(optimizer, self.model)
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._layout = Layout(names, tuple(tuple(p.shape) for p in self._parameters))
        self._guard = Guard(self.model, self._layout)
        self._settled = Settled()  # by the steps so far
        self._ranks = ranks
        self._left = float("nan")  # when the last step was done with
        self._inspected = 0  # the last step whose update was replayed
        self._open = True
        close_dropped()
        loop = Loop(self.model, optimizer, self._rules, self._layout, self._parameters, self._guard)
        resumed = resume_run(store, loop, options) if options.resume else None
        self._writer = self._begun(store, loop, resumed)
        self._capture = Capture(loss, model, self._layout, self._parameters, options.capture)
        self._listen(self._capture.listeners, options.capture.penalty is not None)
        if resumed is not None:
            self._settled, self._inspected = resumed.settled, resumed.inspected
            self._announced.ids = resumed.ids
            self._capture.prime(resumed.after, resumed.passes, resumed.settled.autocast)
        weakref.finalize(self, self._writer.drop).atexit = False

    def _begun(self, store: Any, loop: Loop, resumed: Resumed | None) -> Writer:
        options, values = self._options, {**self._guard.constants, **self._guard.buffers.before}.values()
        constants = [to_array(t) for t in values] if options.constants == "values" else []
        replaces = options.overwrite or options.resume  # what is there with resume=True, if anything, has no step
        reopened = None if resumed is None else resumed.reopened
        header = header_of(loop, options)
        return Writer(store, header, constants, replaces, options.block, options.states_every, reopened)

    @property
    def steps(self) -> int:
        """Steps recorded so far, those of a run that is gone on with among them."""
        return self._writer.steps

    @property
    def capture(self) -> str:
        """What is stored of the shares: "replay", "gradients" or "factors"."""
        return self._options.capture.kind

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Before the first step only: afterwards the momentum would not follow from the recorded gradients."""
        if self._writer.steps:
            raise ChangedOutsideError(
                f"optimizer state would change in mid-run: got load_state_dict after {self._writer.steps} steps, "
                f"expected it before the first. Close this run and record a new one."
            )
        super().load_state_dict(state_dict)

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self._finish(complete=error is None)

    def describe(self, **facts: Any) -> None:
        """Facts to stand in the run's header, JSON."""
        self._writer.update_header(**facts)

    def __repr__(self) -> str:
        return f"Recorder({self._rules}, capture={self.capture!r}, steps={self._writer.steps})"

    # the journey of one step

    def _step(self, index: Any, batch: tuple[Any, ...]) -> None:
        with self._ranks.failing():
            self._made(index, batch)

    def _made(self, index: Any, batch: tuple[Any, ...]) -> None:
        began = time.perf_counter()
        elsewhere = self._ranks.gathered(self._parameters[0].device)
        announced = (*self._of_step(index, batch), *elsewhere.announced)
        step = self._checked(announced, elsewhere.heard)
        captured = self._capture.take(step)
        record = self._recorded(step, captured, announced)
        if step.number == 0:
            found = {"factors": captured.settled.described, "buffers": list(step.buffers)}
            self._writer.update_header(training=self._guard.training(), **found)
        with self._writer.ready(record), shielded():  # from Ctrl-C: a step that is made is recorded
            self._ranks.go()
            moved = time.perf_counter()
            with torch.no_grad():
                self.optimizer.step()
            seconds = (began - self._left) + (time.perf_counter() - moved)
            after = self._layout.flatten(self._parameters)
            self._guard.stepped(after, self.optimizer)
            if captured.settled is not self._settled:
                self._settled = captured.settled
                self._writer.update_header(settled=settled_facts(self._settled))
            self._announced.ids = record.ids.dtype
            self._forget()
            log = {**captured.log, "seconds": seconds, **self._inspect(step, record, after)}
            buffers = packed(self._guard.buffers.before)
            self._writer.append(record._replace(log=log, buffers=buffers), to_array(after))
        self._ranks.go()
        self._left = time.perf_counter()

    def _checked(self, announced: Sequence[AnnouncedBatch], elsewhere: tuple[Heard, ...]) -> Step:
        """The step that is asked for, the run being as the last one left it."""
        if not self._open:
            raise AttribError("the recorder is closed: got a step, expected none. Record a new run.")
        self._writer.check()
        number = self._writer.steps
        self._guard.check_optimizer(self.optimizer, self._parameters, number)
        theta = self._guard.check(self._parameters, number)
        self._guard.check_state(self.optimizer, number)
        check_group_options(self.optimizer, f", step {number}; the step was refused")
        gradient = check_gradient(self._layout, self._parameters, number)
        named = zip(self._layout.names, self._parameters, strict=True)
        active = frozenset(name for name, p in named if p.grad is not None)
        dtype = wide(theta.dtype)
        passes = tuple(Announced(a.batch, a.random, a.original) for a in announced)
        buffers = self._guard.buffers.before
        return Step(number, theta.to(dtype), gradient.to(dtype), active, passes, self._settled, buffers, elsewhere)

    def _recorded(self, step: Step, captured: Captured, announced: Sequence[AnnouncedBatch]) -> StepRecord:
        """The record of a step before it is made."""
        states = read_state(self._rules, self.optimizer, self._parameters) if self._writer.wants_state else {}
        each = zip(announced, captured.scales.tolist(), captured.factor_scales.tolist(), captured.random, strict=True)
        return StepRecord(
            theta=self._array(step.theta),
            gradient=self._array(step.gradient),
            hyper=read_hyper(self._rules, self.optimizer),
            ids=np.concatenate([a.ids for a in announced]),
            passes=tuple(PassRecord(len(a.ids), a.inputs, *rest) for a, *rest in each),
            state={key: to_array(value) for key, value in states.items()} or None,
            log=captured.log,
            shares=captured.shares,
            penalty=None if captured.penalty is None else to_array(captured.penalty),
            buffers=packed(step.buffers),
        )

    def _array(self, vector: Tensor) -> np.ndarray:
        """(P,) in the parameters' type."""
        return to_array(vector.to(self._parameters[0].dtype))

    def flush(self) -> None:
        """Commit the steps so far, as before a checkpoint. Raises StoreError where that cannot be."""
        self._writer.flush()

    def close(self) -> None:
        """Write what is left and mark the run complete. Closing twice is harmless.

        Raises:
            ChangedOutsideError: the parameters moved after the last recorded step; what was recorded is written.
            StoreError: what is left could not be written; it is kept, and may be closed again.
        """
        self._finish(complete=True)

    def _finish(self, complete: bool) -> None:
        if self._writer.closed:
            return
        self._open = False
        self._capture.remove()
        with shielded():
            self._writer.close(complete)
        if not self._writer.steps:
            log.warning("nothing was recorded: recorder.step was never called")
        elif complete:
            self._guard.check_parameters(self._parameters, self._writer.steps)

    # second identity: the replayed update is the real one

    def _inspect(self, step: Step, record: StepRecord, after: Tensor) -> dict[str, float]:
        """How well the rule reproduces this step, where that is due. Attribution and `attrib verify` replay every step."""
        number, every = step.number, self._options.capture.check_every
        if record.state is None or 0 < number < self._inspected + every:
            return {}
        self._inspected = number
        try:
            again = self._options.states_every > 1
            return {"step_identity": replayed_step(self._rules, self._layout, step, record, after.cpu(), again)}
        except StepIdentityError:
            self._finish(complete=False)
            raise
