"""Attempts to prove the store wrong, a few of each kind that `scripts/fuzz_store.py` makes; and what these have found."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))
from fuzz.reading import read_steps
from fuzz.trainings import STEPS, TRAININGS, Training

from attrib.store.sealing import SealingStore


def full(*_: object) -> None:
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
