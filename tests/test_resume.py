"""A run that ended early and was gone on with is the uninterrupted one, bit for bit."""

import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import MODELS, OPTIMIZERS, SORTS, Optimizers, few_first
from torch import nn
from training import assert_same_arrays

import attrib
from attrib import errors
from attrib.checks.intake import CAPTURES

LOSS = MODELS["mlp"].loss
STEPS, EXAMPLES = 14, 24


class Interrupted(Exception):
    """The machine is gone."""


def build(width: int = 6) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Dropout(0.3), nn.Linear(width, 3)).double()


def loop(
    store: Any,
    optimizer: Callable[[list[nn.Parameter]], Optimizers] = OPTIMIZERS["adamw"],
    stop_at: int | None = None,
    model: nn.Module | None = None,
    check: Callable[[attrib.Recorder, nn.Module], None] = lambda recorder, model: None,
    **options: Any,
) -> attrib.Recorder:
    """A loop with dropout, a schedule, clipping and a shuffled set; it ends early by an exception after `stop_at` steps."""
    model = build() if model is None else model
    inner = optimizer(list(model.parameters()))
    g = torch.Generator().manual_seed(1)
    x, y = torch.randn(EXAMPLES, 4, generator=g).double(), torch.randint(0, 3, (EXAMPLES,), generator=g)
    batches = [torch.randperm(EXAMPLES, generator=g)[: 4 + n % 3] for n in range(STEPS)]
    single = inner if isinstance(inner, list) else [inner]
    schedules = [torch.optim.lr_scheduler.ExponentialLR(one, 0.9) for one in single]
    torch.manual_seed(5)
    recorder = attrib.record(inner, model, LOSS, store, **{"block": 4, **options})
    check(recorder, model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch's, that the schedule moves before the optimizer
        for schedule in schedules * recorder.steps:
            schedule.step()
    with recorder:
        for n in range(recorder.steps, STEPS):
            if n == stop_at:
                raise Interrupted
            recorder.zero_grad()
            LOSS(model, x[batches[n]], y[batches[n]]).mean().backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            recorder.step(batches[n], x[batches[n]], y[batches[n]])
            for schedule in schedules:
                schedule.step()
    return recorder


def ended_early(store: Any, steps: int, killed: bool = False, **options: Any) -> None:
    """killed: with what was committed only, as SIGKILL leaves it."""
    held: list[attrib.Recorder] = []

    def hold(recorder: attrib.Recorder, model: nn.Module) -> None:
        held.append(recorder)
        if killed:
            recorder._finish = lambda complete: None  # type: ignore[method-assign]

    with pytest.raises(Interrupted):
        loop(store, stop_at=steps, check=hold, **options)
    if killed:
        held[0]._writer._collect(wait=True)
        held[0]._writer.release()


CASES = few_first(OPTIMIZERS, CAPTURES, (1, 8), (4, 5, 7, 8, 11), (False, True), few=SORTS)


@pytest.mark.parametrize(("name", "capture", "states_every", "steps", "killed"), CASES)
def test_resumed_run_is_the_uninterrupted_one(
    name: str, capture: str, states_every: int, steps: int, killed: bool, tmp_path: Path
) -> None:
    options = {"optimizer": OPTIMIZERS[name], "capture": capture, "states_every": states_every}
    loop(tmp_path / "whole", **options)
    ended_early(tmp_path / "run", steps, killed, **options)
    loop(tmp_path / "run", resume=True, **options)
    whole, run = (attrib.open_run(tmp_path / name) for name in ("whole", "run"))
    assert run.complete
    assert_same_arrays(run, whole, numbering=False)
    assert attrib.verify(run, progress=False).failure is None


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> attrib.Run:
    """As nobody interrupted it, to be read."""
    store = tmp_path_factory.mktemp("resume") / "whole"
    loop(store)
    return attrib.open_run(store)


def test_resumed_twice_and_at_once(whole: attrib.Run, tmp_path: Path) -> None:
    """Ended before the next commit, and with no step in between."""
    ended_early(tmp_path / "run", 5)
    ended_early(tmp_path / "run", 5, resume=True)
    ended_early(tmp_path / "run", 6, killed=True, resume=True)
    assert attrib.open_run(tmp_path / "run").steps == 5
    ended_early(tmp_path / "run", 9, resume=True)
    loop(tmp_path / "run", resume=True)
    assert_same_arrays(attrib.open_run(tmp_path / "run"), whole, numbering=False)


def test_resume_puts_the_users_objects_to_the_last_step(tmp_path: Path) -> None:
    """Parameters and accumulators; not the learning rate, which is the schedule's."""
    ended_early(tmp_path / "run", 6)
    run = attrib.open_run(tmp_path / "run")

    def check(recorder: attrib.Recorder, model: nn.Module) -> None:
        assert recorder.steps == 6
        assert torch.equal(torch.cat([p.flatten() for p in model.parameters()]), run.vector(6))
        again = run.optimizer(build(), 6)
        for state, expected in zip(recorder.state.values(), again.state.values(), strict=True):
            for key, value in state.items():
                assert torch.equal(value, expected[key]), key
        assert recorder.param_groups[0]["lr"] == 1e-2
        assert all(p.grad is None for p in model.parameters())

    assert run.options["lr"][0] < 1e-2
    loop(tmp_path / "run", check=check, resume=True)


def test_resume_begins_a_run_that_is_not_there(whole: attrib.Run, tmp_path: Path) -> None:
    assert loop(tmp_path / "run", resume=True).steps == STEPS
    assert_same_arrays(attrib.open_run(tmp_path / "run"), whole)


def test_resume_begins_a_run_that_was_killed_before_its_first_commit(whole: attrib.Run, tmp_path: Path) -> None:
    ended_early(tmp_path / "run", 2, killed=True)
    loop(tmp_path / "run", resume=True)
    assert_same_arrays(attrib.open_run(tmp_path / "run"), whole)


def frozen() -> nn.Module:
    model = build()
    model.register_buffer("shift", torch.ones(2))
    return model


REFUSED = {
    "another width": (
        errors.ModelMismatchError,
        r"of shape \[7, 4\] '0.weight', expected \[6, 4\]",
        {"model": lambda: build(7)},
    ),
    "a buffer more": (errors.ModelMismatchError, "parameter .shift., expected none", {"model": frozen}),
    "another optimizer": (errors.ResumeError, "the optimizer SGD, expected AdamW", {"optimizer": OPTIMIZERS["sgd"]}),
    "another option": (
        errors.ResumeError,
        "weight_decay 0.1, expected 0.5",
        {"optimizer": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, betas=(0.9, 0.98))},
    ),
    "another capture": (errors.ResumeError, "capture= gradients, expected replay", {"capture": "gradients"}),
    "another block": (errors.ResumeError, "'block': 3", {"block": 3}),
    "few states": (errors.ResumeError, "'states_every': 4", {"states_every": 4}),
    "a penalty": (errors.ResumeError, "'penalty': True", {"penalty": lambda m: m[0].weight.square().sum()}),
    "both": (ValueError, "replaced or gone on with", {"overwrite": True}),
}


