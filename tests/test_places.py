"""Where stores stand: what is ours is replaced, what is not is left alone, and one recorder writes at a time."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from cases import OPTIMIZERS
from test_store import Recording
from training import Trained, train
from zarr.storage import LocalStore, MemoryStore, ZipStore

import attrib
from attrib.errors import StoreError, StoreExistsError
from attrib.store.place import exchange, locate


def recorded(store: Any, steps: int = 3, **options: Any) -> None:
    recording = Recording(store, **options)
    for _ in range(steps):
        recording.step()
    recording.recorder.close()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return train(tmp_path_factory.mktemp("runs") / "run", OPTIMIZERS["sgd"])


def test_working_folder_may_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    recording = Recording("run.zarr")
    for number in range(5):
        if number == 2:
            monkeypatch.chdir(tmp_path / "elsewhere")
        recording.step()
    recording.recorder.close()
    assert not list((tmp_path / "elsewhere").iterdir())
    run = attrib.open_run(tmp_path / "run.zarr")
    assert run.steps == 5
    monkeypatch.chdir(tmp_path)
    lazy = attrib.open_run("run.zarr")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert torch.equal(lazy.vector(5), run.vector(5))
    assert str(tmp_path / "run.zarr") in repr(lazy)


@pytest.mark.parametrize("spelled", ["~/run", "file://{}/run", "file://{}/with%20space"])
def test_paths_are_spelled_as_shells_and_addresses_do(
    spelled: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    target = spelled.format(tmp_path)
    recorded(target)
    assert attrib.open_run(target).steps == 3
    assert [path.name for path in tmp_path.iterdir()] == [locate(target).name]  # type: ignore[union-attr]
    with pytest.raises(StoreExistsError):
        recorded(target)


def test_zip_file_is_read_by_its_path_and_not_written(trained: Trained, tmp_path: Path) -> None:
    folder, packed = Path(str(trained.run.reader.target)), tmp_path / "run.zip"
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_STORED) as file:
        for path in folder.rglob("*"):
            file.write(path, path.relative_to(folder))
    run = attrib.open_run(packed)
    assert torch.equal(run.vector(run.steps), trained.run.vector(run.steps))
    assert attrib.verify(run, progress=False).failure is None
    for target in (tmp_path / "new.zip", ZipStore(tmp_path / "other.zip", mode="w")):
        with pytest.raises(StoreError, match=r"zip.*Record to a folder"):
            Recording(target)
    assert not (tmp_path / "new.zip").exists()


def group_with_data(path: Path) -> None:
    group = zarr.open_group(path, mode="w", zarr_format=3)
    group.create_array("precious", shape=(3,), dtype="f8")[...] = 7
    recorded(path / "seed0")


def run_with_a_guest(path: Path) -> None:
    recorded(path)
    (path / "notes.txt").write_text("years of work")


def run_with_an_array(path: Path) -> None:
    recorded(path)
    zarr.open_group(path, mode="r+").create_array("precious", shape=(3,), dtype="f8")[...] = 7


def run_with_a_guest_inside(path: Path) -> None:
    recorded(path)
    (path / "theta" / "c" / "0" / "notes.txt").write_text("years of work")


def run_of_before(path: Path) -> None:
    group = zarr.create_group(path, zarr_format=3)
    group.attrs["attrib"] = {"format": 2, "committed_steps": 3, "versions": {"attrib": "0.0"}}


def damaged_run(path: Path) -> None:
    recorded(path)
    (path / "zarr.json").write_text("{")


def result_there(path: Path) -> None:
    train(path.with_name("source"), OPTIMIZERS["sgd"]).attribute().save(path)


FOREIGN = [
    group_with_data,
    run_with_a_guest,
    run_with_an_array,
    run_with_a_guest_inside,
    run_of_before,
    damaged_run,
    result_there,
]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("make", FOREIGN)
def test_overwrite_takes_nothing_but_a_whole_run_of_ours(make: Any, tmp_path: Path) -> None:
    make(tmp_path / "all")
    before = contents(tmp_path / "all")
    with pytest.raises(StoreExistsError, match=r"expected (a new path|an empty)"):
        recorded(tmp_path / "all", overwrite=True)
    assert contents(tmp_path / "all") == before


def test_overwritten_link_is_replaced_and_its_target_kept(tmp_path: Path) -> None:
    recorded(tmp_path / "real")
    before = contents(tmp_path / "real")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    recorded(tmp_path / "link", steps=2, overwrite=True)
    assert not (tmp_path / "link").is_symlink()
    assert attrib.open_run(tmp_path / "link").steps == 2
    assert contents(tmp_path / "real") == before
    assert {path.name for path in tmp_path.iterdir()} == {"real", "link"}


def test_saved_over_a_link_the_target_is_kept(trained: Trained, tmp_path: Path) -> None:
    result = trained.attribute()
    result.save(tmp_path / "real")
    before = contents(tmp_path / "real")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(StoreExistsError):
        result.save(tmp_path / "link")
    result.save(tmp_path / "link", overwrite=True)
    assert not (tmp_path / "link").is_symlink()
    assert contents(tmp_path / "real") == before
    np.testing.assert_array_equal(attrib.open_result(tmp_path / "link").by("example"), result.by("example"))


def test_save_leaves_a_folder_of_the_users_alone(trained: Trained, tmp_path: Path) -> None:
    (tmp_path / "res.part").mkdir()
    (tmp_path / "res.part" / "thesis.tex").write_text("years of work")
    trained.attribute().save(tmp_path / "res")
    trained.attribute().save(tmp_path / "res", overwrite=True)
    assert (tmp_path / "res.part" / "thesis.tex").read_text() == "years of work"
    assert {path.name for path in tmp_path.iterdir()} == {"res.part", "res"}


def test_two_saves_at_once_are_each_whole(trained: Trained, tmp_path: Path) -> None:
    """Without overwrite the first stands and the others are refused; with it, one of them stands."""
    result = trained.attribute(keep=[("step", "example", "group")])
    for overwrite in (False, True):
        errors: list[Exception] = []

        def save(errors: list[Exception] = errors, overwrite: bool = overwrite) -> None:
            try:
                result.save(tmp_path / "res", overwrite=overwrite)
            except StoreExistsError as error:
                errors.append(error)

        threads = [threading.Thread(target=save) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(errors) == (0 if overwrite else 3)
        attrib.open_result(tmp_path / "res").check(1e-10)
        assert [path.name for path in tmp_path.iterdir()] == ["res"]


def test_exchange_swaps_two_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the system swaps at one stroke, and where it does not."""
    for at_once in (True, False):
        for name in "ab":
            (tmp_path / f"{name}{at_once}").mkdir()
            (tmp_path / f"{name}{at_once}" / name).touch()
        if not at_once:
            monkeypatch.setattr("ctypes.CDLL", lambda *_, **__: object())
        exchange(tmp_path / f"a{at_once}", tmp_path / f"b{at_once}")
        assert [p.name for p in (tmp_path / f"a{at_once}").iterdir()] == ["b"]
        assert [p.name for p in (tmp_path / f"b{at_once}").iterdir()] == ["a"]
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize("options", [{"overwrite": True}, {"resume": True}, {}])
def test_second_writer_is_refused_while_the_first_lives(options: dict[str, bool], tmp_path: Path) -> None:
    first = Recording(tmp_path / "run")
    for _ in range(3):
        first.step()
    match = "another recorder" if options else "exists already"
    with pytest.raises(StoreExistsError, match=match):
        Recording(tmp_path / "run", **options)
    first.step()
    first.recorder.close()
    assert attrib.open_run(tmp_path / "run").steps == 4


