"""Damage the files of recorded runs and saved results, read everything, and say what came of it.

detected    an error that names a file or array that was changed; everything else reads as before
harmless    everything that was asked reads as before, bit for bit
silent      something reads otherwise, without an error
stray       an exception that nobody raised on purpose
unnamed     an error that names no file or array that was changed
unverified  an error from reading, but none from `attrib.verify`
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import attrib

from . import changes
from .changes import Files, files_in, lay
from .reading import Answers, Refused, names_one, read_result, read_run, read_steps
from .tally import Maker, Outcome
from .trainings import STEPS, TRAININGS, Training

KEPT = [["step", "example"], ["example", "group"], ["step", "group"]]
COMMANDS = 0.25  # of the trials in which the command line is asked too, though there were errors


@dataclass(frozen=True)
class Subject:
    """A store that is damaged again and again. others: stores like it. read: everything that it says, given the folder and
    whether to ask the command line too; truth: what that is."""

    name: str
    folder: Path
    files: Files
    others: list[Files]
    read: Callable[[Path, bool], Answers]
    truth: Answers
    metadata: bool

    def __call__(self, rng: Random) -> Outcome:
        kind, after = changes.drawn(self.files, self.others, rng, self.metadata)
        lay(self.folder, self.files, after)
        try:
            answers = self.read(self.folder, rng.random() < COMMANDS)
        finally:
            lay(self.folder, files_in(self.folder), self.files)
        names = changes.touched(self.files, after)
        verdict, why = judged(answers, self.truth, names, self.folder)
        return Outcome(kind, verdict, f"{self.name}, {sorted(names)[:4]}: {why}")


def judged(answers: Answers, truth: Answers, names: set[str], folder: Path) -> tuple[str, str]:
    """The verdict, and where it is a bad one why."""
    if answers.strays:
        return "stray", answers.strays[0]
    differing = answers.differing(truth)
    if changes.ROOT in names and any(isinstance(answer, Refused) for answer in answers.values()):
        differing = [
            label for label in differing if label != ("header", None)
        ]  # another's is whole until chunks are read
    if differing:
        return "silent", f"{differing[:5]} differ"
    if not answers.refusals:
        return "harmless", ""
    unnamed = [message for message in answers.refusals if not names_one(message, names, folder)]
    if unnamed:
        return "unnamed", unnamed[0]
    if ("verify", None) in answers and not isinstance(answers["verify", None], Refused):
        return "unverified", answers.refusals[0]
    return "detected", ""


def run_subject(name: str, metadata: bool, folder: Path) -> Subject:
    """A run; one that ended early is also gone on with, each time."""
    training, place = TRAININGS[name], folder / "run"
    training.record(place, 0)
    training.record(folder / "other seed", 1)
    training.record(folder / "fewer steps", 0, steps=3)
    others = [files_in(folder / other) for other in ("other seed", "fewer steps")]

    def read(at: Path, commands: bool) -> Answers:
        answers = read_run(at, training, commands)
        if training.early:
            answers.ask("gone on with", None, _gone_on, training, at)
        return answers

    files = files_in(place)
    truth = read(place, True)
    lay(place, files_in(place), files)
    return Subject(name, place, files, others, read, truth, metadata)


def _gone_on(training: Training, place: Path) -> Any:
    """What its steps say once there are two more."""
    replace(training, early=False).record(place, 99, STEPS + 2, resume=True)
    answers = read_steps(place)
    if answers.refusals:
        raise attrib.errors.StoreError(answers.refusals[0])
    return list(answers.of_steps().items())


def result_subject(name: str, metadata: bool, folder: Path) -> Subject:
    training = TRAININGS[name]
    for seed, store in enumerate(("result", "other")):
        training.record(folder / f"run {seed}", seed)
        training.attribute(attrib.open_run(folder / f"run {seed}"), keep=KEPT).save(folder / store)
    place = folder / "result"
    files, others = files_in(place), [files_in(folder / "other")]
    return Subject(f"result of {name}", place, files, others, read_result, read_result(place, True), metadata)


RUNS: list[Maker] = [partial(run_subject, name, False) for name in TRAININGS]
RESULTS: list[Maker] = [partial(result_subject, name, False) for name in ("gradients", "replay, few states")]
METADATA: list[Maker] = [
    *(partial(run_subject, name, True) for name in TRAININGS),
    partial(result_subject, "gradients", True),
]
