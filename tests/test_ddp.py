"""DistributedDataParallel: every rank announces its batches, rank 0 records one run of them all."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import attrib
from attrib import errors

STEPS, SIZE = 4, 3
SAID = {
    "recorded too early": "the model was made parallel after it was recorded",
    "batch norm": "batch statistics of several processes",
    "resumed": "resume=True and a DistributedDataParallel",
    "rank 1 is silent": "the batch is missing",
    "rank 0 is silent": "the batch is missing",
}


def net(drop: float = 0.0) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Dropout(drop), nn.Tanh(), nn.Linear(6, 3)).double()


def losses(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y, reduction="none")


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    count = 2 * STEPS * SIZE
    return torch.randn(count, 4, generator=generator).double(), torch.randint(0, 3, (count,), generator=generator)


def rows(step: int, rank: int) -> Tensor:
    return torch.arange(SIZE) + SIZE * (2 * step + rank)


def batch(index: Tensor) -> list[Tensor]:
    return [index, *(t[index] for t in data())]


def trained(model: nn.Module, rank: int, store: Path, clip: float = 1e9, parts: int = 1, **options: Any) -> None:
    """parts: passes of a step, but for the last of which gradients are not synchronised."""
    with attrib.record(torch.optim.AdamW(model.parameters(), 0.05), model, losses, store, **options) as recorder:
        for step in range(STEPS):
            recorder.zero_grad()
            cut = rows(step, rank).chunk(parts)
            for n, index in enumerate(cut):
                _, x, y = batch(index)
                recorder.batch(index, x, y)
                model.require_backward_grad_sync = n == len(cut) - 1
                (losses(model, x, y).mean() / len(cut)).backward()
            nn.utils.clip_grad_norm_(model.parameters(), clip)
            recorder.step()
        assert recorder.steps == STEPS


def refusals(model: Any, rank: int, folder: Path) -> dict[str, str]:
    """What each rank is told where something is wrong on one of them, or all; a step that was refused can be made anew."""
    said = {}

    def note(name: str, made: Any) -> None:
        try:
            made()
        except (ValueError, errors.AttribError) as error:
            said[name] = str(error)

    normed = nn.parallel.DistributedDataParallel(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).double())
    optimizer = torch.optim.SGD(normed.parameters(), 0.1)
    note("batch norm", lambda: attrib.record(optimizer, normed, losses, folder / "none"))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    note("resumed", lambda: attrib.record(optimizer, model, losses, folder / "none", resume=True))
    early = attrib.record(torch.optim.SGD(model.parameters(), 0.1), model.module, losses, folder / "none")
    note("recorded too early", lambda: losses(model, *batch(rows(0, rank))[1:]))
    early.close()
    recorder = attrib.record(optimizer, model, losses, folder / "refused")
    for silent in (1, 0, None):
        recorder.zero_grad()
        index, x, y = batch(rows(0, rank))
        if rank != silent:
            recorder.batch(index, x, y)
        losses(model, x, y).mean().backward()
        note(f"rank {silent} is silent", recorder.step)
    recorder.close()
    return said


def work(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", rank=rank, world_size=2, init_method=f"file://{folder}/meeting")
    model = nn.parallel.DistributedDataParallel(net())
    trained(model, rank, folder / "run", check_every=1)
    torch.save(model.module.state_dict(), folder / f"state{rank}")
    torch.manual_seed(rank)  # of the ranks' dropout
    trained(nn.parallel.DistributedDataParallel(net(0.3)), rank, folder / "hard", clip=0.2, parts=2, check_every=1)
    torch.save(refusals(model, rank, folder), folder / f"said{rank}")
    dist.destroy_process_group()


def account(store: Path, drop: float = 0.0) -> attrib.Result:
    run, model = attrib.open_run(store), net(drop).eval()
    run.load(model, run.steps)
    _, x, y = batch(torch.arange(2))
    return attrib.attribute(run, model, attrib.measure.log_prob(x, y), loss=losses, progress=False)


@pytest.mark.slow  # two processes, each of which loads torch
def test_two_processes_are_one_run_and_each_is_told_of_the_others_errors(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(work, (tmp_path,), 2)
    assert all(map(torch.equal, *(torch.load(tmp_path / f"state{n}").values() for n in (0, 1))))
    result = account(tmp_path / "run")
    result.check(1e-10)

    model = net()  # one process, on the batches of both
    with attrib.record(torch.optim.AdamW(model.parameters(), 0.05), model, losses, tmp_path / "one") as recorder:
        for step in range(STEPS):
            recorder.zero_grad()
            index, x, y = batch(torch.cat([rows(step, 0), rows(step, 1)]))
            losses(model, x, y).mean().backward()
            recorder.step(index, x, y)
    one = account(tmp_path / "one")
    assert result.dataset.sizes == one.dataset.sizes
    # the mean of two means is rounded otherwise than that of all: 1e-16 of p.grad, times Adam's first steps, 1 / |g|
    for axes in (("step", "example"), ("step", "group")):
        np.testing.assert_allclose(result.by(*axes), one.by(*axes), rtol=1e-9, atol=1e-12)

    account(tmp_path / "hard", 0.3).check(1e-10)
    hard = attrib.open_run(tmp_path / "hard")
    assert [len(p) for p in map(hard.passes, range(STEPS))] == [4] * STEPS
    for rank in (0, 1):
        said = torch.load(tmp_path / f"said{rank}")
        assert said.keys() == SAID.keys()
        assert all(SAID[name] in said[name] for name in SAID), said
        assert ("rank" in said["rank 1 is silent"], "rank" in said["rank 0 is silent"]) == (rank == 0, rank == 1)
    assert attrib.open_run(tmp_path / "refused").steps == 1


def test_parameters_that_are_sharded_are_refused() -> None:
    class DTensor(nn.Parameter):
        """As torch's own is called."""

    model = nn.Linear(2, 2)
    model.weight = DTensor(torch.ones(2, 2))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(ValueError, match=r"fully sharded training is not recorded.*'weight'.*DistributedDataParallel"):
        attrib.record(optimizer, model, losses, "none.zarr")
