"""The work of a sweep done by workers: the same account, whole or cut short, and errors that name what went wrong."""

import gc
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any
from weakref import WeakSet

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import xarray as xr
from cases import OPTIMIZERS, crossed
from torch import Tensor, nn
from training import Trained, train

import attrib
from attrib import errors
from attrib import executor as executors
from attrib.account import Account
from attrib.steps import Block
from attrib.trajectory import Trajectory


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.output = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(F.dropout(torch.tanh(self.hidden(x)), 0.3, self.training))


def noisy_loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y, reduction="none")


class Mortal:
    """A loss that kills the process that computes it, once, at the batch that begins with a certain number; never the
    test's own."""

    def __init__(self, mark: Path) -> None:
        self.mark, self.fatal, self.parent = mark, float("nan"), os.getpid()

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        if float(x[0, 0]) == self.fatal and os.getpid() != self.parent and not self.mark.exists():
            self.mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return noisy_loss(model, x, y)


def failing_loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    raise ZeroDivisionError("as users do")


# threads go the same way as processes, everything packed and unpacked; processes take seconds to import torch
KINDS = ["threads", pytest.param("processes", marks=pytest.mark.slow)]


@contextmanager
def processes(count: int) -> Iterator[Executor]:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(count, context, torch.set_num_threads, (1,)) as executor:
        yield executor


@pytest.fixture(scope="module", params=KINDS)
def pool(request: pytest.FixtureRequest) -> Iterator[Executor]:
    with ThreadPoolExecutor(2) if request.param == "threads" else processes(2) as executor:
        yield executor


class Dying(Executor):
    """Does the work at once; after so many tasks there is no worker left."""

    def __init__(self, tasks: int) -> None:
        self.left = tasks

    def submit(self, function: Callable[..., Any], /, *arguments: Any, **rest: Any) -> "Future[Any]":
        future: Future[Any] = Future()
        self.left -= 1
        if self.left < 0:
            future.set_exception(multiprocessing.ProcessError("gone"))
        else:
            future.set_result(function(*arguments, **rest))
        return future


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return train(tmp_path_factory.mktemp("executor") / "run", OPTIMIZERS["adamw amsgrad"], steps=11, block=4)


def record(store: Path, model: nn.Module, steps: int = 9) -> tuple[attrib.Run, Tensor, Tensor]:
    torch.manual_seed(1)
    x, y = torch.randn(12, 4), torch.randint(0, 3, (12,))
    recorder = attrib.record(
        torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), model, noisy_loss, store, block=3
    )
    for step in range(steps):
        index = torch.arange(step, step + 4) % 12
        recorder.zero_grad()
        noisy_loss(model, x[index], y[index]).mean().backward()
        recorder.step(index, x[index], y[index])
    recorder.close()
    return attrib.open_run(store), x, y


def assert_same(found: attrib.Result, serial: attrib.Result, complete: float = 1e-9) -> None:
    """Up to the order of sums: a few rounding errors of the largest term. Gaps are rounding themselves."""
    assert set(found.dataset.data_vars) == set(serial.dataset.data_vars)
    for name, values in serial.dataset.items():
        if str(name).endswith("_identity") or name in ("residual", "rounding"):
            continue
        size = float(np.abs(values).max())
        np.testing.assert_allclose(
            found.dataset[name], values, rtol=0, atol=1e-14 * max(size, 1e-12), err_msg=str(name)
        )
    assert found.dataset.attrs == serial.dataset.attrs
    found.check(complete)


KEPT = (None, ("example",), [("step", "group"), ("example", "group")])


