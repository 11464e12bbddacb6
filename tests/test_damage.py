"""Attempts to prove the store wrong, a few of each kind that `scripts/fuzz_store.py` makes; and what these have found."""

import json
import random
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import attrib
from attrib.errors import StoreError, StoreExistsError
from attrib.store import FORMAT, creation
from attrib.store.seal import sealed
from attrib.store.sealing import SealingStore

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))
from fuzz import kills, power
from fuzz.changes import files_in, lay
from fuzz.damage import result_subject, run_subject
from fuzz.kills import RECORDED, by_time
from fuzz.reading import read_result, read_run, read_steps
from fuzz.tally import Maker, campaign
from fuzz.trainings import STEPS, TRAININGS, Training, loss, momentum, penalty
from fuzz_store import PARTS, shared

BARE = {"kind": "run", "id": "x", "format": FORMAT, "sealed": {"arrays": {}, "closed": 0, "chain": "", "recent": {}}}


def full(*_: object, **options: object) -> None:
    raise OSError(28, "No space left on device")


FEW: dict[str, tuple[Maker, int]] = {
    "run": (partial(run_subject, "ended early", False), 3),
    "result": (partial(result_subject, "gradients", False), 3),
    "power, recording": (partial(power.recording, "replay, by time"), 3),
}


