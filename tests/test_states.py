"""`states_every`: fewer states stored, the same run read."""

import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import FEW, OPTIMIZERS, SORTS, crossed, few_first
from training import Trained, flat, rewritten, train
from zarr.storage import MemoryStore

import attrib
from attrib.cli import main
from attrib.errors import StepIdentityError, StoreError
from attrib.optim import Rerun

STEPS, DTYPES = 11, (torch.float32, torch.float64)


slow = partial(pytest.param, marks=pytest.mark.slow)


def bits(trained: Trained) -> list[np.ndarray]:
    return [trained.run.vector(step).numpy() for step in range(trained.run.steps + 1)]


DECAYING = {"steps": STEPS, "scheduler": lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.9)}


@pytest.mark.parametrize(("optimizer", "dtype"), few_first(OPTIMIZERS, DTYPES, few=SORTS))
def test_states_between_key_frames_are_those_of_the_run_bit_for_bit(optimizer: str, dtype: torch.dtype) -> None:
    few = train(MemoryStore(), OPTIMIZERS[optimizer], states_every=8, dtype=dtype, **DECAYING)
    assert few.run.reader.array("theta").shape[0] == 3  # steps 0, 8 and the end
    for step, theta in enumerate(few.thetas):
        few.run.load(few.model, step)
        np.testing.assert_array_equal(flat(few.model), theta)


# with no accumulator, with one, with three, and then each rule: blocks are made again by the states above
KINDS = ("sgd", "sgd groups", "adamw amsgrad", "muon + sgd + adafactor")


@pytest.mark.parametrize(("optimizer", "dtype"), few_first(list(dict.fromkeys([*KINDS, *FEW])), DTYPES, few=KINDS[1:3]))
def test_a_result_of_few_states_is_that_of_all(optimizer: str, dtype: torch.dtype) -> None:
    whole = train(MemoryStore(), OPTIMIZERS[optimizer], dtype=dtype, **DECAYING)
    few = train(MemoryStore(), OPTIMIZERS[optimizer], states_every=8, dtype=dtype, **DECAYING)
    assert whole.run.reader.array("theta").shape[0] == STEPS + 1
    mine, other = few.attribute(), whole.attribute()
    for name in mine.dataset.data_vars:  # the same numbers in the same order: nothing to round differently
        np.testing.assert_array_equal(mine.dataset[name], other.dataset[name], err_msg=str(name))


