"""Loops as they are: parts that stand still, several optimizers, averages, losses that anneal."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zarr.storage import MemoryStore

import attrib
from attrib import errors


def data(step: int, size: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(size, 4, generator=generator, dtype=torch.float64)
    return torch.arange(size) + size * step, x, torch.randint(0, 3, (size,), generator=generator)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 9), nn.Tanh(), nn.Linear(9, 3)).double()


def cross_entropy(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y, reduction="none")


def explain(store: Any, model: nn.Module, loss: Any, measurement: Any = None, **options: Any) -> attrib.Result:
    _, x, y = data(999, 3)
    measurement = measurement or attrib.measure.log_prob(x, y)
    return attrib.attribute(attrib.open_run(store), model, measurement, loss=loss, progress=False, **options)


# two networks against each other


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.maker = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 4))
        self.judge = nn.Sequential(nn.Linear(4, 8), nn.LeakyReLU(0.2), nn.Linear(8, 1))

    def forward(self, noise: Tensor) -> Tensor:
        return self.judge(self.maker(noise)).flatten()


def rivalry(model: Pair, x: Tensor, noise: Tensor, turn: str) -> Tensor:
    if turn == "maker":
        return F.softplus(-model(noise))
    return F.softplus(-model.judge(x).flatten()) + F.softplus(model.judge(model.maker(noise).detach()).flatten())


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=0.02, betas=(0.5, 0.9))


@pytest.mark.parametrize("capture", ["replay", "gradients"])
def test_two_networks_against_each_other_are_one_run(capture: str) -> None:
    """What stands still in a turn has no gradient, so that its optimizer leaves it and its momentum alone."""
    model, store = Pair().double(), MemoryStore()
    with attrib.record(
        [adam(model.maker), adam(model.judge)], model, rivalry, store, capture, check_every=3
    ) as recorder:
        for step in range(10):
            index, x, _ = data(step)
            noise, turn = x[:, :2] * 0.7 + 0.1, ("judge", "maker")[step % 2]
            recorder.zero_grad()
            recorder.batch(index, x, noise, turn)
            rivalry(model, x, noise, turn).mean().backward()
            for p in (model.maker if turn == "judge" else model.judge).parameters():
                p.grad = None
            recorder.step()
    run = attrib.open_run(store)
    for step in range(10):
        moved = {n for n, p in run.parameters(step).items() if not torch.equal(p, run.parameters(step + 1)[n])}
        assert {name.split(".")[0] for name in moved} == {("judge", "maker")[step % 2]}
    noise = data(77)[1][:3, :2]
    result = explain(store, model, rivalry, lambda m: m(noise))
    result.check(1e-10)
    by_group = result.by("step", "group").values
    assert abs(by_group[:, 0::2, :4]).max() == 0.0  # the judge's turn asks nothing of the maker
    assert abs(by_group[:, 1:8:2, :4]).max() > 0.0


def test_two_recorders_on_one_model_are_refused_with_the_way_out(tmp_path: Path) -> None:
    model = Pair().double()
    recorders = {
        name: attrib.record(adam(getattr(model, name)), model, rivalry, tmp_path / name) for name in ("judge", "maker")
    }
    index, x, _ = data(0)

    def take(turn: str) -> None:
        recorders[turn].zero_grad()
        rivalry(model, x, x[:, :2], turn).mean().backward()
        recorders[turn].step(index, x, x[:, :2], turn)

    take("judge")
    with pytest.raises(errors.ChangedOutsideError, match=r"does not move.*'judge\.0\.weight'.*record\(\[one, other\]"):
        take("maker")


# parts that move later


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("capture", ["replay", "gradients"])
def test_a_part_may_be_frozen_and_unfrozen(capture: str, clip: bool) -> None:
    model, store = net(), MemoryStore()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    model[0].requires_grad_(False)
    with attrib.record(optimizer, model, cross_entropy, store, capture, check_every=4) as recorder:
        for step in range(9):
            model[0].requires_grad_(3 <= step < 7)
            index, x, y = data(step)
            recorder.zero_grad()
            cross_entropy(model, x, y).mean().backward()
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), 0.01)
            recorder.step(index, x, y)
    result = explain(store, model, cross_entropy)
    result.check(1e-10)
    of_first = result.by("step", "group").values[..., 0]
    assert [bool(abs(of_first[:, step]).max() > 0) for step in range(9)] == [3 <= step < 7 for step in range(9)]


def test_factors_are_those_of_the_first_step() -> None:
    """They have the form of the first; what begins to move later has none."""
    model, (index, x, y) = net(), data(0)
    model[0].requires_grad_(False)
    recorder = attrib.record(torch.optim.SGD(model.parameters()), model, cross_entropy, MemoryStore(), "factors")
    for step in range(2):
        recorder.zero_grad()
        cross_entropy(model, x, y).mean().backward()
        with pytest.raises(errors.LossError, match=r"'0.weight'.*capture=\"replay\"") if step else nullcontext():
            recorder.step(index, x, y)
        model[0].requires_grad_(True)


def test_a_new_group_in_mid_run_is_refused_with_what_to_do() -> None:
    model = net()
    recorder = attrib.record(torch.optim.AdamW(model[0].parameters()), model, cross_entropy, MemoryStore())
    with pytest.raises(errors.AttribError, match=r"requires_grad_\(False\)"):
        recorder.add_param_group({"params": model[2].parameters()})


# weights that anneal


@pytest.mark.parametrize("capture", ["replay", "factors", "gradients"])
def test_a_weight_may_anneal_from_step_to_step(capture: str) -> None:
    def loss(model: nn.Module, x: Tensor, y: Tensor, beta: float) -> Tensor:
        z = model[0](x)
        return F.cross_entropy(model[2](z.tanh()), y, reduction="none") + beta * z.square().sum(1)

    model, store = net(), MemoryStore()
    with attrib.record(torch.optim.AdamW(model.parameters(), lr=0.02), model, loss, store, capture) as recorder:
        for step in range(8):
            index, x, y = data(step)
            recorder.zero_grad()
            loss(model, x, y, 0.5 * 0.8**step).mean().backward()
            recorder.step(index, x, y, 0.5 * 0.8**step)
    explain(store, model, loss).check(1e-10)
    run = attrib.open_run(store)
    assert [run.batch(step)[2] for step in range(8)] == [0.5 * 0.8**step for step in range(8)]


# averages


@pytest.mark.parametrize("kind", ["ema", "swa"])
def test_the_averaged_copy_is_the_measured_model(kind: str) -> None:
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    model, store = net(), MemoryStore()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9) if kind == "ema" else None)
    with attrib.record(torch.optim.SGD(model.parameters(), lr=0.3), model, cross_entropy, store) as recorder:
        for step in range(12):
            index, x, y = data(step)
            recorder.zero_grad()
            cross_entropy(model, x, y).mean().backward()
            recorder.step(index, x, y)
            if kind == "ema" or (step >= 5 and (step - 5) % 2 == 0):
                average.update_parameters(model)
    kinds = {"ema": attrib.measure.Ema(0.9), "swa": attrib.measure.Swa(start=6, every=2)}
    _, x, y = data(999, 3)
    measurement = attrib.measure.averaged(attrib.measure.log_prob(x, y), kinds[kind])
    result = explain(store, average.module, cross_entropy, measurement)
    result.check(1e-10)
    wanted = F.log_softmax(average.module(x), 1)[torch.arange(3), y].detach()
    torch.testing.assert_close(torch.from_numpy(result.final.values), wanted, atol=1e-12, rtol=0)
