"""The store: bits preserved, killed runs readable, damage named."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
import zarr
from cases import MODELS, OPTIMIZERS
from training import assert_same_arrays, train
from zarr.storage import MemoryStore

import attrib
from attrib.errors import StoreError
from attrib.store import Reader
from attrib.store.examples import ExampleTable
from attrib.store.rows import Rows

LOSS = MODELS["mlp"].loss


def full(*_: Any) -> None:
    raise OSError(28, "No space left on device")


class Recording:
    """A small model, recorded two steps a block."""

    def __init__(self, store: Any, **options: Any) -> None:
        torch.manual_seed(0)
        self.model = torch.nn.Linear(3, 2).double()
        self.x, self.y = torch.randn(4, 3).double(), torch.randint(0, 2, (4,))
        optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.recorder = attrib.record(optimizer, self.model, LOSS, store, **{"block": 2, **options})

    def step(self) -> None:
        self.recorder.zero_grad()
        LOSS(self.model, self.x, self.y).mean().backward()
        self.recorder.step(torch.arange(4), self.x, self.y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("model", MODELS)
def test_states_read_back_bit_for_bit(model: str, dtype: torch.dtype, tmp_path: Path) -> None:
    trained = train(tmp_path / "run", OPTIMIZERS["adamw"], model, dtype=dtype, steps=9)
    for step, theta in enumerate(trained.thetas):
        fresh = trained.case.build().to(dtype)
        trained.run.load(fresh, step)
        got = np.concatenate([p.detach().reshape(-1).numpy() for p in fresh.parameters()])
        assert got.dtype == str(dtype).removeprefix("torch.")
        np.testing.assert_array_equal(got.astype(np.float64), theta)
        for name, value in trained.run.parameters(step).items():
            assert torch.equal(value, fresh.get_parameter(name))


def test_index_and_inputs_read_back(tmp_path: Path) -> None:
    trained = train(tmp_path / "run", OPTIMIZERS["sgd"], "cnn", steps=6)
    assert trained.run.steps == 6
    for step, (index, x, y) in enumerate(trained.batches):
        np.testing.assert_array_equal(trained.run.index(step), index)
        got_x, got_y = trained.run.batch(step)
        assert torch.equal(got_x, x)
        assert torch.equal(got_y, y)
    np.testing.assert_array_equal(trained.run.examples, np.unique(np.concatenate([b[0] for b in trained.batches])))


@pytest.mark.parametrize("together", [1, 2, 3, 4, 9])
def test_rows_read_together_are_those_read_one_by_one(together: int, monkeypatch: pytest.MonkeyPatch) -> None:
    run = train(MemoryStore(), OPTIMIZERS["sgd"], capture="gradients", steps=11).run  # blocks of four steps
    gradients = run.reader.array("gradients")
    monkeypatch.setattr("attrib.store.rows.ROWS_BYTES", together * gradients.nbytes // 11)
    rows = Rows(run.reader)
    for step in (0, 0, 1, 3, 2, 10, 9, 8, 4, 7, 10, 0):
        for name in ("index", "gradients"):
            row = rows.at(name, step)
            np.testing.assert_array_equal(row, run.reader.read(name, step))
            row += 1  # the caller's: the next is as it was


@pytest.mark.parametrize("capture", ["replay", "gradients", "factors"])
def test_a_pass_over_a_run_reads_each_block_once(capture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = train(MemoryStore(), OPTIMIZERS["sgd"], capture=capture, steps=8).run  # two blocks
    read, stepwise = type(run.reader).read, []

    def noted(reader: Reader, name: str, rows: slice | int | None = None) -> np.ndarray:
        if not name.startswith("examples/"):
            stepwise.append(name)
        return read(reader, name, rows)

    monkeypatch.setattr(type(run.reader), "read", noted)
    for step in reversed(range(8)):
        run.index(step), run.batch(step), run.scales(step)
        if capture != "replay":
            run.factors(step) if capture == "factors" else run.shares(step)
    assert len(stepwise) >= 6  # index, row and facts
    assert all(stepwise.count(name) == 2 for name in stepwise)


@pytest.mark.parametrize("on_disk", [True, False])
def test_the_size_of_a_run_is_that_of_all_that_is_stored(on_disk: bool, tmp_path: Path) -> None:
    folder, memory = tmp_path / "run", MemoryStore()
    run = train(folder if on_disk else memory, OPTIMIZERS["adamw"]).run
    files = [f.stat().st_size for f in folder.rglob("*") if f.is_file()]
    assert run.reader.nbytes_stored() == (sum(files) if on_disk else sum(map(len, memory._store_dict.values())))


def test_inputs_are_stored_once_and_again_only_where_they_vary(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 2)
    loss = MODELS["mlp"].loss
    x, y = torch.randn(4, 3), torch.randint(0, 2, (4,))
    with attrib.record(torch.optim.SGD(model.parameters(), lr=0.1), model, loss, tmp_path / "run") as recorder:
        for step in range(5):
            changed = x.clone()
            if step == 3:
                changed[2] += 1.0  # augmented once
            recorder.zero_grad()
            loss(model, changed, y).mean().backward()
            recorder.step(torch.arange(4), changed, y)
    run = attrib.open_run(tmp_path / "run")
    assert len(run.reader.read("examples/0/0")) == 5
    assert torch.equal(run.batch(2)[0], x)
    assert torch.equal(run.batch(3)[0][2], x[2] + 1.0)


def test_memory_and_disk_hold_the_same(tmp_path: Path) -> None:
    store = MemoryStore()
    a = train(store, OPTIMIZERS["adam"])
    b = train(tmp_path / "run", OPTIMIZERS["adam"])
    assert_same_arrays(a.run, b.run)
    np.testing.assert_array_equal(a.attribute().by("example"), b.attribute().by("example"))


def test_every_array_has_named_dimensions_and_opens_in_xarray(tmp_path: Path) -> None:
    trained = train(tmp_path / "run", OPTIMIZERS["adam"], capture="gradients")
    for name in trained.run.reader.names():
        names = trained.run.reader.array(name).metadata.dimension_names
        assert names is not None
        assert len(names) == trained.run.reader.array(name).ndim
    dataset = xr.open_zarr(tmp_path / "run", chunks=None, consolidated=False)
    assert dataset["gradients"].dims == ("step", "slot", "parameter")
    json.dumps(dict(dataset.attrs))


def test_no_pickle_in_a_store(tmp_path: Path) -> None:
    train(tmp_path / "run", OPTIMIZERS["adamw"], capture="gradients")
    for path in (tmp_path / "run").rglob("zarr.json"):
        assert "pickle" not in path.read_text()


KILLED = """
    import os, signal, sys
    import torch
    sys.path[:0] = {paths!r}
    from cases import MODELS, OPTIMIZERS
    import attrib
    torch.manual_seed(0)
    case = MODELS["mlp"]
    model = case.build().double()
    x, y = case.data(12)
    recorder = attrib.record(OPTIMIZERS["adamw"](list(model.parameters())), model, case.loss, {store!r}, block=4)
    for step in range(11):
        recorder.zero_grad()
        case.loss(model, x, y).mean().backward()
        recorder.step(torch.arange(12), x, y)
    recorder._writer.check(wait=True)  # the block on the writing thread, or one fewer may have been committed
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow  # a new process, which imports torch; `test_states` leaves a run without closing it
def test_killed_run_reads_up_to_its_last_committed_block(tmp_path: Path) -> None:
    store = str(tmp_path / "run")
    script = textwrap.dedent(KILLED).format(store=store, paths=[str(Path(__file__).parent)])
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, env={**os.environ}, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    run = attrib.open_run(store)
    assert not run.complete
    assert run.steps == 7  # two blocks of four; the last state of a full block comes with the next
    assert "7 steps (not closed" in repr(run)
    case = MODELS["mlp"]
    x, y = torch.zeros(1, 2, dtype=torch.long), torch.zeros(1, dtype=torch.long)
    measurement = attrib.measure.log_prob(x, y)
    attrib.attribute(run, case.build().double(), measurement, loss=case.loss, progress=False).check(1e-10)