@pytest.mark.parametrize(("keep", "pieces"), crossed(KEPT, (1, 32)))  # pieces: of a block, all of it or single steps
def test_workers_give_the_account_of_one_process(
    keep: Any, pieces: int, trained: Trained, pool: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(executors, "PIECES", pieces)
    measurement = trained.measurement(5)
    assert_same(trained.attribute(measurement, keep=keep, executor=pool), trained.attribute(measurement, keep=keep))


@pytest.mark.parametrize("capture", ["gradients", "factors"])
def test_workers_read_what_was_captured(capture: str, tmp_path: Path, pool: Executor) -> None:
    trained = train(tmp_path / "run", OPTIMIZERS["sgd nesterov decay"], "cnn", capture, steps=5)
    assert_same(trained.attribute(executor=pool, loss=None), trained.attribute(loss=None))


def test_a_window_its_groups_and_several_sweeps_are_those_of_one_process(
    trained: Trained, pool: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"steps": slice(2, 10), "groups": {"all": ["*"]}, "path": attrib.Secant(2)}
    assert_same(trained.attribute(executor=pool, **options), trained.attribute(**options))
    whole = trained.attribute(trained.measurement(9))
    module = import_module("attrib.attribute")
    divided = module._divided
    monkeypatch.setattr(module, "_divided", lambda *given: replace(divided(*given), at_once=4))
    assert_same(trained.attribute(trained.measurement(9), executor=pool), whole)


def test_the_cube_is_written_by_the_caller(trained: Trained, pool: Executor, tmp_path: Path) -> None:
    trained.attribute(cube=str(tmp_path / "serial"))
    trained.attribute(cube=str(tmp_path / "workers"), executor=pool)
    cubes = [xr.open_zarr(tmp_path / name, chunks=None, consolidated=False) for name in ("serial", "workers")]
    assert np.array_equal(cubes[0]["index"], cubes[1]["index"])
    np.testing.assert_allclose(cubes[1]["contribution"], cubes[0]["contribution"], rtol=0, atol=1e-14)
    assert cubes[1].attrs["attrib"]["complete"]


def test_random_numbers_are_drawn_as_they_were_whatever_the_executor(tmp_path: Path, pool: Executor) -> None:
    model = Noisy()
    run, x, y = record(tmp_path / "run", model)
    model.eval()
    serial = attrib.attribute(run, model, attrib.measure.log_prob(x, y), loss=noisy_loss, progress=False)
    state, weights = torch.get_rng_state(), model.hidden.weight.clone()
    found = attrib.attribute(run, model, attrib.measure.log_prob(x, y), loss=noisy_loss, progress=False, executor=pool)
    assert_same(
        found, serial, complete=1e-5
    )  # of a run in float32; threads share one generator, which each task has for itself
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(model.hidden.weight, weights)


def test_functions_that_are_no_module_s_are_sent_too(trained: Trained, pool: Executor) -> None:
    pytest.importorskip("cloudpickle")
    x = trained.data[0][:3]
    measurement = lambda model: model(x)[:, 0]  # noqa: E731
    assert_same(trained.attribute(measurement, executor=pool), trained.attribute(measurement))


def third(model: nn.Module, x: Tensor, target: int) -> Tensor:
    return model(x)[:, target]


class Elsewhere:
    """A measurement that is another one where it is sent to, as one is that reads a variable set while the program runs."""

    def __init__(self, x: Tensor, target: int) -> None:
        self.x, self.target = x, target

    def __reduce__(self) -> tuple[Any, ...]:
        return Elsewhere, (self.x, 0)

    def __call__(self, model: nn.Module) -> Tensor:
        return third(model, self.x, self.target)


def test_a_measurement_that_is_another_on_a_worker_is_refused_and_the_advice_helps(
    trained: Trained, pool: Executor
) -> None:
    x = trained.data[0][:3]
    with pytest.raises(errors.MeasurementError, match=r"another one on a worker.*functools\.partial"):
        trained.attribute(Elsewhere(x, 3), executor=pool)
    measurement = partial(third, x=x, target=3)
    assert_same(trained.attribute(measurement, executor=pool), trained.attribute(measurement))


def test_the_default_type_is_that_of_the_caller(tmp_path: Path) -> None:
    trained = train(tmp_path / "run", OPTIMIZERS["sgd"], steps=4)
    x = trained.data[0][:2]

    def shifted(model: nn.Module) -> Tensor:
        return model(x)[:, 0] * torch.tensor(1 / 3)  # in the default type

    class Bare(Dying):
        """Workers begin with torch's own default."""

        def submit(self, function: Callable[..., Any], /, *arguments: Any, **rest: Any) -> "Future[Any]":
            before = torch.get_default_dtype()
            torch.set_default_dtype(torch.float32)
            try:
                return super().submit(function, *arguments, **rest)
            finally:
                torch.set_default_dtype(before)

    torch.set_default_dtype(torch.float64)
    try:
        assert_same(trained.attribute(shifted, executor=Bare(1000)), trained.attribute(shifted))
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_sweep_that_is_done_holds_nothing_of_the_run(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several sweeps take the memory of one: of its blocks, of its graph."""
    module, alive, most = import_module("attrib.attribute"), WeakSet[Block](), []
    made, tallies, divided = Block.__init__, Account.tallies, module._divided

    def noted(self: Block, *given: Any) -> None:
        made(self, *given)
        alive.add(self)

    def counted(self: Account, *given: Any) -> Any:
        gc.collect()
        most.append(len(alive))
        return tallies(self, *given)

    monkeypatch.setattr(Block, "__init__", noted)
    monkeypatch.setattr(Account, "tallies", counted)
    monkeypatch.setattr(module, "_divided", lambda *given: replace(divided(*given), at_once=2))
    trained.attribute(trained.measurement(8))
    assert max(most) <= 2  # one, and one that is being let go of


def test_the_caller_reads_none_of_the_states(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers do: in this process only the ends and what was inherited are read."""
    read, names = Trajectory.states, []
    monkeypatch.setattr(Trajectory, "states", lambda self, *given: names.append(given) or read(self, *given))
    working = executors.perform

    def perform(*arguments: Any) -> bytes:
        count = len(names)
        answer = working(*arguments)
        del names[count:]
        return answer

    monkeypatch.setattr(executors, "perform", perform)
    trained.attribute(executor=Dying(1000))
    assert names == []


# what goes wrong


def test_an_error_of_the_loss_is_raised_as_it_is(trained: Trained, pool: Executor) -> None:
    with pytest.raises(ZeroDivisionError, match="as users do") as raised:
        trained.attribute(loss=failing_loss, executor=pool)
    assert "on a worker" in "".join(raised.value.__notes__)
    assert "failing_loss" in "".join(raised.value.__notes__)


class Peculiar(Exception):
    """Holds what does not pickle."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.lock = threading.Lock()


def peculiar_loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    raise Peculiar("in its own way")


def test_an_error_that_cannot_be_sent_comes_by_its_words(trained: Trained) -> None:
    with ThreadPoolExecutor(1) as threads, pytest.raises(RuntimeError, match="Peculiar: in its own way") as raised:
        trained.attribute(loss=peculiar_loss, executor=threads)
    assert "peculiar_loss" in "".join(raised.value.__notes__)


def test_what_cannot_be_sent_is_said_before_anything_is_done(trained: Trained, pool: Executor) -> None:
    lock = threading.Lock()

    def measurement(model: nn.Module) -> Tensor:
        with lock:
            return model(trained.data[0][:2])[:, 0]

    with pytest.raises(errors.WorkerError, match="cannot be sent to a worker"):
        trained.attribute(measurement, executor=pool)


def test_an_executor_is_an_object_that_is_submitted_to(trained: Trained) -> None:
    with pytest.raises(TypeError, match="executor is none"):
        trained.attribute(executor=ProcessPoolExecutor)
    with pytest.raises(TypeError, match="executor is none"):
        trained.attribute(executor=2)


def test_an_executor_that_was_shut_down_is_named(trained: Trained) -> None:
    with ThreadPoolExecutor(1) as closed:
        pass
    with pytest.raises(errors.WorkerError, match="after shutdown") as raised:
        trained.attribute(executor=closed)
    assert raised.value.result is None


@pytest.mark.slow  # starts processes
def test_a_killed_worker_is_an_error_that_names_the_steps_and_the_call_can_be_repeated(tmp_path: Path) -> None:
    model, loss = nn.Linear(4, 3), Mortal(tmp_path / "mark")
    run, x, y = record(tmp_path / "run", model)
    loss.fatal = float(run.batch(3)[0][0, 0])
    question = attrib.measure.log_prob(x[:2], y[:2])
    serial = attrib.attribute(run, model, question, loss=loss, progress=False)

    def ask() -> attrib.Result:
        with processes(1) as executor:
            return attrib.attribute(run, model, question, loss=loss, progress=False, executor=executor)

    with pytest.raises(errors.WorkerError, match=r"a worker died.*at the steps \d to \d") as raised:
        ask()
    if raised.value.result is not None:  # as much as was done before
        raised.value.result.check(1e-5)
    assert_same_floats(ask(), serial)


def assert_same_floats(found: attrib.Result, serial: attrib.Result) -> None:
    np.testing.assert_allclose(found.by("step", "example"), serial.by("step", "example"), rtol=0, atol=1e-12)
    found.check(1e-5)


@pytest.mark.parametrize("tasks", [4, 12, 20])
def test_what_was_done_before_a_worker_died_is_complete_by_itself(tasks: int, trained: Trained) -> None:
    """11 steps, two tasks each, of which eight are begun ahead."""
    with pytest.raises(errors.WorkerError, match="gone") as raised:
        trained.attribute(executor=Dying(tasks))
    result = raised.value.result
    if result is None:
        assert tasks < 10
        return
    first, last = result.dataset.attrs["window"]
    assert 0 < first < last == 11
    result.check(1e-10)
    window = trained.attribute(steps=slice(first, None))
    np.testing.assert_allclose(result.by("example"), window.by("example"), rtol=0, atol=1e-12)


class Forgetful(Dying):
    """Every task goes to another worker, until all have been asked."""

    def submit(self, function: Callable[..., Any], /, *arguments: Any, **rest: Any) -> "Future[Any]":
        if self.left % 3:
            executors._KNOWN.clear()
        return super().submit(function, *arguments, **rest)


def test_workers_that_come_later_are_sent_the_work_too(trained: Trained) -> None:
    assert_same(trained.attribute(executor=Forgetful(1000)), trained.attribute())


class Pressing(Dying):
    """The user presses Ctrl-C while a task is done."""

    def __init__(self, task: int) -> None:
        super().__init__(1000)
        self.until = task

    def submit(self, function: Callable[..., Any], /, *arguments: Any, **rest: Any) -> "Future[Any]":
        self.until -= 1
        if self.until == 0:
            signal.raise_signal(signal.SIGINT)
        return super().submit(function, *arguments, **rest)


def test_ctrl_c_leaves_what_was_begun_whole(trained: Trained) -> None:
    with pytest.raises(errors.Interrupted, match="complete by themselves") as stopped:
        trained.attribute(executor=Pressing(12))
    first, last = stopped.value.result.dataset.attrs["window"]
    assert 0 < first < last == 11
    stopped.value.result.check(1e-10)


@pytest.mark.slow  # starts processes
def test_workers_leave_ctrl_c_to_the_caller(trained: Trained) -> None:
    """In a terminal it reaches every process of the group."""
    with processes(2) as executor:
        trained.attribute(executor=executor)  # each worker has done something
        for process in multiprocessing.active_children():
            os.kill(process.pid or 0, signal.SIGINT)
        time.sleep(0.2)
        assert_same(trained.attribute(executor=executor), trained.attribute())


# Dask


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_dask_cluster_goes_on_where_a_worker_is_killed(tmp_path: Path) -> None:
    distributed = pytest.importorskip("distributed")
    model, loss = nn.Linear(4, 3), Mortal(tmp_path / "mark")
    run, x, y = record(tmp_path / "run", model)
    question = attrib.measure.log_prob(x[:2], y[:2])
    serial = attrib.attribute(run, model, question, loss=loss, progress=False)
    with (
        distributed.LocalCluster(2, threads_per_worker=1, dashboard_address=None) as cluster,
        distributed.Client(cluster) as client,
    ):
        executor = client.get_executor()
        plain = attrib.attribute(run, model, question, loss=loss, progress=False, executor=executor)
        assert_same_floats(plain, serial)
        assert not loss.mark.exists()
        loss.fatal = float(run.batch(3)[0][0, 0])
        found = attrib.attribute(run, model, question, loss=loss, progress=False, executor=executor)
        assert loss.mark.exists()  # a worker was killed
        assert_same_floats(found, serial)


@pytest.mark.gpu
def test_workers_use_the_device_of_the_model(trained: Trained, pool: Executor) -> None:
    serial = trained.attribute()
    options = {"loss": trained.case.loss, "progress": False, "executor": pool}
    found = attrib.attribute(trained.run, deepcopy(trained.model).cuda(), trained.measurement(), **options)
    found.check(1e-9)
    np.testing.assert_allclose(found.by("example"), serial.by("example"), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("question", ["influence", "difference"])
def test_queries_are_shared_out_among_workers(question: str, trained: Trained, pool: Executor, tmp_path: Path) -> None:
    asked = {"loss": trained.case.loss, "progress": False}
    runs = [trained.run]
    if question == "difference":
        change = attrib.intervention.Reweight({int(trained.run.examples[0]): 2.0})
        runs.append(attrib.replay(trained.run, 0, change, model=trained.model, store=tmp_path / "changed", **asked))
    ask = partial(getattr(attrib, question), *runs, trained.model, trained.measurement(9), **asked)
    found, serial = ask(executor=pool).dataset, ask().dataset
    assert set(found.data_vars) == set(serial.data_vars)
    for name, values in serial.items():
        size = float(np.nanmax(np.abs(values.fillna(0.0))))
        bound = 1e-6 if str(name).endswith("_identity") or name == "residual" else 1e-12 * size
        np.testing.assert_allclose(found[name], values, rtol=0, atol=bound, err_msg=str(name))
    assert found.attrs == serial.attrs


def test_what_a_worker_of_influence_raises_comes_through_and_what_was_done_stays(trained: Trained) -> None:
    ask = partial(attrib.influence, trained.run, trained.model, trained.measurement(9), progress=False)
    with ThreadPoolExecutor(2) as pool, pytest.raises(ZeroDivisionError, match="as users do"):
        ask(loss=failing_loss, executor=pool)
    with pytest.raises(errors.WorkerError, match="at the queries 2 to 4") as caught:
        ask(loss=trained.case.loss, executor=Dying(1))
    assert isinstance(caught.value.result, attrib.Influence)
    whole = ask(loss=trained.case.loss)
    np.testing.assert_allclose(caught.value.result.by("example"), whole.by("example")[:2], rtol=1e-10, atol=1e-12)
