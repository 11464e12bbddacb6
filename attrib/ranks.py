"""Training in several processes, DistributedDataParallel: each announces its own batches, rank 0 records them all.

p.grad is the mean over the ranks once the backward pass is over, so the passes of all ranks are passes of one step. At each
step the others send what they were announced and what they heard to rank 0, which checks the step, says whether it may be
made, and once more whether it was recorded; an error of any rank is every rank's.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from .announced import AnnouncedBatch
from .announcing import Announcing
from .capture import Heard, Listeners
from .checks import names_of
from .errors import AttribError
from .functional import uncompiled, wrappers
from .loop import RecordOptions


class Elsewhere(NamedTuple):
    """What the other ranks were announced, and what they heard."""

    announced: tuple[AnnouncedBatch, ...] = ()
    heard: tuple[Heard, ...] = ()


class Alone:
    """The one process there is."""

    def gathered(self, device: torch.device) -> Elsewhere:
        return Elsewhere()

    def go(self) -> None:
        pass

    @contextmanager
    def failing(self) -> Iterator[None]:
        yield


class Lead:
    """Rank 0. group: of all ranks, for objects."""

    def __init__(self, group: Any) -> None:
        self._group = group

    def gathered(self, device: torch.device) -> Elsewhere:
        """What the others send, their batches on this device.

        Raises:
            The error of a rank that cannot step.
        """
        found: list[Any] = [None] * dist.get_world_size(self._group)
        dist.gather_object(None, found, dst=0, group=self._group)
        for rank, sent in enumerate(found[1:], 1):
            if isinstance(sent, str):
                raise AttribError(f"rank {rank} cannot step: {sent}")
        announced = tuple(a for sent in found[1:] for a in sent.announced)
        placed = (a._replace(batch=a.batch.map(lambda t: t.to(device))) for a in announced)
        return Elsewhere(tuple(placed), tuple(heard for sent in found[1:] for heard in sent.heard))

    def go(self) -> None:
        """Let the others go on."""
        dist.broadcast_object_list([None], src=0, group=self._group)

    @contextmanager
    def failing(self) -> Iterator[None]:
        """An error within, which the others wait for a `go` from, is raised by them too."""
        try:
            yield
        except BaseException as error:
            dist.broadcast_object_list([f"{type(error).__name__}: {error}"], src=0, group=self._group)
            raise


class Follow:
    """Another rank."""

    def __init__(self, group: Any) -> None:
        self._group = group

    def send(self, sent: Elsewhere | str) -> None:
        dist.gather_object(sent, None, dst=0, group=self._group)

    def wait(self) -> None:
        """For rank 0 to let this one go on. Raises AttribError with what went wrong there."""
        said: list[Any] = [None]
        dist.broadcast_object_list(said, src=0, group=self._group)
        if said[0] is not None:
            raise AttribError(f"rank 0 did not record the step: {said[0]}")


def ranks_of(model: nn.Module, options: RecordOptions) -> Alone | Lead | Follow:
    """This process among those that train the model; every one of them has to ask.

    Raises:
        ValueError: the model is trained in a way that rank 0 cannot account for.
    """
    _check_whole(model)
    parallel = [m for m in wrappers(model) if isinstance(m, nn.parallel.DistributedDataParallel)]
    if not parallel or dist.get_world_size() == 1:
        return Alone()
    _check_parallel(parallel[0], options)
    group = dist.new_group(backend="gloo")
    return Lead(group) if dist.get_rank() == 0 else Follow(group)


def _check_whole(model: nn.Module) -> None:
    """Raise ValueError where parameters are sharded over processes."""
    for name, p in model.named_parameters():
        sharded = any(c.__name__ in ("DTensor", "FlatParameter", "ShardedTensor") for c in type(p).__mro__)
        if sharded or getattr(p, "_is_flat_param", False):
            raise ValueError(
                f"fully sharded training is not recorded: got a parameter of which each process holds a part, expected "
                f"whole ones, at {name!r}. It would take every step's parameters and gradients gathered, and the losses of "
                f"all processes computed, on one of them. Train with DistributedDataParallel."
            )


def _check_parallel(parallel: nn.parallel.DistributedDataParallel, options: RecordOptions) -> None:
    if options.resume:
        raise ValueError(
            "a run of several processes cannot be gone on with: got resume=True and a DistributedDataParallel, expected "
            "either. Record a new run from a checkpoint of your own."
        )
    if dist.get_world_size(parallel.process_group) != dist.get_world_size():
        raise ValueError(
            f"the model is trained by some of the processes: got {dist.get_world_size(parallel.process_group)} of "
            f"{dist.get_world_size()}, expected all. Leave out process_group=."
        )
    for name, module in uncompiled(parallel).named_modules():
        statistics = isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training
        if isinstance(module, nn.SyncBatchNorm) or statistics:
            raise ValueError(
                f"batch statistics of several processes are not accounted for: got a {type(module).__name__} in train mode, "
                f"at {name!r}, expected none. Put it into eval mode, use GroupNorm, or train in one process."
            )


class Follower(Announcing):
    """What `attrib.record` gives the ranks other than 0: it steps as a recorder does, and writes nothing."""

    capture = "replay"

    def __init__(
        self, optimizer: torch.optim.Optimizer, model: nn.Module, options: RecordOptions, ranks: Follow
    ) -> None:
        super().__init__(optimizer)
        self.model, self._ranks, self._steps = uncompiled(model), ranks, 0
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        accounts = options.capture.remainder == "account"
        names = names_of(optimizer, self.model)
        self._listen(Listeners(model, names, self._parameters, False, accounts), options.capture.penalty is not None)
        ranks.wait()

    @property
    def steps(self) -> int:
        return self._steps

    def __enter__(self) -> "Follower":
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self.close()

    def describe(self, **facts: Any) -> None:
        """Rank 0's are written."""

    def flush(self) -> None:
        """Rank 0 commits its steps."""

    def close(self) -> None:
        """Take off all hooks; rank 0 writes what is left."""
        self._listeners.remove()

    def _step(self, index: Any, batch: tuple[Any, ...]) -> None:
        try:
            sent = self._sent(self._of_step(index, batch))
        except Exception as error:
            self._ranks.send(f"{type(error).__name__}: {error}")
            with suppress(AttribError):  # what rank 0 has to say of it
                self._ranks.wait()
            raise
        self._ranks.send(sent)
        self._ranks.wait()
        with torch.no_grad():
            self.optimizer.step()
        self._announced.ids = sent.announced[0].ids.dtype
        self._forget()
        self._steps += 1
        self._ranks.wait()

    def _sent(self, announced: Sequence[AnnouncedBatch]) -> Elsewhere:
        heard = self._listeners.heard(announced[0].batch.size, len(announced))
        return Elsewhere(tuple(_sent(a, heard) for a in announced), (heard,))


def _sent(announced: AnnouncedBatch, heard: Heard) -> AnnouncedBatch:
    """Without what is known here alone."""
    batch = announced.batch.map(lambda t: t.cpu())
    random = heard.start if announced.random is None else announced.random
    return announced._replace(batch=batch, random=random, original=batch, backwards=0)