@pytest.mark.parametrize(
    ("every", "block", "stored"), [(3, 4, 3), (5, 4, 8), (7, 1, 7), *(slow(n, 4, n) for n in (2, 4, 100))]
)
def test_key_frames_stand_on_whole_blocks(every: int, block: int, stored: int) -> None:
    trained = train(MemoryStore(), OPTIMIZERS["adamw"], steps=STEPS, states_every=every, block=block)
    assert trained.run.header["states_every"] == stored
    assert trained.run.reader.array("theta").shape[0] == -(-STEPS // stored) + 1
    for step in (10, 3, 0, 7, 11, 5):  # in no order
        trained.run.load(trained.model, step)
        np.testing.assert_array_equal(flat(trained.model), trained.thetas[step])
    trained.attribute(steps=slice(2, 9)).check(1e-10)


def test_more_states_than_are_kept_between_key_frames_are_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attrib.trajectory.KEPT", 2)
    trained = train(MemoryStore(), OPTIMIZERS["adam amsgrad"], steps=29, states_every=28, block=4)
    whole = train(MemoryStore(), OPTIMIZERS["adam amsgrad"], steps=29)
    for ours, theirs in zip(bits(trained), bits(whole), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(trained.attribute().by("example"), whole.attribute().by("example"))


@pytest.mark.parametrize("capture", ["gradients", "factors"])
def test_stored_shares_go_with_fewer_states(capture: str) -> None:
    trained = train(MemoryStore(), OPTIMIZERS["adamw"], capture=capture, steps=STEPS, states_every=8)
    trained.attribute(loss=None).check(1e-10)


def test_killed_run_reads_every_step_of_its_whole_blocks(tmp_path: Path) -> None:
    trained = train(tmp_path / "run", OPTIMIZERS["adamw"], steps=STEPS, states_every=8, close=False)
    deadline = time.monotonic() + 20  # the second block may still be on its way
    while (run := attrib.open_run(tmp_path / "run")).steps < 8 and time.monotonic() < deadline:
        time.sleep(0.05)
    trained = trained._replace(run=run)
    assert run.steps == 8
    assert not run.complete
    trained.run.load(trained.model, 8)
    np.testing.assert_array_equal(flat(trained.model), trained.thetas[8])
    trained.attribute().check(1e-10)


def test_verify_reads_a_run_with_few_states(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tmp_path / "run", OPTIMIZERS["adamw"], steps=STEPS, states_every=8)
    assert main(["verify", str(tmp_path / "run")]) == 0
    assert "11 steps" in capsys.readouterr().out


@pytest.mark.parametrize("row", [1, 2], ids=["key frame", "final state"])
def test_states_that_come_out_different_are_refused(
    row: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tmp_path / "run", OPTIMIZERS["adamw"], steps=STEPS, states_every=8)
    with rewritten(tmp_path / "run", "theta") as theta:
        theta[row, 3] = np.nextafter(theta[row, 3], 1e9)  # the last bit
    run = attrib.open_run(tmp_path / "run")
    with pytest.raises(StoreError, match=rf"other bits than the stored state, at step {(8, 11)[row - 1]}"):
        _ = [steps.theta for steps in run.blocks(0, STEPS, backwards=False)]
    assert main(["verify", str(tmp_path / "run")]) == 1
    assert "other bits" in capsys.readouterr().out


def test_optimizer_that_cannot_be_run_again_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    again = Rerun.step
    monkeypatch.setattr(Rerun, "step", lambda self, h, g: torch.nextafter(again(self, h, g), torch.ones(())))
    with pytest.raises(StepIdentityError, match="record with states_every=1"):
        train(tmp_path / "run", OPTIMIZERS["adamw"], dtype=torch.float32, states_every=4)
    assert not (tmp_path / "run").exists()
    train(tmp_path / "run", OPTIMIZERS["adamw"], dtype=torch.float32)


@pytest.mark.parametrize(("late", "every"), crossed((False, True), (1, 4)))
def test_options_that_are_tensors_stay_tensors_wherever_the_run_is_read(late: bool, every: int, tmp_path: Path) -> None:
    """Beside float64 parameters torch's float32 scalars are off by 6e-8 from numbers: all below is at 1e-10, or bits."""

    def schedule(recorder: attrib.Recorder) -> object:
        return torch.optim.lr_scheduler.LambdaLR(
            recorder, lambda step: torch.tensor(0.7) if late and step == 2 else 1.0
        )

    def optimizer(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=0.1 if late else torch.tensor(0.0123), weight_decay=0.3)

    trained = train(tmp_path / "run", optimizer, states_every=every, scheduler=schedule, check_every=1)
    run = trained.run
    for step, theta in enumerate(trained.thetas):
        run.load(trained.model, step)
        np.testing.assert_array_equal(flat(trained.model), theta)
    found = attrib.verify(run, progress=False)
    assert found.failure is None
    assert found.identities["step"][1] <= 1e-10
    assert np.nanmax(run.log("step_identity")) <= 1e-10
    trained.attribute().check(1e-10)
    again = attrib.replay(run, 1, model=trained.model, loss=trained.case.loss, store=tmp_path / "again")
    assert torch.equal(again.vector(again.steps), run.vector(run.steps))
    assert type(run.optimizer(trained.model, 2).param_groups[0]["lr"]) is torch.Tensor
    low, high = run.options["lr"]
    assert (low, high) == pytest.approx((0.07, 0.1) if late else (0.0123, 0.0123))
    assert type(low) is type(high) is float


@pytest.mark.parametrize("value", [0, -3, 2.5, "many"])
def test_states_every_is_a_count(value: object, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="states_every is not a count"):
        train(tmp_path / "run", OPTIMIZERS["sgd"], states_every=value)
    assert not (tmp_path / "run").exists()
