"""Lightning: a callback that records what a Trainer does.

    trainer = Trainer(callbacks=[attrib.lightning.Record("run.zarr", loss=loss)])
    trainer.fit(module, loader)

The optimizer of the Trainer is exchanged for a recorder of it as training begins, and put back as it ends; each batch is
announced as `training_step` gets it. Neither draws a random number nor moves a parameter, so the trained model is that of
the same Trainer without the callback, bit for bit.
"""

import logging
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from .announcing import Announcing
from .drawn import DrawnRows
from .errors import AttribError, BatchError, ChangedOutsideError, MissingExtraError, ResumeError
from .recorder import Recorder, record

log = logging.getLogger("attrib")

PACKAGES = ("lightning.pytorch", "pytorch_lightning")  # one library by two names, each with a Callback of its own


class Record:
    """A callback of Lightning, `lightning.pytorch` and `pytorch_lightning` alike, that records the training of a module.

    Args:
        store: path or Store of the run.
        loss: `loss(module, batch) -> (B,)`, the loss of each example, unreduced; the batch as `training_step` gets it. What
            `training_step` differentiates is their mean or sum, or one factor beside.
        ids: the ids of a batch's examples: a function of the batch; the key or the position of an entry of it; None for the
            row numbers of the train dataset, shuffled or not.
        batch: what is stored of a batch, and given to the loss, as a function of it; None for all of it.
        options: as `attrib.record` takes them: capture, overwrite, resume, remainder, ...

    Attributes:
        recorder: None before training begins.

    Raises:
        MissingExtraError: Lightning was not imported.
        BatchError, AttribError, ResumeError: from `Trainer.fit`, before the first step, where the Trainer does what cannot
            be recorded. What `attrib.record` and `recorder.step` raise.

    Example:
        >>> import lightning.pytorch as lightning
        >>> class Classifier(lightning.LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.net = nn.Linear(8, 3).double()
        ...
        ...     def training_step(self, batch, number):
        ...         return losses(self, batch).mean()
        ...
        ...     def configure_optimizers(self):
        ...         return torch.optim.AdamW(self.parameters())
        >>> def losses(module, batch):
        ...     x, y = batch
        ...     return nn.functional.cross_entropy(module.net(x), y, reduction="none")
        >>> rows = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=8)
        >>> record = attrib.lightning.Record("new.zarr", loss=losses)
        >>> quiet = dict(logger=False, enable_progress_bar=False, enable_model_summary=False)
        >>> lightning.Trainer(callbacks=[record], max_epochs=1, **quiet).fit(Classifier(), rows)
        >>> attrib.open_run("new.zarr").steps
        3
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> "Record":
        bases = [sys.modules[name].Callback for name in PACKAGES if name in sys.modules]
        if not bases:
            raise MissingExtraError(
                f"Lightning was not imported: got none of {' and '.join(PACKAGES)}, expected the one that has the Trainer. "
                f"Import it first; install it with: pip install 'attrib[lightning]'"
            )
        made: Record = object.__new__(type(cls.__name__, (cls, *bases), {"__module__": cls.__module__}))
        return made

    def __init__(
        self,
        store: Any,
        loss: Callable[[Any, Any], Tensor],
        ids: Callable[[Any], Any] | str | int | None = None,
        batch: Callable[[Any], Any] | None = None,
        **options: Any,
    ) -> None:
        self.recorder: Recorder | None = None
        self._store, self._loss, self._ids, self._batch, self._options = store, loss, ids, batch, options
        self._rows: DrawnRows | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """For the processes of `strategy="ddp_spawn"`: one that records there as it would here."""
        return partial(Record, **self._options), (self._store, self._loss, self._ids, self._batch)

    # what Lightning calls, in this order

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Where rows are asked for, loaders are looked at as they are made."""
        if stage != "fit" or self._ids is not None:
            return
        prepare = trainer.strategy.process_dataloader

        def noted(loader: Any) -> Any:
            loader = prepare(loader)
            if trainer.training:
                self._note_rows(loader)
            return loader

        trainer.strategy.process_dataloader = noted

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """The states are those that training begins with, of a checkpoint too."""
        optimizer = _only_optimizer(trainer)
        self.recorder = record(optimizer, trainer.strategy.model, self._loss, self._store, **self._options)
        trainer.strategy.optimizers = [self.recorder]
        if self._options.get("resume") and self.recorder.steps not in (0, trainer.global_step):
            raise ResumeError(
                f"the Trainer goes on from another step than the run: got global_step {trainer.global_step}, expected "
                f"{self.recorder.steps}. Pass Trainer.fit the checkpoint of that step, ckpt_path=, or record a new run."
            )

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Announce it, under the autocast that `training_step` is under."""
        assert self.recorder is not None
        with trainer.precision_plugin.train_step_context():
            self.recorder.batch(self._ids_of(batch), batch if self._batch is None else self._batch(batch))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Training is over: what other callbacks do to the parameters by now, as averaging does, is no step."""
        try:
            self._finish(trainer)
        except ChangedOutsideError:  # by when all is written
            log.warning("the parameters moved after the last step: the run ends in those that the step left")

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """What was recorded stays."""
        self._finish(trainer, exception)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._finish(trainer)  # of a fit that had nothing to train on

    # what they are made of

    def _note_rows(self, loader: Any) -> None:
        if self._rows is not None:
            self._rows.remove()
        self._rows = DrawnRows(loader)

    def _ids_of(self, batch: Any) -> Any:
        if self._ids is None:
            if self._rows is None:
                raise BatchError(
                    "the rows of the batches are not known: got loaders that the Trainer did not prepare, expected them of "
                    "Trainer.fit. Say the ids instead: ids= a function of the batch, or an entry of it."
                )
            return self._rows.next()
        return self._ids(batch) if callable(self._ids) else batch[self._ids]

    def _finish(self, trainer: Any, error: BaseException | None = None) -> None:
        """Leave the Trainer as it was, then close the run."""
        vars(trainer.strategy).pop("process_dataloader", None)
        if self._rows is not None:
            self._rows.remove()
            self._rows = None
        if self.recorder is None:
            return
        if self.recorder in trainer.strategy.optimizers:
            trainer.strategy.optimizers = [self.recorder.optimizer]
        self.recorder.__exit__(type(error), error, None)


def _only_optimizer(trainer: Any) -> Any:
    """The one optimizer of a Trainer.

    Raises:
        AttribError: there are more.
    """
    optimizers = trainer.strategy.optimizers
    if len(optimizers) != 1 or isinstance(optimizers[0], Announcing):
        names = ", ".join(type(o).__name__ for o in optimizers) or "none"
        raise AttribError(
            f"the callback records one optimizer: got {names} from configure_optimizers, expected one of torch's. Return "
            f"it as it is; several that step in turn are recorded in a loop of your own, attrib.record([one, other], ...)."
        )
    return optimizers[0]
