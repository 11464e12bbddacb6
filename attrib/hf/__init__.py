"""Hugging Face: a `transformers.Trainer` is recorded by one line before it trains.

    attrib.hf.record(trainer, "run.zarr")
    trainer.train()
    result = attrib.attribute(attrib.open_run("run.zarr"), model, measurement, loss=attrib.hf.loss(model))

transformers and accelerate are the user's own, of the extra "hf"; nothing of them is imported with attrib.
"""

from .loss import Loss, loss
from .trainer import Recording, record

__all__ = ["Loss", "Recording", "loss", "record"]
