"""Attempts to prove the store wrong, a few of each kind that `scripts/fuzz_store.py` makes; and what these have found."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))
from fuzz.reading import read_steps
from fuzz.trainings import STEPS, TRAININGS, Training

import attrib
from attrib.errors import StoreError, StoreExistsError
from attrib.store import FORMAT, creation
from attrib.store.seal import sealed
from attrib.store.sealing import SealingStore


BARE = {"kind": "run", "format": FORMAT, "sealed": {"arrays": {}, "closed": 0, "chain": "", "recent": {}}}


def full(*_: object, **options: object) -> None:
    raise OSError(28, "No space left on device")


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


@pytest.mark.parametrize("made", [0, 1, 4, 11])
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
