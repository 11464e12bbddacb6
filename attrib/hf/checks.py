"""What a Trainer does that cannot be recorded: said before it trains."""

from collections.abc import Sequence
from typing import Any

from torch.optim import Optimizer
from torch.utils.data import IterableDataset

from ..announcing import Announcing
from ..report.extras import need


def check_trainer(trainer: Any, ids: str | None, has_loss: bool) -> None:
    """Raise ValueError, or MissingExtraError without transformers and accelerate."""
    transformers = need("transformers", "hf")
    need("accelerate", "hf")
    if not isinstance(trainer, transformers.Trainer):
        raise ValueError(
            f"it is no Trainer: got {type(trainer).__name__}, expected a transformers.Trainer. Other loops are recorded by "
            f"attrib.record(optimizer, model, loss, store)."
        )
    for wrong, message in _refused(trainer, ids, has_loss, transformers.Trainer):
        if wrong:
            raise ValueError(message)
    bare(trainer.optimizer)


def bare(optimizer: Any) -> Any:
    """The optimizer in what accelerate made of it, or attrib in a training before. Raises ValueError at a recorder."""
    while not isinstance(optimizer, Announcing):
        inner = getattr(optimizer, "optimizer", None)
        if not isinstance(inner, Optimizer):
            return optimizer
        optimizer = inner
    raise ValueError(
        f"the Trainer's optimizer is a recorder already: got one of {type(optimizer.optimizer).__name__}, expected the "
        f"optimizer that it wraps. Give a new Trainer that one, optimizers=(recorder.optimizer, None), and call "
        f"attrib.hf.record(trainer, store)."
    )


def _refused(trainer: Any, ids: str | None, has_loss: bool, base: Any) -> Sequence[tuple[bool, str]]:
    args = trainer.args
    computes = type(trainer).compute_loss is not base.compute_loss or trainer.compute_loss_func is not None
    return (
        (
            "train" in vars(trainer),
            "the Trainer is recorded already: got a second attrib.hf.record before trainer.train(), expected one. Make one "
            "call for each training.",
        ),
        (
            args.world_size > 1 or args.n_gpu > 1 or trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled,
            f"the training runs on several devices: got {args.world_size} processes and {args.n_gpu} GPUs, expected one of "
            f"each, without DeepSpeed and FSDP. Show it one device, CUDA_VISIBLE_DEVICES=0, in one process.",
        ),
        (
            bool(args.auto_find_batch_size),
            "the size of the batches is not fixed: got auto_find_batch_size=True, which begins anew in mid-run, expected "
            "False. Find it first, then record.",
        ),
        (
            trainer.neftune_noise_alpha is not None,
            "the loss draws noise that the model alone does not draw: got neftune_noise_alpha, whose hook is gone after "
            "training, expected None. Leave it out, or make the noise a module of the model.",
        ),
        (
            ids is None and isinstance(trainer.train_dataset, IterableDataset),
            f"the rows have no numbers: got an {type(trainer.train_dataset).__name__}, expected ids= with it. Name the "
            f"column that holds the ids of the examples.",
        ),
        (
            computes and not has_loss,
            "the loss of each example is not known: got a compute_loss of its own, expected loss= with it. Pass "
            "loss=, a function loss(model, inputs) -> (B,) of the dict that the model is called with, of which "
            "compute_loss is the sum, the mean or another multiple.",
        ),
    )