@pytest.mark.parametrize("part", FEW)
def test_a_few_attempts_do_not_prove_the_store_wrong(part: str, tmp_path: Path) -> None:
    maker, count = FEW[part]
    assert campaign([maker], count, 1, tmp_path).faults == []


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
def test_many_attempts_do_not_prove_the_store_wrong(part: str, tmp_path: Path) -> None:
    """Of kills too, each maker's several: at a file operation, in what it writes, at any moment."""
    makers, count = PARTS[part]
    assert shared(makers, count // 30, 2, 1, str(tmp_path)).faults == []


def killed_in_its_commit(training: Training, store: Path, committed: int, steps: int) -> None:
    """Ended after so many steps, those beyond `committed` on the disk but for the commit itself."""
    recorder = training.begin(store, 0)
    training.go_on(recorder, committed)
    recorder._writer._collect(wait=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SealingStore, "commit", full)
        training.go_on(recorder, steps)
        recorder._writer._collect(wait=True)
        recorder._writer.release()


def test_table_of_inputs_that_was_never_committed_is_made_anew(tmp_path: Path) -> None:
    training = TRAININGS["replay"]
    training.record(tmp_path / "whole", 0)
    killed_in_its_commit(training, tmp_path / "run", 2, STEPS - 1)
    assert (tmp_path / "run" / "examples" / "1").exists()
    training.record(tmp_path / "run", 99, resume=True)
    whole, run = read_steps(tmp_path / "whole"), read_steps(tmp_path / "run")
    assert run.of_steps() == whole.of_steps()
    assert not run.refusals


@pytest.mark.parametrize("made", [0, 4])
def test_run_killed_while_its_store_was_made_is_begun_again(
    made: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """made: arrays that it had by then."""
    training = TRAININGS["gradients"]
    training.record(tmp_path / "whole", 0)
    with monkeypatch.context() as patch:
        waiting = [creation.create] * made
        patch.setattr(creation, "create", lambda *args, **options: (waiting or [full]).pop()(*args, **options))
        patch.setattr(creation, "remove_arrays", lambda *_, **options: None)
        with pytest.raises(StoreError, match="No space left"):
            training.record(tmp_path / "run", 0)
    (tmp_path / "run" / "zarr.json.123.part").write_text("half")
    with pytest.raises(StoreError, match="no committed steps"):
        attrib.open_run(tmp_path / "run")
    with pytest.raises(StoreExistsError, match="overwrite=True"):
        training.record(tmp_path / "run", 0)
    training.record(tmp_path / "run", 0, resume=True)
    assert read_steps(tmp_path / "run").of_steps() == read_steps(tmp_path / "whole").of_steps()
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "run"}


@pytest.mark.parametrize("guest", ["notes.txt", "theta/notes.txt", "theta/c/0/notes.txt", "mine/zarr.json"])
def test_guests_of_a_store_that_was_never_made_whole_are_not_deleted(guest: str, tmp_path: Path) -> None:
    (tmp_path / "run" / "theta" / "c" / "0").mkdir(parents=True)
    (tmp_path / "run" / "theta" / "c" / "0" / "0").touch()
    (tmp_path / "run" / "zarr.json").write_bytes(sealed({"attrib": BARE}))
    (tmp_path / "run" / guest).parent.mkdir(exist_ok=True)
    (tmp_path / "run" / guest).write_text("years of work")
    with pytest.raises(StoreExistsError, match="does not delete"):
        TRAININGS["gradients"].record(tmp_path / "run", 0, overwrite=True)
    assert (tmp_path / "run" / guest).read_text() == "years of work"
    (tmp_path / "run" / guest).unlink()
    if "mine" not in guest:
        TRAININGS["gradients"].record(tmp_path / "run", 0, overwrite=True)


def test_half_a_header_is_nothing(tmp_path: Path) -> None:
    """All that a writer left that was killed within its first file."""
    for option in ("resume", "overwrite"):
        place = tmp_path / option
        place.mkdir()
        (place / "zarr.json.123.part").write_text("half")
        TRAININGS["gradients"].record(place, 0, **{option: True})
        assert not read_steps(place).refusals


def test_run_killed_between_the_chunks_of_a_growing_block_and_its_header_goes_on(tmp_path: Path) -> None:
    """What is drawn next follows from the steps that count, not from what was written beyond."""
    training = replace(TRAININGS["replay"], options={"block": None})
    with by_time(), pytest.MonkeyPatch.context() as patch:
        training.record(tmp_path / "whole", 0)
        recorder = training.begin(tmp_path / "run", 0)
        for steps in (1, 2):  # each is committed
            training.go_on(recorder, steps)
            recorder._writer._collect(wait=True)
        headers = [SealingStore._put_header, full]  # the one with both digests; the last
        patch.setattr(SealingStore, "_put_header", lambda *args: headers.pop(0)(*args))
        training.go_on(recorder, 3)
        recorder._writer._collect(wait=True)
        recorder._writer.release()
        patch.undo()
        left = read_steps(tmp_path / "run")
        assert (left.strays, left.refusals) == ([], [])
        assert ("vector", 2) in left
        assert ("vector", 3) not in left
        training.record(tmp_path / "run", 99, resume=True)
    assert read_steps(tmp_path / "run").of_steps() == read_steps(tmp_path / "whole").of_steps()


def test_what_was_drawn_after_the_last_step_is_drawn_again(tmp_path: Path) -> None:
    """As the next batch is, of a loop that ends before its step."""
    training = TRAININGS["replay"]
    training.record(tmp_path / "whole", 0)
    recorder = training.begin(tmp_path / "run", 0)
    training.go_on(recorder, 3)
    torch.rand(1), random.random(), np.random.rand()  # noqa: NPY002
    recorder.__exit__(ValueError, ValueError("ended early"), None)
    training.record(tmp_path / "run", 99, resume=True)
    assert read_steps(tmp_path / "run").of_steps() == read_steps(tmp_path / "whole").of_steps()


EARLY = TRAININGS["ended early"]


def edited(folder: Path, name: str, edit: Callable[[dict[str, Any]], object]) -> None:
    document = json.loads((folder / name).read_text())
    edit(document)
    (folder / name).write_text(json.dumps(document))


@pytest.mark.parametrize("length", [*(pytest.param(n, marks=pytest.mark.slow) for n in (10**6, 2**63)), 10**30])
def test_length_that_grows_is_believed_no_further_than_the_header_says(length: int, tmp_path: Path) -> None:
    """The digest of an array's metadata leaves it out. Neither is memory asked for it, nor are its chunks counted."""
    EARLY.record(tmp_path / "run", 0)
    replace(EARLY, early=False).record(tmp_path / "whole", 0, STEPS + 2)
    truth = read_run(tmp_path / "run", EARLY, True)
    for name in ("theta", "index", "ids/text", "examples/0/0", "digests"):
        edited(tmp_path / "run", f"{name}/zarr.json", lambda document: document["shape"].__setitem__(0, length))
    edited(tmp_path / "run", "row/zarr.json", lambda document: document["shape"].__setitem__(1, length))
    assert read_run(tmp_path / "run", EARLY, True) == truth
    replace(EARLY, early=False).record(tmp_path / "run", 99, STEPS + 2, resume=True)
    assert read_steps(tmp_path / "run").of_steps() == read_steps(tmp_path / "whole").of_steps()


def test_damaged_digests_are_named(tmp_path: Path) -> None:
    training = TRAININGS["gradients"]
    training.record(tmp_path / "run", 0)
    training.attribute(attrib.open_run(tmp_path / "run")).save(tmp_path / "result")
    for place in (tmp_path / "run", tmp_path / "result"):
        file = place / "digests" / "c" / "0"
        whole = file.read_bytes()
        for spoiled in (
            b"",
            whole[:-1],
            bytes(len(whole)),
            whole[: len(whole) // 2] + b"x" + whole[len(whole) // 2 + 1 :],
        ):
            file.write_bytes(spoiled)
            read = read_run(place, training, True) if place.name == "run" else read_result(place, True)
            assert not read.strays
            assert read.refusals
            assert all("'digests'" in message or "digests/c/0" in message for message in read.refusals)


@pytest.mark.parametrize("name", ["gradients", "random", "ids/span", "penalty"])
def test_damage_is_found_before_a_run_is_gone_on_with(name: str, tmp_path: Path) -> None:
    """Also in what nothing is read of where the run ended with a whole block: writing to it would make it count."""
    training = replace(EARLY, options={"block": 2}, penalty=penalty, optimizer=momentum)
    training.record(tmp_path / "run", 0, 4)
    files = files_in(tmp_path / "run")
    edited(tmp_path / "run", f"{name}/zarr.json", lambda document: document.update(fill_value=7))
    with pytest.raises(StoreError, match=f"damaged.*{name}/zarr.json"):
        training.begin(tmp_path / "run", 99, resume=True)
    lay(tmp_path / "run", files_in(tmp_path / "run"), files)
    training.record(tmp_path / "run", 99, resume=True)


def test_model_is_left_alone_where_the_run_is_damaged(tmp_path: Path) -> None:
    EARLY.record(tmp_path / "run", 0)
    (tmp_path / "run" / "gradients" / "c" / "0" / "0" / "0").write_bytes(b"")
    torch.manual_seed(5)
    model = EARLY.model()
    before = [p.clone() for p in model.parameters()]
    optimizer, state = EARLY.optimizer([p for p in model.parameters() if p.requires_grad]), torch.get_rng_state()
    with pytest.raises(StoreError, match="gradients/c/0/0/0"):
        attrib.record(optimizer, model, loss, tmp_path / "run", "gradients", resume=True)
    assert all(map(torch.equal, before, model.parameters()))
    assert not optimizer.state
    assert torch.equal(state, torch.get_rng_state())


def test_verify_finds_arrays_that_are_shorter_than_the_run(tmp_path: Path) -> None:
    training = replace(EARLY, early=False)
    training.record(tmp_path / "run", 0)
    for name in ("theta", "random", "gradients", "ids/text", "ids/span", "examples/0/0"):
        whole = (tmp_path / "run" / name / "zarr.json").read_bytes()
        length = json.loads(whole)["shape"][0]
        edited(
            tmp_path / "run", f"{name}/zarr.json", lambda document, n=length: document["shape"].__setitem__(0, n - 1)
        )
        failure = attrib.verify(attrib.open_run(tmp_path / "run"), progress=False).failure
        assert failure is not None
        assert re.search(f"too short: got {length - 1} rows, expected {length}.*'{name}'", failure)
        (tmp_path / "run" / name / "zarr.json").write_bytes(whole)


def test_verify_reads_the_digests_though_there_are_none_yet(tmp_path: Path) -> None:
    EARLY.record(tmp_path / "run", 0)
    (tmp_path / "run" / "digests" / "zarr.json").unlink()
    failure = attrib.verify(attrib.open_run(tmp_path / "run"), progress=False).failure
    assert failure is not None
    assert "'digests'" in failure


def test_order_of_the_header_is_sealed(tmp_path: Path) -> None:
    """Constants and tensors are numbered by it."""
    EARLY.record(tmp_path / "run", 0)
    file = tmp_path / "run" / "zarr.json"
    document = json.loads(file.read_text())
    file.write_text(json.dumps(document, indent=1))
    attrib.open_run(tmp_path / "run")
    file.write_text(json.dumps(document, sort_keys=True))
    with pytest.raises(StoreError, match="header is damaged"):
        attrib.open_run(tmp_path / "run")


@pytest.mark.slow
def test_run_that_lost_power_before_its_first_commit_is_begun_again(tmp_path: Path) -> None:
    """Whatever became of what was not fsynced yet: nothing, all, half of each file."""
    training = RECORDED["gradients"]
    scene = power.recording("gradients", tmp_path)
    first = next(n for n, said in enumerate(scene.journal.said) if said != (0, 0))
    truth = read_steps(tmp_path / "disk" / "new" / "folders" / "run")
    rng = random.Random(0)
    for number in (*range(4, 12), *rng.sample(range(12, first), 4)):
        disk = tmp_path / f"after {number}"
        lay(disk, {}, scene.journal.left(number, rng))
        run = disk / "new" / "folders" / "run"
        training.record(run, 0, kills.STEPS, resume=True)
        assert read_steps(run).of_steps() == truth.of_steps()
