"""A `transformers.Trainer` that records: its own methods, each with what the recorder has to know put round it.

    get_train_dataloader   every batch holds the ids of its examples
    create_optimizer       the optimizer is one that can begin to record later
    training_step          recording begins, once weights, optimizer and place in the data are loaded; ids leave the batch
    compute_loss           the batch is announced, as the model is called with it
    train                  at its end the run is closed: complete, unless it failed

Nothing else changes: the order of the data, the random numbers and the arithmetic are the Trainer's.
"""

import inspect
import logging
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import check_options
from ..errors import ResumeError
from ..generators import generators, random_state
from ..recorder import Recorder
from ..recorder import record as record_loop
from ..store import Reader, stands
from ..wrapper import Wrapper
from .checks import bare, check_trainer
from .loss import Loss, base_of
from .loss import loss as loss_of
from .rows import IDS, numbered

log = logging.getLogger("attrib")


class LateOptimizer(Wrapper):
    """An optimizer that is recorded from when it is given a recorder."""

    recorder: Recorder | None = None

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        stepping = self.optimizer if self.recorder is None else self.recorder
        return stepping.step() if closure is None else stepping.step(closure=closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        (self.optimizer if self.recorder is None else self.recorder).zero_grad(set_to_none)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        (self.optimizer if self.recorder is None else self.recorder).load_state_dict(state_dict)


class Recording:
    """One training of a Trainer, from `attrib.hf.record` to the end of `trainer.train()`.

    recorder: None until recording begins, at the first batch; after the end the closed one.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments
        >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=30, n_positions=8, n_embd=8, n_layer=1, n_head=2))
        >>> texts = [{"input_ids": t, "labels": t} for t in torch.randint(30, (8, 6))]
        >>> arguments = TrainingArguments("out", max_steps=3, per_device_train_batch_size=4, report_to="none")
        >>> trainer = Trainer(model, arguments, train_dataset=texts)
        >>> recording = attrib.hf.record(trainer, "trainer.zarr")
        >>> trainer.train()
        {'train_runtime': ...}
        TrainOutput(global_step=3, ...)
        >>> recording.recorder.steps
        3
    """

    def __init__(self, trainer: Any, store: Any, loss: Any, ids: str | None, options: dict[str, Any]) -> None:
        self.recorder: Recorder | None = None
        self._trainer, self._store, self._loss, self._column, self._options = trainer, store, loss, ids, options
        self._optimizer: LateOptimizer | None = None
        self._closing = ExitStack()
        self._ids: Any = None  # of the batch whose forward pass is to come
        self._until = self._recorded() if options.get("resume") else None  # the Trainer's step to go on from
        self._before: dict[str, Any] = {}  # what stood in the place of a method
        methods = (self.get_train_dataloader, self.create_optimizer, self.training_step, self.compute_loss)
        for method in (*methods, self._save_checkpoint, self._load_best_model, self.train):
            self._interpose(method)

    def __repr__(self) -> str:
        return f"Recording({self._store!r}, {self.recorder or 'not begun'})"

    def _interpose(self, method: Callable[..., Any]) -> None:
        name = method.__name__
        self._before[name] = vars(self._trainer).get(name)
        setattr(self._trainer, name, partial(method, getattr(self._trainer, name)))

    def _restore(self) -> None:
        for name, before in self._before.items():
            delattr(self._trainer, name)
            if before is not None:
                setattr(self._trainer, name, before)
        if self._optimizer is not None:
            self._optimizer.recorder = None

    def _recorded(self) -> int | None:
        """The Trainer's step after the last that the store has; None where it has none."""
        header = Reader(self._store).header if stands(self._store) else {"complete": False, "written_steps": 0}
        if header["complete"] or not header["written_steps"]:  # the first is refused where it is opened
            return None
        return int(header.get("trainer_step", 0)) + int(header["written_steps"])

    # round the Trainer's methods, `original` each

    def get_train_dataloader(self, original: Callable[[], Any]) -> Any:
        loader, dataset = original(), self._trainer.train_dataset
        removed = self._column is not None and loader.dataset is not dataset and hasattr(dataset, "select_columns")
        return numbered(loader, self._column, dataset.select_columns([self._column]) if removed else None)

    def create_optimizer(self, original: Callable[..., Any], *args: Any) -> Any:
        optimizer = original(*args)
        if self._optimizer is None:
            self._optimizer = self._trainer.optimizer = LateOptimizer(bare(optimizer))
        return self._trainer.optimizer

    def training_step(
        self, original: Callable[..., Any], model: nn.Module, inputs: Any, *args: Any, **named: Any
    ) -> Any:
        self._ids = inputs.pop(IDS, None)
        if self.recorder is None:
            self._begin(model)
        return original(model, inputs, *args, **named)

    def compute_loss(
        self, original: Callable[..., Any], model: nn.Module, inputs: Any, *args: Any, **named: Any
    ) -> Any:
        ids, self._ids = self._ids, None
        if ids is not None and self.recorder is not None:
            self.recorder.batch(ids, dict(inputs), *self._divisor(inputs, named.get("num_items_in_batch")))
        return original(model, inputs, *args, **named)

    def _divisor(self, inputs: Any, items: Any) -> tuple[Tensor, ...]:
        """What the Trainer divides the sum of the losses of the batch by, as far as that is seen beforehand: where it is
        another number, the recorder finds a factor beside."""
        if not isinstance(self._loss, Loss):
            return ()
        trainer = self._trainer
        scaled = getattr(trainer, "loss_is_scaled_for_ga", None)  # by its steps, in some versions said by the user
        if scaled is None:
            scaled = trainer.model_accepts_loss_kwargs and items is not None
        counted = items is not None and (trainer.label_smoother is not None or _reads_items(trainer.model))
        divisor = float(items) if counted else float(self._loss.count(inputs))
        return (torch.tensor(divisor if scaled else divisor * trainer.current_gradient_accumulation_steps),)

    def _save_checkpoint(self, original: Callable[..., Any], *args: Any, **named: Any) -> Any:
        if self.recorder is not None:
            self.recorder.flush()  # so that no checkpoint is of a step that the run lacks
        return original(*args, **named)

    def _load_best_model(self, original: Callable[[], Any]) -> Any:
        if self.recorder is not None:
            self.recorder.close()  # training is over; what moves the parameters now is no step
        return original()

    def train(self, original: Callable[..., Any], *args: Any, **named: Any) -> Any:
        with ExitStack() as self._closing:
            self._closing.callback(self._restore)
            returned = original(*args, **named)
            if self.recorder is None:
                log.warning("nothing was recorded: training ended at step %d", self._trainer.state.global_step)
        return returned

    def _begin(self, model: nn.Module) -> None:
        """Begin to record, where the Trainer has come to the step to go on from: until then it makes steps again that the
        run has."""
        assert self._optimizer is not None
        step = self._trainer.state.global_step
        if self._until is None:
            self.recorder = self._closing.enter_context(self._recorder(model))
            self.recorder.describe(trainer_step=step)
        elif step > self._until:
            raise ResumeError(
                f"the checkpoint is ahead of the run: got training from step {step}, expected {self._until} at most, where "
                f"the run ended, at {self._store}. Resume from an earlier checkpoint, or record a new run."
            )
        elif step == self._until:
            self.recorder = self._resumed(model, step)
        self._optimizer.recorder = self.recorder

    def _recorder(self, model: nn.Module) -> Recorder:
        assert self._optimizer is not None
        return record_loop(self._optimizer.optimizer, model, self._loss, self._store, **self._options)

    def _resumed(self, model: nn.Module, step: int) -> Recorder:
        """The recorder of the run that ended early, which the Trainer has come to with the same parameters.

        Raises:
            ResumeError: with others.
        """
        assert self._optimizer is not None
        parameters = [p for group in self._optimizer.param_groups for p in group["params"]]
        now = [p.detach().clone() for p in parameters]
        with random_state(generators()):  # the Trainer's own, which it has restored or come to
            recorder = self._closing.enter_context(self._recorder(model))
        if not all(map(torch.equal, now, parameters)):
            raise ResumeError(
                f"the training is not that of the run: got other parameters at step {step}, expected those that its last "
                f"step left, at {self._store}. Pass trainer.train(resume_from_checkpoint=...) a checkpoint of that "
                f"training, with the same data, arguments and seed; or record a new run."
            )
        return recorder


def _reads_items(model: nn.Module) -> bool:
    """Whether a model divides by the number of items that it is given: those with a mean of their own do not."""
    try:
        return "self.loss_function(" in inspect.getsource(type(base_of(model)).forward)
    except (OSError, TypeError):
        return True


def record(
    trainer: Any,
    store: Any,
    *,
    loss: Callable[..., Any] | None = None,
    ids: str | None = None,
    capture: str = "replay",
    **options: Any,
) -> Recording:
    """Record what `trainer.train()` is about to do.

    Args:
        trainer: a `transformers.Trainer`, on one device. It trains as it would: same order, numbers and arithmetic.
        store: path or Store of the run, which is complete when `trainer.train()` returns.
        loss: `loss(model, inputs) -> (B,)` of the dict that the model is called with; None for `attrib.hf.loss`, with the
            Trainer's label smoothing. A `compute_loss` of one's own asks for it.
        ids: the column of the train dataset that holds the ids, integers or strings; None for the numbers of its rows.
        capture: as `attrib.record` takes it.
        options: the others of `attrib.record`: states_every, check_every, constants="digest" for adapters on a frozen base,
            remainder, resume, ... With resume=True the run is gone on with once training has come to where it ended, from a
            checkpoint or from the start: steps that it has already are made again, and not recorded twice.

    Returns:
        A `Recording`, which need not be kept.

    Raises:
        ValueError: the Trainer does what cannot be recorded, or its loss is not known. MissingExtraError: no transformers.
        What `attrib.record` raises, from `trainer.train()`.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments
        >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=30, n_positions=8, n_embd=8, n_layer=1, n_head=2))
        >>> texts = [{"input_ids": t, "labels": t} for t in torch.randint(30, (8, 6))]
        >>> arguments = TrainingArguments("out", max_steps=3, per_device_train_batch_size=4, report_to="none")
        >>> trainer = Trainer(model, arguments, train_dataset=texts)
        >>> attrib.hf.record(trainer, "trainer.zarr")
        Recording('trainer.zarr', not begun)
        >>> trainer.train()
        {'train_runtime': ...}
        TrainOutput(global_step=3, ...)
        >>> attrib.open_run("trainer.zarr").steps
        3
    """
    check_trainer(trainer, ids, loss is not None)
    known = set(inspect.signature(record_loop).parameters) - {"optimizer", "model"}
    if unknown := sorted(set(options) - known):
        raise TypeError(f"unknown options: got {', '.join(unknown)}, expected some of {', '.join(sorted(known))}.")
    checked = {"check_every": 1, "block": None, "states_every": 1, **options}
    words = {name: options[name] for name in ("constants", "remainder") if name in options}
    check_options(capture, **words, **{name: checked[name] for name in ("check_every", "block", "states_every")})
    if loss is None:
        loss = loss_of(trainer.model, trainer.args.label_smoothing_factor if trainer.label_smoother else 0.0)
    return Recording(trainer, store, loss, ids, {"capture": capture, **options})
