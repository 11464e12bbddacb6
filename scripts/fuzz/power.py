"""Cut the power at any file operation, and read what a disk may hold afterwards.

The operations of a process are logged. Up to a cut they are done again on a model of a disk, which keeps of every file each
content since it was last fsynced, and of every name in a folder each file that it stood for since the folder was. Afterwards
any of them may be what is left, a part of a content and nothing included, whatever became of the others: a disk that is as
free as POSIX lets it be, freer than any that exists.

What this cannot show: drives that say they have written what they have not; file systems on which fsync of a folder does not
keep its names (or which cannot open one); damage to what was fsynced long ago; what a crash of the machine does to memory
that is shared with other processes. All that is the damage of `changes`, which is found, but then not mended.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from threading import Lock
from typing import Any

import attrib

from .changes import Files, files_in, lay
from .damage import KEPT
from .kills import RECORDED, STEPS, Log, by_time, fault_of
from .reading import Answers, bits, read_result, read_steps
from .tally import Maker, Outcome
from .taps import Do, Operation, tapped
from .trainings import TRAININGS, Training


@dataclass
class File:
    """contents: since it was last fsynced, the first of them is on the disk."""

    contents: list[bytes] = field(default_factory=lambda: [b""])


@dataclass
class Folder:
    """names: what each stood for since the folder was last fsynced, the first of them is on the disk."""

    names: dict[str, list["File | Folder | None"]] = field(default_factory=dict)

    @classmethod
    def of(cls, path: Path) -> "Folder":
        """One that is on the disk with all that is in it."""
        return cls({p.name: [cls.of(p) if p.is_dir() else File([p.read_bytes()])] for p in path.iterdir()})

    def now(self, name: str) -> "File | Folder | None":
        return self.names.get(name, [None])[-1]

    def put(self, name: str, what: "File | Folder | None") -> None:
        self.names.setdefault(name, [None]).append(what)


class Machine:
    """What a disk holds, and what only memory does, after the operations so far."""

    def __init__(self, root: Path, folder: Folder) -> None:
        self._root, self.folder = root, folder

    def _at(self, path: str) -> tuple[Folder, str]:
        """The folder that a path is in, and its name there."""
        *way, name = os.path.relpath(path, self._root).split(os.sep)
        folder = self.folder
        for step in way:
            inner = folder.now(step)
            assert isinstance(inner, Folder), path
            folder = inner
        return folder, name

    def do(self, operation: Operation) -> None:
        (folder, name), *other = map(self._at, operation.paths)
        if operation.kind == "mkdir":
            folder.put(name, Folder())
        elif operation.kind == "create":
            folder.put(name, File())
        elif operation.kind == "write":
            file = folder.now(name)
            assert isinstance(file, File)
            file.contents.append(file.contents[-1] + operation.content)
        elif operation.kind == "fsync":
            _last(self.folder if name == "." else folder.now(name))
        elif operation.kind == "remove":
            folder.put(name, None)
        else:
            target, new = other[0]
            ours, theirs = folder.now(name), target.now(new)
            target.put(new, ours)
            folder.put(name, theirs if operation.kind == "exchange" else None)


def _last(what: File | Folder | None) -> None:
    """Make what it is now outlast a loss of power."""
    if isinstance(what, File):
        del what.contents[:-1]
    elif what is not None:
        what.names = {name: versions[-1:] for name, versions in what.names.items() if versions[-1] is not None}


def _left(folder: Folder, kept: float, rng: Random) -> Iterator[tuple[str, bytes]]:
    """The files that are left where of what is in memory a share is kept, in any of its versions."""
    for name, versions in folder.names.items():
        what = rng.choice(versions[1:]) if len(versions) > 1 and rng.random() < kept else versions[0]
        if isinstance(what, Folder):
            yield from ((f"{name}/{inner}", content) for inner, content in _left(what, kept, rng))
        elif what is not None:
            content = what.contents[0]
            if len(what.contents) > 1 and rng.random() < kept:
                content = rng.choice(what.contents[1:])
                content = rng.choice((content, content[: rng.randrange(len(content) + 1)], bytes(len(content))))
            yield name, content


def _now(folder: Folder) -> Iterator[tuple[str, bytes]]:
    """The files as whoever reads them sees them."""
    for name, versions in folder.names.items():
        what = versions[-1]
        if isinstance(what, Folder):
            yield from ((f"{name}/{inner}", content) for inner, content in _now(what))
        elif what is not None:
            yield name, what.contents[-1]


@dataclass
class Journal:
    """The operations of a process on a folder, in turn, and what the log of commits said by then. before: what was there."""

    folder: Path
    before: Folder
    operations: list[Operation] = field(default_factory=list)
    said: list[tuple[int, int]] = field(default_factory=list)
    _lock: Any = field(default_factory=Lock)

    @contextmanager
    def kept(self, log: Log) -> Iterator[None]:
        def seen(operation: Operation, do: Do) -> Any:
            with self._lock:
                value = do()  # one that fails changes nothing
                self.operations.append(operation)
                self.said.append(log.steps)
                return value

        with tapped(self.folder, seen):
            yield
        self.said.append(log.steps)
        whole = dict(_now(self.after(len(self.operations)).folder))
        if whole != files_in(self.folder):
            raise RuntimeError(f"operations were not seen, at {whole.keys() ^ files_in(self.folder).keys()}")

    def after(self, number: int) -> Machine:
        """So many operations."""
        machine = Machine(self.folder, _copied(self.before))
        for operation in self.operations[:number]:
            machine.do(operation)
        return machine

    def cut(self, rng: Random) -> tuple[Files, tuple[int, int]]:
        """The files after a loss of power somewhere, and the steps of the commits that had returned and begun by then."""
        number = rng.choice((rng.randrange(len(self.operations) + 1), len(self.operations)))
        return self.left(number, rng), self.said[number]

    def left(self, number: int, rng: Random) -> Files:
        """The files after so many operations and a loss of power: all that is in memory lost, none of it, or any part."""
        return dict(_left(self.after(number).folder, rng.choice((0.0, 1.0, 0.5, rng.random())), rng))


def _copied(folder: Folder) -> Folder:
    return Folder(
        {name: [_copied(v[0]) if isinstance(v[0], Folder) else replace(v[0])] for name, v in folder.names.items()}
    )


Judge = Callable[[Path, tuple[int, int], Random], str]


@dataclass(frozen=True)
class Scene:
    """journal: of what is cut short. judge: what is wrong with a folder that is left, after commits that had returned and
    begun; empty where nothing is."""

    kind: str
    folder: Path
    journal: Journal
    judge: Judge

    def __call__(self, rng: Random) -> Outcome:
        files, said = self.journal.cut(rng)
        with TemporaryDirectory(dir=self.folder) as disk:
            lay(Path(disk), {}, files)
            fault = self.judge(Path(disk), said, rng)
        return Outcome(self.kind, "wrong" if fault else "right", fault)


def recording(name: str, folder: Path) -> Scene:
    """A training, in a folder that is made for it."""
    (folder / "disk").mkdir()
    journal, place = _recorded(RECORDED[name], folder, "new/folders/run", overwrite=False)
    return Scene(f"recording {name}, power lost", folder, journal, _judge_of(RECORDED[name], folder / "disk", place))


def replacing(folder: Path) -> Scene:
    """A training, in place of an old run."""
    training = RECORDED["gradients"]
    training.record(folder / "disk" / "run", 1)
    old = read_steps(folder / "disk" / "run")
    journal, place = _recorded(training, folder, "run", overwrite=True)
    judge = _judge_of(training, folder / "disk", place)

    def either(disk: Path, said: tuple[int, int], rng: Random) -> str:
        if read_steps(disk / place) == old:
            return "the old run is there after the new one had steps" if said[0] else ""
        return judge(disk, said, rng)

    return Scene("replacing a run, power lost", folder, journal, either)


def _recorded(training: Training, folder: Path, place: str, overwrite: bool) -> tuple[Journal, str]:
    journal, log = Journal(folder / "disk", Folder.of(folder / "disk")), Log(folder / "log")
    with by_time(), log.kept(), journal.kept(log):
        training.record(folder / "disk" / place, 0, STEPS, overwrite=overwrite)
    return journal, place


def _judge_of(training: Training, disk: Path, place: str) -> Judge:
    truth = read_steps(disk / place)

    def judge(disk: Path, said: tuple[int, int], rng: Random) -> str:
        left = read_steps(disk / place)
        fault = fault_of(left, truth, *said)
        if fault or rng.random() < 0.75 or left.get(("complete", None)) == bits(True):
            return fault
        with by_time():  # every fourth is gone on with
            gone_on = Answers()
            gone_on.ask("record", None, training.record, disk / place, 99 if left.of_steps() else 0, STEPS, resume=True)
        after = read_steps(disk / place)
        wrong = [*gone_on.refusals, *gone_on.strays, *after.refusals]
        return f"gone on with: {wrong[:1]}" if wrong or after.of_steps() != truth.of_steps() else ""

    return judge


def saving(old: bool, folder: Path) -> Scene:
    """A result, in a folder that is made for it, or in place of an old one."""
    training, disk = TRAININGS["gradients"], folder / "disk"
    disk.mkdir()
    place, results = "result" if old else "new/result", []
    for seed in (0, 1):
        training.record(folder / f"run {seed}", seed)
        results.append(training.attribute(attrib.open_run(folder / f"run {seed}"), keep=KEPT))
    if old:
        results[0].save(disk / place)
    before = read_result(disk / place, False)
    journal = Journal(disk, Folder.of(disk))
    with journal.kept(Log(folder / "log")):
        results[1].save(disk / place, overwrite=old)
    journal.said[-1] = (1, 1)  # it had returned
    truth = read_result(disk / place, False)

    def judge(disk: Path, said: tuple[int, int], rng: Random) -> str:
        left = read_result(disk / place, False)
        if left == truth or (not said[0] and old and left == before):
            return ""
        nothing = left.refusals and all("no result is stored" in text for text in left.refusals)
        return (
            "" if nothing and not said[0] and not old else f"neither old nor new: {(left.strays + left.refusals)[:1]}"
        )

    return Scene("replacing a result, power lost" if old else "saving a result, power lost", folder, journal, judge)


CUTS: list[Maker] = [
    *(partial(recording, name) for name in RECORDED),
    replacing,
    partial(saving, False),
    partial(saving, True),
]