@pytest.mark.parametrize("case", REFUSED)
def test_run_of_another_loop_is_not_gone_on_with(case: str, whole: attrib.Run, tmp_path: Path) -> None:
    """And it is left as it was."""
    kind, text, options = REFUSED[case]
    ended_early(tmp_path / "run", 6)
    model = options.get("model", build)()  # type: ignore[operator]
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(kind, match=text):
        loop(tmp_path / "run", **{**options, "model": model, "resume": True})  # type: ignore[arg-type]
    assert all(map(torch.equal, before, model.parameters()))
    loop(tmp_path / "run", resume=True)
    assert_same_arrays(attrib.open_run(tmp_path / "run"), whole, numbering=False)


def test_complete_run_is_not_gone_on_with(tmp_path: Path) -> None:
    loop(tmp_path / "run")
    with pytest.raises(errors.ResumeError, match="the run is complete: got one of 14 steps"):
        loop(tmp_path / "run", resume=True)
    assert attrib.open_run(tmp_path / "run").complete


def test_optimizer_that_comes_to_other_bits_does_not_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As another machine's might: parameters and optimizer stay as they were."""
    ended_early(tmp_path / "run", 7)
    model = build()
    before = [p.clone() for p in model.parameters()]
    real = torch.optim.AdamW.step

    def step(self: Any, closure: Any = None) -> None:
        real(self, closure)
        with torch.no_grad():
            p = self.param_groups[0]["params"][0]
            p.copy_(torch.nextafter(p, torch.ones_like(p)))

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    with pytest.raises(errors.StoreError, match=r"other bits than the stored state, at step 4"):
        loop(tmp_path / "run", model=model, resume=True)
    assert all(map(torch.equal, before, model.parameters()))


def test_resumed_model_in_another_mode_is_refused(tmp_path: Path) -> None:
    ended_early(tmp_path / "run", 6)
    with pytest.raises(errors.ChangedOutsideError, match="train and eval mode"):
        loop(tmp_path / "run", model=build().eval(), resume=True)


def test_replays_of_a_resume_call_no_hook_of_the_user(tmp_path: Path) -> None:
    ended_early(tmp_path / "run", 6)
    heard: list[int] = []

    def hooked(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        optimizer = OPTIMIZERS["adamw"](parameters)
        optimizer.register_step_post_hook(lambda *_: heard.append(1))
        return optimizer

    loop(tmp_path / "run", hooked, resume=True)
    assert len(heard) == STEPS - 6


def test_ledger_of_a_resumed_run_has_nothing_inherited(tmp_path: Path) -> None:
    ended_early(tmp_path / "run", 6)
    loop(tmp_path / "run", resume=True)
    run = attrib.open_run(tmp_path / "run")
    model = build().eval()
    run.load(model, run.steps)
    x, y = torch.randn(2, 4).double(), torch.tensor([0, 1])
    result = attrib.attribute(run, model, attrib.measure.log_prob(x, y), loss=LOSS, progress=False)
    result.check(1e-10)
    assert not np.any(result.inherited)


def test_what_batches_share_is_read_back_after_commits_within_a_block_and_after_going_on(tmp_path: Path) -> None:
    def loss(model: nn.Module, x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return LOSS(model, x, y) * weight

    for stop in (5, STEPS):  # a weight of its own at every step, so many rows of its table; each commit begins a chunk
        model = build()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        torch.manual_seed(5)
        recorder = attrib.record(optimizer, model, loss, tmp_path / "run.zarr", resume=stop == STEPS)
        with suppress(Interrupted), recorder:
            for n in range(recorder.steps, stop):
                weight = torch.tensor(1.0 + n).double()
                batch = torch.arange(4), torch.ones(4, 4).double(), torch.tensor([0, 1, 2, 0]), weight
                recorder.zero_grad()
                loss(model, *batch[1:]).sum().backward()
                recorder.step(*batch)
                recorder.flush()
                assert attrib.open_run(tmp_path / "run.zarr").reader.header["written_steps"] == n + 1
            if stop < STEPS:
                raise Interrupted
    run = attrib.open_run(tmp_path / "run.zarr")
    assert [float(run.batch(step)[2]) for step in range(run.steps)] == [1.0 + n for n in range(STEPS)]
