"""A model that several processes train is recorded as that: not before it was made so."""

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ..errors import AttribError


def check_alone(module: nn.Module, args: Any) -> None:
    """A forward hook of a model that was recorded as one process's: raises AttribError where a DistributedDataParallel of
    several, put round it since, calls it."""
    if torch.compiler.is_compiling():
        return
    parallel = nn.parallel.DistributedDataParallel._active_ddp_module
    if parallel is not None and dist.get_world_size(parallel.process_group) > 1:
        raise AttribError(
            "the model was made parallel after it was recorded: got a pass through a DistributedDataParallel, expected "
            "attrib.record to be given that. Wrap the model first, then record; with accelerate: model = "
            "accelerator.prepare(model), recorder = attrib.record(optimizer, model, loss, store), optimizer, loader = "
            "accelerator.prepare(recorder, loader)."
        )
