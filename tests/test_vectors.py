"""Vectors as they lie in a store, and what becomes of them when it is compacted."""

from pathlib import Path
from typing import Any

import google_crc32c
import numcodecs
import numpy as np
import pytest
import torch
import zarr
from cases import MODELS, OPTIMIZERS
from training import train
from zarr.codecs import TransposeCodec

import attrib
from attrib.cli import main
from attrib.errors import StoreError, StoreExistsError
from attrib.store import Reader, close_dropped, compaction, creation
from attrib.store.schema import create

VECTORS = ("theta", "gradient", "state/exp_avg_sq")


def recorded(path: Path, steps: int = 8, **options: Any) -> dict[str, np.ndarray]:
    """The vectors of a run of two full blocks, as plain zarr reads them."""
    train(path, OPTIMIZERS["adamw"], "mlp", steps=steps, **{"block": 4, **options})
    return plainly(path)


def plainly(path: Path) -> dict[str, np.ndarray]:
    group = zarr.open_group(path, mode="r")
    return {name: np.asarray(group[name][...]) for name in names(path)}


def names(path: Path) -> list[str]:
    return [name for name in Reader(path).names() if name.split("/")[0] in ("theta", "gradient", "state")]


def assert_same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def test_a_full_chunk_is_its_rows_in_a_frame_of_blosc_and_their_checksum(tmp_path: Path) -> None:
    gradient = recorded(tmp_path / "run")["gradient"]
    for n in range(2):
        content = (tmp_path / "run" / "gradient" / "c" / f"{n}" / "0").read_bytes()
        rows = gradient[4 * n : 4 * n + 4].tobytes()
        assert content[16:-4] == rows
        assert bytes(numcodecs.Blosc().decode(content[:-4])) == rows
        assert int.from_bytes(content[-4:], "little") == google_crc32c.value(content[:-4])


def test_a_block_that_is_not_full_takes_no_room_for_the_rest(tmp_path: Path) -> None:
    recorded(tmp_path / "run", steps=1, block=256)
    chunk = tmp_path / "run" / "gradient" / "c" / "0" / "0"
    assert chunk.stat().st_size < 4 * Reader(tmp_path / "run").array("gradient").nbytes  # of 256 times as many rows


