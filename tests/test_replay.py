"""A run trained again from a recorded step is the same run, bit for bit."""

from pathlib import Path

import pytest
import torch
from cases import MODELS, OPTIMIZERS, SORTS, crossed, few_first
from torch import nn
from training import train
from zarr.storage import MemoryStore

import attrib
from attrib import errors

WAYS = ([3, 8, 0], [torch.float64, torch.float32])


class Dropped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.drop, self.second = nn.Linear(4, 9), nn.Dropout(0.4), nn.Linear(9, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.drop(torch.relu(self.first(x))))


@pytest.mark.parametrize(("optimizer", "start", "dtype"), few_first(OPTIMIZERS, *WAYS, few=SORTS))
def test_untouched_replay_is_the_run_bit_for_bit(optimizer: str, start: int, dtype: torch.dtype) -> None:
    trained = train(MemoryStore(), OPTIMIZERS[optimizer], dtype=dtype, steps=9, block=4)
    before = [p.detach().clone() for p in trained.model.parameters()]
    again = attrib.replay(trained.run, start, model=trained.model, loss=trained.case.loss, store=MemoryStore())
    assert again.steps == 9 - start
    for step in range(start, 10):
        assert torch.equal(again.vector(step - start), trained.run.vector(step)), step
    assert all(torch.equal(p, q) for p, q in zip(trained.model.parameters(), before, strict=True))


@pytest.mark.parametrize(("kind", "states_every"), crossed(["sgd momentum", "adamw"], [1, 4]))
def test_dropout_batches_and_schedules_are_drawn_again(kind: str, states_every: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x, y = Dropped(), torch.randn(20, 4), torch.randint(0, 3, (20,))
    optimizer = OPTIMIZERS[kind](list(model.parameters()))
    loss = MODELS["mlp"].loss
    with attrib.record(optimizer, model, loss, tmp_path / "run", block=4, states_every=states_every) as recorder:
        schedule = torch.optim.lr_scheduler.ExponentialLR(recorder, 0.9)
        for _ in range(11):
            index = torch.randperm(20)[:6]
            recorder.zero_grad()
            loss(model, x[index], y[index]).mean().backward()
            recorder.step(index, x[index], y[index])
            schedule.step()
    run = attrib.open_run(tmp_path / "run")
    model.eval()  # the recorded modes count
    state = torch.get_rng_state()
    for start in (0, 5, 10):
        again = attrib.replay(run, start, model=model, loss=loss, store=tmp_path / f"again{start}", progress=False)
        for step in range(start, 12):
            assert torch.equal(again.vector(step - start), run.vector(step)), (start, step)
        assert again.header["replay"] == {
            "run": str(tmp_path / "run"),
            "start": start,
            "origin": start,
            "interventions": [],
            "weighted": False,
        }
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.training
    part = attrib.replay(run, 2, model=model, loss=loss, store=tmp_path / "part", until=7)
    assert part.steps == 5
    result = attrib.attribute(part, model, attrib.measure.log_prob(x[:2], y[:2]), loss=loss)
    result.check(1e-5)


def test_random_numbers_beyond_the_record_are_the_runs_own(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x, y, loss = torch.randn(8, 4), torch.randint(0, 3, (8,)), MODELS["mlp"].loss
    runs = {}
    for steps in (3, 7):  # the same training, recorded for three steps and for seven
        torch.manual_seed(1)
        model = Dropped()
        with attrib.record(
            OPTIMIZERS["adamw"](list(model.parameters())), model, loss, tmp_path / f"{steps}"
        ) as recorder:
            for _ in range(steps):
                recorder.zero_grad()
                loss(model, x, y).mean().backward()
                recorder.step(torch.arange(8), x, y)
        runs[steps] = attrib.open_run(tmp_path / f"{steps}")
    again = attrib.replay(runs[3], 1, model=model, loss=loss, until=7, store=tmp_path / "again")
    for step in range(1, 8):
        assert torch.equal(again.vector(step - 1), runs[7].vector(step)), step
    ends = []
    for seed in (1, 2):  # from the end of the record on, whatever the caller's generator
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        for _, trained in attrib.retrain(runs[3], 3, model=model, loss=loss, until=6):
            trained.eval()  # looking on does not change what is trained
        ends.append(torch.cat([p.detach().reshape(-1) for p in trained.parameters()]))
        assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(*ends)
    drawn = attrib.replay(runs[3], 3, model=model, loss=loss, until=6, store=tmp_path / "end").vector(3)
    assert torch.equal(drawn, ends[0])


def test_clipping_is_the_users_to_say(tmp_path: Path) -> None:
    trained = train(tmp_path / "run", OPTIMIZERS["adamw"], clip=0.1)
    arguments = {"model": trained.model, "loss": trained.case.loss}
    with pytest.raises(errors.ReplayError, match="Pass backward="):
        attrib.replay(trained.run, 1, store=tmp_path / "again", **arguments)
    assert not (tmp_path / "again").exists()

    def clipped(losses: torch.Tensor, model: nn.Module) -> None:
        losses.mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)

    again = attrib.replay(trained.run, 1, store=tmp_path / "again", backward=clipped, **arguments)
    assert torch.equal(again.vector(5), trained.run.vector(6))


@pytest.mark.parametrize(("start", "until"), [(-1, 3), (6, 6), (4, 2), (0, 7)])
def test_steps_outside_the_run_are_refused(start: int, until: int, tmp_path: Path) -> None:
    trained = train(tmp_path / "run", OPTIMIZERS["sgd"])
    with pytest.raises(errors.ReplayError, match="<= 6"):
        attrib.replay(
            trained.run, start, until=until, model=trained.model, loss=trained.case.loss, store=tmp_path / "again"
        )
    assert not (tmp_path / "again").exists()


def test_run_is_not_replayed_into_itself(tmp_path: Path) -> None:
    trained = train(tmp_path / "run", OPTIMIZERS["sgd"])
    with pytest.raises(errors.ReplayError, match="into itself"):
        attrib.replay(
            trained.run, model=trained.model, loss=trained.case.loss, store=str(tmp_path / "run"), overwrite=True
        )
    assert attrib.open_run(tmp_path / "run").steps == 6


def test_another_version_is_said(caplog: pytest.LogCaptureFixture) -> None:
    trained = train(MemoryStore(), OPTIMIZERS["sgd"])
    trained.run.header["versions"]["torch"] = "1.0"
    attrib.replay(trained.run, 3, model=trained.model, loss=trained.case.loss, store=MemoryStore())
    assert "recorded with torch 1.0" in caplog.text
