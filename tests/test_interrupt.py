"""Ctrl-C in long work leaves what was done, whole."""

import signal
import threading
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from cases import MODELS, OPTIMIZERS
from training import Trained, train

import attrib
from attrib import errors
from attrib.account import Account
from attrib.cli import main
from attrib.interrupt import interruptible, shielded
from attrib.tally import Tally


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return train(tmp_path_factory.mktemp("interrupt") / "run", OPTIMIZERS["sgd nesterov decay"], steps=11, block=3)


@pytest.fixture
def press(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """press(n, times): the user presses Ctrl-C while the n-th group of steps is summed."""

    def arrange(n: int, times: int = 1) -> None:
        calls, tallies = [0], Account.tallies

        def pressed(self: Account, *args: Any) -> list[Tally]:
            calls[0] += 1
            for _ in range(times if calls[0] == n else 0):
                signal.raise_signal(signal.SIGINT)
            return tallies(self, *args)

        monkeypatch.setattr(Account, "tallies", pressed)

    return arrange


@pytest.mark.parametrize("at_once", [1, 2, 64])
def test_ctrl_c_leaves_a_complete_window(
    at_once: int, trained: Trained, press: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the start of a block, and within one, where momentum has moved since it was stored."""
    monkeypatch.setattr("attrib.path.measured.Measured.steps_at_once", lambda self: at_once)
    before = {name: p.detach().clone() for name, p in trained.model.named_parameters()}
    press(2)
    with pytest.raises(errors.Interrupted, match="complete by themselves") as stopped:
        trained.attribute()
    result = stopped.value.result
    first, last = result.dataset.attrs["window"]
    assert 0 < first < last == 11
    result.check(1e-10)
    assert float(abs(result.inherited).max()) > 0  # momentum from before the window
    press(0)
    window = trained.attribute(steps=slice(first, None))
    for name in set(window.dataset.data_vars) - {"split_identity", "limit_identity"}:  # checked at steps of their own
        np.testing.assert_allclose(
            result.dataset[name], window.dataset[name], rtol=1e-10, atol=1e-13, err_msg=str(name)
        )
    assert list(result.dataset["step"].values) == list(range(first, 11))
    for name, p in trained.model.named_parameters():
        assert torch.equal(p, before[name])


def test_ctrl_c_leaves_the_queries_that_were_done(
    trained: Trained, press: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = trained.attribute(trained.measurement(7))
    module = import_module("attrib.attribute")
    divided = module._divided
    monkeypatch.setattr(module, "_divided", lambda *a: replace(divided(*a), at_once=2))
    press(5)  # of four groups of steps a sweep: in the second sweep
    with pytest.raises(errors.Interrupted, match="2 of 7 queries") as stopped:
        trained.attribute(trained.measurement(7))
    result = stopped.value.result
    assert result.dataset.attrs["window"] == [0, 11]
    np.testing.assert_allclose(result.by("example"), whole.by("example")[:2], rtol=1e-10, atol=1e-13)
    result.check(1e-10)


def test_second_ctrl_c_stops_at_once(trained: Trained, press: Callable[..., None]) -> None:
    press(1, times=2)
    with pytest.raises(KeyboardInterrupt) as stopped:
        trained.attribute()
    assert not isinstance(stopped.value, errors.Interrupted)


def test_ctrl_c_means_what_it_did_before(trained: Trained) -> None:
    before = signal.getsignal(signal.SIGINT)
    trained.attribute()
    assert signal.getsignal(signal.SIGINT) is before


def test_step_that_was_made_is_recorded_before_ctrl_c_is_raised(tmp_path: Path) -> None:
    case = MODELS["mlp"]
    model = case.build()
    x, y = case.data(5)

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer.register_step_post_hook(lambda *_: signal.raise_signal(signal.SIGINT) if step == 2 else None)
    recorder = attrib.record(optimizer, model, case.loss, tmp_path / "run")
    for step in range(5):
        recorder.zero_grad()
        case.loss(model, x, y).mean().backward()
        if step == 2:
            with pytest.raises(KeyboardInterrupt):
                recorder.step(range(5), x, y)
        else:
            recorder.step(range(5), x, y)  # it goes on as if nothing had been
    recorder.close()
    run = attrib.open_run(tmp_path / "run")
    assert run.steps == 5
    attrib.attribute(run, model, attrib.measure.loss(x, y), loss=case.loss).check(1e-5)


def test_programs_own_handler_is_called_and_ignored_signals_stay_ignored() -> None:
    """A checkpoint on Ctrl-C, a job in the background."""
    called = []
    before = signal.signal(signal.SIGINT, lambda *_: called.append(True))
    try:
        with shielded():
            signal.raise_signal(signal.SIGINT)
            assert called == []
        assert called == [True]
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with shielded(), interruptible() as request:
            signal.raise_signal(signal.SIGINT)
        assert not request.asked
    finally:
        signal.signal(signal.SIGINT, before)


def test_other_threads_and_foreign_handlers_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def work() -> None:
        with interruptible() as request:
            seen.append(request.asked)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    monkeypatch.setattr(signal, "getsignal", lambda _: None)  # as where C code put its own
    work()
    assert seen == [False, False]


def test_cube_holds_the_steps_that_were_done(trained: Trained, press: Callable[..., None], tmp_path: Path) -> None:
    whole = trained.attribute().by("step", "example", "group")
    press(2)
    with pytest.raises(errors.Interrupted) as stopped:
        trained.attribute(cube=tmp_path / "cube")
    first, last = stopped.value.result.dataset.attrs["window"]
    cube = zarr.open_group(tmp_path / "cube", mode="r")
    assert cube.attrs["attrib"]["complete"] is False
    index, values = np.asarray(cube["index"]), np.asarray(cube["contribution"])
    assert (index[:first] == -1).all()
    for step in range(first, last):
        ids = index[step][index[step] >= 0]
        want = whole.sel(step=step, example=ids).values
        np.testing.assert_allclose(values[:, step, : len(ids)], want, rtol=1e-10, atol=1e-13)
        assert len(ids) > 0


def test_command_saves_what_was_done(
    tmp_path: Path, press: Callable[..., None], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tmp_path / "run", OPTIMIZERS["adamw"], steps=11, block=3)
    monkeypatch.syspath_prepend(Path(__file__).parent)
    press(2)
    out = tmp_path / "result"
    assert main(["attribute", str(tmp_path / "run"), "--setup", "setups:plain", "-o", str(out)]) == 130
    captured = capsys.readouterr().err
    assert str(out) in captured
    result = attrib.open_result(out)
    assert result.dataset.attrs["window"][0] > 0
    result.check(1e-10)