@pytest.mark.parametrize("entries", [1, 7, 64])
def test_vectors_in_several_chunks_are_read_as_plain_zarr_reads_them(
    entries: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(creation, "STATE_BYTES", entries * 4 * 8)  # of a block's four rows, in float64
    stored = recorded(tmp_path / "run", steps=11)
    reader = Reader(tmp_path / "run")
    assert reader.array("gradient").chunks == (4, entries)
    for name, values in stored.items():
        for first, stop in ((0, len(values)), (1, len(values)), (0, 1), (len(values), len(values))):
            np.testing.assert_array_equal(reader.read(name, slice(first, stop)), values[first:stop])


@pytest.mark.parametrize("at", [0, 3, 15, 16, 40, -5, -1])
@pytest.mark.parametrize("name", VECTORS)
def test_damage_anywhere_in_a_frame_is_named(name: str, at: int, tmp_path: Path) -> None:
    recorded(tmp_path / "run")
    chunk = tmp_path / "run" / name / "c" / "0" / "0"
    content = bytearray(chunk.read_bytes())
    content[at] ^= 1
    chunk.write_bytes(content)
    with pytest.raises(StoreError, match=rf"damaged.*{name}/c/0/0"):
        Reader(tmp_path / "run").read(name, 0)


def test_frames_exchanged_or_cut_or_gone_are_named(tmp_path: Path) -> None:
    recorded(tmp_path / "run")
    first, second = (tmp_path / "run" / "gradient" / "c" / f"{n}" / "0" for n in range(2))
    contents = first.read_bytes(), second.read_bytes()
    for content in (contents[1], contents[0][:-9], contents[0] + b"0"):
        first.write_bytes(content)
        with pytest.raises(StoreError, match=r"damaged.*gradient/c/0/0"):
            Reader(tmp_path / "run").read("gradient", slice(0, 4))
    first.unlink()
    with pytest.raises(StoreError, match=r"missing.*gradient/c/0/0"):
        Reader(tmp_path / "run").read("gradient", slice(0, 4))


def side_by_side(group: zarr.Group, name: str, *args: Any, **options: Any) -> zarr.Array:
    """As the store made its arrays before: states of one parameter side by side, all of them compressed."""
    array = create(group, name, *args, **options)
    if name != "theta":
        return array
    filters, chunks = (TransposeCodec(order=(1, 0)),), array.chunks
    dims = {"dimension_names": args[3], "fill_value": 0, "config": {"write_empty_chunks": True}}
    found = (array.shape, array.dtype, array.compressors)
    return group.create_array(
        name,
        shape=found[0],
        chunks=chunks,
        dtype=found[1],
        compressors=found[2],
        filters=filters,
        overwrite=True,
        **dims,
    )


def test_runs_of_before_are_read_and_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = recorded(tmp_path / "new", steps=7)
    monkeypatch.setattr(creation, "create", side_by_side)
    assert_same(recorded(tmp_path / "old", steps=7), stored)
    monkeypatch.undo()
    reader = Reader(tmp_path / "old")
    assert reader.array("theta").filters
    np.testing.assert_array_equal(reader.read("theta"), stored["theta"])
    states = attrib.open_run(tmp_path / "old").trajectory.states(2, 6)
    np.testing.assert_array_equal(states.numpy(), stored["theta"][2:7])
    last = torch.from_numpy(stored["theta"][6])
    assert torch.equal(attrib.open_run(tmp_path / "old").trajectory.states(2, 6, last), states)


# compaction


@pytest.mark.parametrize("every", [1, 4])
def test_a_compacted_run_holds_the_same_bits_in_less_room(every: int, tmp_path: Path) -> None:
    stored = recorded(tmp_path / "run", steps=11, states_every=every)
    found = attrib.compact(tmp_path / "run")
    assert found.after < found.before
    assert_same(plainly(tmp_path / "run"), stored)
    run = attrib.open_run(tmp_path / "run")
    assert attrib.verify(run).failure is None
    for name, values in stored.items():
        np.testing.assert_array_equal(run.reader.read(name), values)
    assert attrib.plan(run).disk == found.after
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_compacted_run_is_attributed_as_before(tmp_path: Path) -> None:
    trained = train(tmp_path / "run", OPTIMIZERS["adamw"], "mlp", steps=6, block=4)
    loss = MODELS["mlp"].loss
    model, query = trained.case.build().double(), attrib.measure.loss(*trained.batches[0][1:])
    trained.run.load(model, trained.run.steps)
    before = attrib.attribute(trained.run, model, query, loss=loss, progress=False)
    attrib.compact(tmp_path / "run")
    after = attrib.attribute(attrib.open_run(tmp_path / "run"), model, query, loss=loss, progress=False)
    assert after.dataset.equals(before.dataset)


@pytest.mark.parametrize("looked", [[], ["theta", "gradient"]])
def test_a_run_that_was_compacted_meanwhile_is_not_read_by_its_old_metadata(looked: list[str], tmp_path: Path) -> None:
    recorded(tmp_path / "run")
    reader = Reader(tmp_path / "run")
    for name in looked:
        reader.read(name, slice(0, 4))
    attrib.compact(tmp_path / "run")
    for name in ("theta", "gradient"):
        with pytest.raises(StoreError, match="overwritten or compacted since"):
            reader.read(name, slice(0, 4))


def test_what_is_no_finished_run_of_ones_own_is_not_compacted(tmp_path: Path) -> None:
    train(tmp_path / "run", OPTIMIZERS["adamw"], "mlp", steps=6)
    with pytest.raises(StoreError, match="no run is stored"):
        attrib.compact(tmp_path / "nothing")
    (tmp_path / "run" / "notes.txt").write_text("years of work")
    with pytest.raises(StoreExistsError, match="does not delete"):
        attrib.compact(tmp_path / "run")
    (tmp_path / "run" / "notes.txt").unlink()
    train(tmp_path / "early", OPTIMIZERS["adamw"], "mlp", steps=6, block=2, close=False)
    with pytest.raises(StoreExistsError, match="another recorder"):
        attrib.compact(tmp_path / "early")
    close_dropped()
    with pytest.raises(StoreError, match="not finished"):
        attrib.compact(tmp_path / "early")
    assert {path.name for path in tmp_path.iterdir()} == {"run", "early"}


@pytest.mark.parametrize("broken", ["_copy", "_pack", "_compare", "settle"])
def test_a_compaction_that_fails_leaves_the_run_as_it_was(
    broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = recorded(tmp_path / "run")

    def full(*_: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(compaction, broken, full)
    with pytest.raises(OSError, match="No space"):
        attrib.compact(tmp_path / "run")
    assert_same(plainly(tmp_path / "run"), stored)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_damage_is_not_compacted_away(tmp_path: Path) -> None:
    recorded(tmp_path / "run")
    chunk = tmp_path / "run" / "index" / "c" / "0" / "0"
    chunk.write_bytes(chunk.read_bytes()[:-1] + b"?")
    with pytest.raises(StoreError, match=r"damaged.*index/c/0/0"):
        attrib.compact(tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_compact_says_what_it_saved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recorded(tmp_path / "run")
    assert main(["compact", str(tmp_path / "run")]) == 0
    assert "bytes before" in capsys.readouterr().out
    assert main(["compact", str(tmp_path / "run"), "--json"]) == 0
    assert '"after"' in capsys.readouterr().out
