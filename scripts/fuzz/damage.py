"""Damage the files of recorded runs and saved results, read everything, and say what came of it.

detected    an error that names a file or array that was changed; everything else reads as before
harmless    everything that was asked reads as before, bit for bit
silent      something reads otherwise, without an error
stray       an exception that nobody raised on purpose
unnamed     an error that names no file or array that was changed
unverified  an error from reading, but none from `attrib.verify`
"""

import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import attrib

from . import changes
from .changes import Files, files_in, lay
from .reading import Answers, Refused, names_one, read_result, read_run
from .trainings import TRAININGS, Training

GOOD = ("detected", "harmless")
KEPT = [["step", "example"], ["example", "group"], ["step", "group"]]


@dataclass
class Tally:
    """How often what came of what. faults: descriptions of all that should not be."""

    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    def note(self, kind: str, verdict: str, fault: str = "") -> None:
        self.counts[kind, verdict] += 1
        if fault:
            self.faults.append(f"{verdict}: {kind}: {fault}")

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(self.counts + other.counts, self.faults + other.faults)


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

    def try_change(self, tally: Tally, rng: Random, only_metadata: bool) -> None:
        kind, after = changes.drawn(self.files, self.others, rng, only_metadata)
        lay(self.folder, self.files, after)
        try:
            answers = self.read(self.folder, rng.random() < 0.25)
        finally:
            lay(self.folder, after, self.files)
        names = changes.touched(self.files, after)
        verdict, why = judged(answers, self.truth, names, self.folder)
        tally.note(kind, verdict, f"{self.name}: {sorted(names)[:4]}: {why}" if why else "")


def judged(answers: Answers, truth: Answers, names: set[str], folder: Path) -> tuple[str, str]:
    """The verdict, and where it is a bad one why."""
    if answers.strays:
        return "stray", answers.strays[0]
    if differing := answers.differing(truth):
        return "silent", f"{differing[:5]} differ"
    if not answers.refusals:
        return "harmless", ""
    unnamed = [message for message in answers.refusals if not names_one(message, names, folder)]
    if unnamed:
        return "unnamed", unnamed[0]
    if ("verify", None) in answers and not isinstance(answers["verify", None], Refused):
        return "unverified", answers.refusals[0]
    return "detected", ""


def run_subjects(folder: Path) -> list[Subject]:
    return [_run_subject(folder / f"run {n}", name, t) for n, (name, t) in enumerate(TRAININGS.items())]


def _run_subject(folder: Path, name: str, training: Training) -> Subject:
    training.record(folder / "run", 0)
    training.record(folder / "other seed", 1)
    training.record(folder / "fewer steps", 0, steps=3)
    others = [files_in(folder / other) for other in ("other seed", "fewer steps")]

    def read(place: Path, commands: bool) -> Answers:
        return read_run(place, training, commands)

    place = folder / "run"
    return Subject(name, place, files_in(place), others, read, read(place, True))


def result_subjects(folder: Path) -> list[Subject]:
    subjects = []
    for n, name in enumerate(("gradients", "replay, few states")):
        training, place = TRAININGS[name], folder / f"result {n}"
        for seed, store in enumerate(("result", "other")):
            training.record(place / f"run {seed}", seed)
            training.attribute(attrib.open_run(place / f"run {seed}"), keep=KEPT).save(place / store)
        files, others = files_in(place / "result"), [files_in(place / "other")]
        subjects.append(
            Subject(
                f"result of {name}", place / "result", files, others, read_result, read_result(place / "result", True)
            )
        )
    return subjects


def campaign(subjects: list[Subject], count: int, seed: int, only_metadata: bool = False) -> Tally:
    """So many changes, of each subject in turn."""
    tally, rng = Tally(), Random(seed)
    for n in range(count):
        subjects[n % len(subjects)].try_change(tally, rng, only_metadata)
        if sys.stderr.isatty() and n % 100 == 0:
            print(f"\r{n} of {count}", end="", file=sys.stderr)
    return tally