def test_run_killed_before_its_first_block_says_so(tmp_path: Path) -> None:
    trained = None
    with pytest.raises(StoreError, match="no committed steps"):
        trained = train(tmp_path / "run", OPTIMIZERS["sgd"], steps=3, close=False)
    assert trained is None


def damage(folder: Path, kind: str) -> Path:
    victim = sorted((folder / "theta" / "c").rglob("*"))[-1]
    if kind == "truncated":
        victim.write_bytes(victim.read_bytes()[: victim.stat().st_size // 2])
    elif kind == "corrupted":
        data = bytearray(victim.read_bytes())
        data[len(data) // 2] ^= 0xFF
        victim.write_bytes(bytes(data))
    else:
        victim.unlink()
    return victim


@pytest.mark.parametrize("kind", ["truncated", "corrupted", "missing"])
def test_damaged_chunk_is_named(kind: str, tmp_path: Path) -> None:
    trained = train(tmp_path / "run", OPTIMIZERS["sgd"])
    victim = damage(tmp_path / "run", kind)
    name = str(victim.relative_to(tmp_path / "run"))
    with pytest.raises(StoreError, match=name):
        attrib.open_run(tmp_path / "run").parameters(trained.run.steps)
    with pytest.raises(StoreError, match=name):
        trained.attribute()
    attrib.open_run(tmp_path / "run").parameters(0)  # the rest is readable


def test_missing_array_is_named(tmp_path: Path) -> None:
    trained = train(tmp_path / "run", OPTIMIZERS["sgd"])
    for path in sorted((tmp_path / "run" / "gradient").rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    (tmp_path / "run" / "gradient").rmdir()
    with pytest.raises(StoreError, match="'gradient'"):
        trained.attribute()


def test_newer_format_is_refused(tmp_path: Path) -> None:
    train(tmp_path / "run", OPTIMIZERS["sgd"])
    group = zarr.open_group(tmp_path / "run", mode="r+")
    header = dict(group.attrs["attrib"])  # type: ignore[arg-type]
    group.attrs["attrib"] = {**header, "format": 99}
    with pytest.raises(StoreError, match=r"format 99.*Update attrib"):
        attrib.open_run(tmp_path / "run")


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no run is stored there"):
        attrib.open_run(tmp_path / "nothing")
    zarr.create_group(tmp_path / "other")
    with pytest.raises(StoreError, match="not a run"):
        attrib.open_run(tmp_path / "other")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "zarr.json").write_text("{")
    with pytest.raises(StoreError, match="broken"):
        attrib.open_run(tmp_path / "broken")


def test_existing_store_is_not_overwritten_unasked(tmp_path: Path) -> None:
    trained = train(tmp_path / "run", OPTIMIZERS["sgd"])
    with pytest.raises(attrib.errors.StoreExistsError, match="overwrite=True"):
        train(tmp_path / "run", OPTIMIZERS["adam"])
    assert attrib.open_run(tmp_path / "run").header["optimizer"] == "SGD"
    assert torch.equal(attrib.open_run(tmp_path / "run").vector(6), trained.run.vector(6))
    train(tmp_path / "run", OPTIMIZERS["adam"], overwrite=True)
    assert attrib.open_run(tmp_path / "run").header["optimizer"] == "Adam"


@pytest.mark.parametrize("step", [7, -8, 100])
def test_state_outside_the_run_is_refused(step: int, tmp_path: Path) -> None:
    run = train(tmp_path / "run", OPTIMIZERS["sgd"], steps=6).run
    with pytest.raises(IndexError, match="expected 0 to 6"):
        run.parameters(step)


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_attrib_did_not_write_is_never_deleted(overwrite: bool, tmp_path: Path) -> None:
    precious = tmp_path / "folder" / "thesis.tex"
    precious.parent.mkdir()
    precious.write_text("years of work")
    for place in (precious.parent, precious):
        with pytest.raises(attrib.errors.StoreExistsError, match="does not delete"):
            train(place, OPTIMIZERS["sgd"], overwrite=overwrite)
    assert precious.read_text() == "years of work"


class BagOfWords(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(11, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.table(x).sum(1)


@pytest.mark.parametrize("capture", ["replay", "gradients"])  # factors are refused, see test_factors
def test_batches_may_grow_and_inputs_may_change_their_length(capture: str, tmp_path: Path) -> None:
    """Warm-up of the batch size, padding to the longest of each batch, labels of another type."""
    torch.manual_seed(0)
    model = BagOfWords().double()
    loss = MODELS["mlp"].loss
    batches = []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with attrib.record(optimizer, model, loss, tmp_path / "run", capture, block=2) as recorder:
        for size, length in ((3, 4), (3, 4), (5, 6), (5, 4), (2, 1), (9, 6), (4, 4)):
            index = torch.randperm(20)[:size]
            x, y = torch.randint(0, 11, (size, length)), torch.randint(0, 3, (size,))
            recorder.zero_grad()
            loss(model, x, y).mean().backward()
            recorder.step(index, x, y)
            batches.append((index, x, y))
    run = attrib.open_run(tmp_path / "run")
    for step, (index, x, y) in enumerate(batches):
        np.testing.assert_array_equal(run.index(step), index)
        for got, expected in zip(run.batch(step), (x, y), strict=True):
            assert torch.equal(got, expected)
    x, y = batches[0][1:]
    attrib.attribute(run, model, attrib.measure.log_prob(x, y), loss=loss, progress=False).check(1e-10)
    assert attrib.verify(run, progress=False).failure is None


def test_kill_between_commits_costs_no_committed_input(tmp_path: Path) -> None:
    """Rows of inputs that were being written, their array already longer, are not asked for."""
    trained = train(tmp_path / "run", OPTIMIZERS["sgd"])
    group = zarr.open_group(tmp_path / "run", mode="r+")
    for name in ("examples/0/0", "examples/0/1", "index", "theta"):
        array = group[name]
        assert isinstance(array, zarr.Array)
        array.resize((array.shape[0] + 100, *array.shape[1:]))
    again = attrib.open_run(tmp_path / "run")
    assert torch.equal(again.batch(0)[0], trained.batches[0][1])
    result = attrib.attribute(again, trained.model, trained.measurement(), loss=trained.case.loss, progress=False)
    result.check(1e-10)


def test_full_disk_refuses_steps_until_there_is_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next step, or `close`, writes what could not be written; a refused step moves nothing."""
    bench = Recording(tmp_path / "run")
    for _ in range(3):
        bench.step()
    bench.recorder._writer.check(wait=True)
    with monkeypatch.context() as patch:
        patch.setattr(ExampleTable, "commit", full)
        bench.step()  # its block is written meanwhile
        before = [p.clone() for p in bench.model.parameters()]
        for _ in range(2):
            with pytest.raises(StoreError, match=r"No space left.*before step 4"):
                bench.recorder._writer.check(wait=True)
            with pytest.raises(StoreError, match=r"No space left.*before step 4.*Make room"):
                bench.step()
        assert all(map(torch.equal, before, bench.model.parameters()))
        assert attrib.open_run(tmp_path / "run").steps == 1
        with pytest.raises(StoreError, match="No space left"):
            bench.recorder.close()
        with pytest.raises(StoreError, match="No space left"):
            bench.recorder.close()
    bench.recorder.close()
    run = attrib.open_run(tmp_path / "run")
    assert (run.steps, run.complete) == (4, True)
    assert attrib.verify(run, progress=False).failure is None


def test_recording_goes_on_where_room_was_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench, other = Recording(tmp_path / "run"), Recording(tmp_path / "other")
    for number in range(7):
        with monkeypatch.context() as patch:
            if number in (3, 4):
                patch.setattr(ExampleTable, "commit", full)
            with suppress(StoreError):  # step 4 is refused, and made in the next round
                bench.step()
                bench.recorder._writer._collect(wait=True)
    for _ in range(6):
        other.step()
    for recorded in (bench, other):
        recorded.recorder.close()
    assert_same_arrays(attrib.open_run(tmp_path / "run"), attrib.open_run(tmp_path / "other"))


def test_with_block_on_a_full_disk_ends_in_a_store_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Recording(tmp_path / "run")
    monkeypatch.setattr(ExampleTable, "commit", full)
    with pytest.raises(StoreError, match=r"No space left.*Make room"), bench.recorder:
        bench.step()
    monkeypatch.undo()
    bench.recorder.close()
    assert attrib.open_run(tmp_path / "run").steps == 1