def test_two_that_begin_at_one_place_are_not_mixed(tmp_path: Path) -> None:
    first, second = (Recording(tmp_path / "run") for _ in range(2))
    first.step()
    with pytest.raises(StoreExistsError):
        second.step()
    first.step()
    first.recorder.close()
    assert attrib.verify(attrib.open_run(tmp_path / "run"), progress=False).failure is None


@pytest.mark.parametrize("memory", [False, True])
def test_run_whose_store_is_anothers_now_is_not_written_to(memory: bool, tmp_path: Path) -> None:
    """Where there is no lease: a folder moved away by hand, a store in memory."""
    store = MemoryStore() if memory else tmp_path / "run"
    first = Recording(store, block=1)
    first.step()
    first.recorder._writer.check(wait=True)
    if not memory:
        os.rename(tmp_path / "run", tmp_path / "moved")
    recorded(store, steps=2, overwrite=memory)
    first.step()
    first.recorder._writer._collect(wait=True)
    for refused in (first.step, first.recorder.close):
        with pytest.raises(StoreError, match="another run's now"):
            refused()
    run = attrib.open_run(store)
    assert run.steps == 2
    assert attrib.verify(run, progress=False).failure is None
    first.recorder._writer.release()


def test_recorder_that_is_gone_lets_go_of_its_store(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As in a notebook whose cell is run again: what it held is written first."""
    dropped = Recording(tmp_path / "run")
    for _ in range(3):
        dropped.step()
    del dropped
    recorded(tmp_path / "other", steps=1)
    assert "was not closed: its 3 steps were written" in caplog.text
    assert attrib.open_run(tmp_path / "run").steps == 3
    recorded(tmp_path / "run", steps=1, overwrite=True)
    assert attrib.open_run(tmp_path / "run").steps == 1


@pytest.mark.slow  # forks a process that has threads
@pytest.mark.parametrize("ends", ["closed", "killed"])
def test_forked_worker_keeps_no_store_locked(ends: str, tmp_path: Path) -> None:
    """A loader's workers live on for a while where the process that forked them was killed."""
    script = f"""
        import os, signal, sys, time
        sys.path[:0] = {[str(Path(__file__).parent)]!r}
        from test_store import Recording
        recording = Recording({str(tmp_path / "run")!r})
        for _ in range(3):
            recording.step()
        if os.fork() == 0:
            time.sleep(20)
            os._exit(0)
        {"recording.recorder.close()" if ends == "closed" else "os.kill(os.getpid(), signal.SIGKILL)"}
        print("closed", flush=True)
        time.sleep(20)
    """
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        if ends == "closed":
            assert process.stdout.readline() == "closed\n"
        else:
            process.wait(timeout=60)
        try:
            recorded(tmp_path / "run", overwrite=True)
        finally:
            process.kill()


def test_overwritten_run_in_another_kind_of_store(tmp_path: Path) -> None:
    for store in (MemoryStore(), LocalStore(tmp_path / "run")):
        recorded(store)
        with pytest.raises(StoreExistsError):
            recorded(store)
        recorded(store, steps=2, overwrite=True)
        run = attrib.open_run(store)
        assert run.steps == 2
        assert attrib.verify(run, progress=False).failure is None


UNCLOSED = """
    import sys, time
    sys.path[:0] = {paths!r}
    from test_store import Recording
    recording = Recording({store!r}, block=None)
    for _ in range(100):
        recording.step()
    print("ready", flush=True)
    {end}
"""

ENDS = {
    "normal": ("", 0),
    "exception": ("1 / 0", 1),
    "exit": ("sys.exit(3)", 3),
    "sigterm": ("time.sleep(60)", -signal.SIGTERM),
    "sigterm in a step": (
        "o = recording.recorder.optimizer; s = o.step; o.step = lambda: [time.sleep(1.5), s()]; recording.step()",
        -signal.SIGTERM,
    ),
    "worker": ("import os; os.fork() or sys.exit(0); os.wait()", 0),
}


@pytest.mark.slow  # a process each, which imports torch
@pytest.mark.parametrize("end", ENDS)
def test_run_that_nobody_closed_is_written_at_the_end_of_the_process(end: str, tmp_path: Path) -> None:
    code, status = ENDS[end]
    script = textwrap.dedent(UNCLOSED).format(store=str(tmp_path / "run"), paths=[str(Path(__file__).parent)], end=code)
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ}
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    if "sigterm" in end:
        threading.Event().wait(0.5)
        process.terminate()
    _, said = process.communicate(timeout=60)
    assert process.returncode == status
    assert said.count("was not closed") == 1
    run = attrib.open_run(tmp_path / "run")
    assert (run.steps, run.complete) == (101 if "step" in end else 100, False)
    assert attrib.verify(run, progress=False).failure is None
