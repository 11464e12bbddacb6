"""Kill a process while it records, goes on, saves or replaces, and read what it left.

A killed recorder must have left all steps of the last commit that had returned, or of the one that it was in, bit for bit
those of a run that nobody killed; and be able to go on to that run's end. What replaces something leaves the old or the new.

Every process is forked from one that has no threads: it only forks and waits. It imported torch before, so a fork takes
hundredths of a second where a new interpreter takes seconds.
"""

import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from shutil import copytree
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
from attrib.kernels import contraction

import attrib
from attrib.store import schema, writer
from attrib.store.sealing import SealingStore

from .damage import KEPT
from .reading import Answers, Refused, Stray, bits, read_result, read_steps
from .tally import Maker, Outcome
from .taps import Counter, tapped
from .trainings import TRAININGS, Training, adamw, momentum

STEPS = 9
BLOCK = 4  # steps of a block that nobody chose, here
COMMITTED = ("replay", "replay, few states", "gradients", "factors")  # in whole blocks
BY_TIME = {
    "replay, by time": Training(
        "replay", adamw, lengths=(1, 1, 1, 1, 2, 3), named=True, dropout=0.3, options={"block": None}
    ),
    "gradients, by time": replace(TRAININGS["gradients"], optimizer=momentum, options={"block": None}),
    "factors, few states, by time": Training("factors", adamw, (4, 3), options={"block": None, "states_every": 8}),
}
RECORDED = {
    **{name: TRAININGS[name] for name in COMMITTED},
    **BY_TIME,
}


class Ended(NamedTuple):
    """status: 0, or minus a signal. value: what the task returned, None where it did not get that far."""

    status: int
    value: Any


def forked(task: Callable[..., Any], *args: Any, until: float | None = None) -> Ended:
    """A task in a process of its own, which is killed after so many seconds, where they are said."""
    context = get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(sender, task, *args))
    process.start()
    sender.close()
    if until is not None:
        process.join(until)
        process.kill()
    try:
        value = receiver.recv()
    except EOFError:
        value = None
    process.join()
    assert process.exitcode is not None
    return Ended(process.exitcode, value)


def done(task: Callable[..., Any], *args: Any) -> Any:
    """What a task returns in a process that nothing happens to."""
    ended = forked(task, *args)
    if ended.status or isinstance(ended.value, Refused | Stray):
        raise RuntimeError(f"{task.__name__} failed: {ended}")
    return ended.value


def _answer(sender: Connection, task: Callable[..., Any], *args: Any) -> None:
    try:
        sender.send(task(*args))
    except attrib.errors.AttribError as error:
        sender.send(Refused(str(error)))
    except Exception as error:
        sender.send(Stray(repr(error)[:600]))


def prepare() -> None:
    """What every forked process would have to do first, done once, without a thread."""
    import torch._dynamo

    torch.set_num_threads(1)
    contraction.row_dots(np.ones((2, 3)), np.ones((2, 3)))


# what a commit says


class Log:
    """Commits of a recorder, each noted when it begins and when it returns, in a file that outlives the process."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @contextmanager
    def kept(self) -> Iterator[None]:
        plain = SealingStore.commit
        file = os.open(self.path, os.O_CREAT | os.O_APPEND | os.O_WRONLY)

        def commit(sealing: Any, facts: dict[str, Any], full: bool) -> None:
            os.write(file, f"begun {facts['committed_steps']}\n".encode())
            plain(sealing, facts, full)
            os.write(file, f"done {facts['committed_steps']}\n".encode())

        with patch.object(SealingStore, "commit", commit):
            yield

    @property
    def steps(self) -> tuple[int, int]:
        """Those of the last commit that returned, and of the last that began."""
        lines = [line.split() for line in self.path.read_text().splitlines()] if self.path.exists() else []
        done = [int(steps) for word, steps in lines if word == "done"]
        return done[-1] if done else 0, int(lines[-1][1]) if lines else 0


@contextmanager
def by_time() -> Iterator[None]:
    """Commit as a block grows, whenever the one before is written; blocks of a few steps."""
    with ExitStack() as stack:
        stack.enter_context(patch.object(writer, "COMMIT_SECONDS", 0.0))
        stack.enter_context(patch.object(writer, "COMMIT_SHARE", math.inf))
        stack.enter_context(patch.object(schema, "BLOCK_STEPS", BLOCK))
        yield


# what is killed: each returns the number of its file operations


def record(training: Training, store: Path, log: Log, counter: Counter, seed: int, *options: str) -> int:
    with by_time(), log.kept(), tapped(store.parent, counter):
        training.record(store, seed, STEPS, **dict.fromkeys(options, True))
    return counter.count


def save(run: Path, place: Path, counter: Counter) -> int:
    result = _attributed(run)
    with tapped(place.parent, counter):
        result.save(place, overwrite=True)
    return counter.count


def _attributed(run: Path) -> attrib.Result:
    return TRAININGS["gradients"].attribute(attrib.open_run(run), keep=KEPT)


def death(rng: Random, operations: int) -> Counter:
    """At one of so many file operations, with a part of what it wrote."""
    return Counter(rng.randrange(1, operations + 1), rng.choice((0.0, 1.0, rng.random())))


# what is left


def fault_of(left: Answers, truth: Answers, done: int, begun: int) -> str:
    """What is wrong with what a killed recorder left; empty where nothing is."""
    if left.strays:
        return f"stray: {left.strays[0]}"
    steps = max((step for question, step in left if question == "vector"), default=0)
    if steps not in (done, begun):
        return f"{steps} steps, expected {done} or {begun}: {left.refusals[:1]}"
    if steps and left.refusals:
        return f"refused: {left.refusals[0]}"
    differing = left.of_steps().differing(truth)
    return f"{differing[:5]} differ" if differing else ""


# trials


class Recording:
    """A recorder is killed, and what it left read; every other time another goes on, which may be killed as well.

    truth: what the steps of the whole run say, which took so many operations and seconds.
    """

    def __init__(self, name: str, folder: Path) -> None:
        self._training, self._folder, self._kind = RECORDED[name], folder, f"recording {name}, killed"
        began = time.monotonic()
        self._operations = done(record, self._training, folder / "whole" / "run", Log(folder / "log"), Counter(), 0)
        self._seconds = time.monotonic() - began
        self._truth = done(read_steps, folder / "whole" / "run")

    def __call__(self, rng: Random) -> Outcome:
        with TemporaryDirectory(dir=self._folder) as folder:
            return self._tried(rng, Path(folder), Log(Path(folder) / "log"))

    def _tried(self, rng: Random, folder: Path, log: Log) -> Outcome:
        counter, until, goes_on, kind = death(rng, self._operations), None, rng.random() < 0.5, self._kind
        if rng.random() < 0.15:
            counter, until = Counter(), rng.random() * self._seconds
        ended = forked(record, self._training, folder / "run", log, counter, 0, until=until)
        for lives in range(4):
            left = done(read_steps, folder / "run")
            if fault := _wrong(ended) or fault_of(left, self._truth, *log.steps):
                return Outcome(kind, "wrong", fault)
            if ("complete", None) in left and left["complete", None] == bits(True):
                whole = left.of_steps() == self._truth.of_steps()
                return Outcome(kind, "right") if whole else Outcome(kind, "wrong", "the whole run is another")
            if not goes_on:
                return Outcome(kind, "right")
            kind = f"{self._kind}, gone on with"
            counter = death(rng, self._operations) if lives < 2 else Counter()
            seed = 99 if log.steps[0] else 0  # a run without a step is begun again
            ended = forked(record, self._training, folder / "run", log, counter, seed, "resume")
        return Outcome(kind, "wrong", "not complete")


def _wrong(ended: Ended) -> str:
    """With a process that ended otherwise than by itself or by being killed."""
    if isinstance(ended.value, Refused | Stray):
        return f"{type(ended.value).__name__}: {ended.value.message}"
    return "" if ended.status in (0, -signal.SIGKILL) else f"status {ended.status}"


class Saving:
    """A process is killed in `Result.save(overwrite=True)`, mostly when what it saved takes its place."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._read = {}
        for seed, name in enumerate(("old", "new")):
            done(TRAININGS["gradients"].record, folder / f"run {name}", seed)
            done(save, folder / f"run {name}", folder / name, Counter())
            self._read[name] = done(read_result, folder / name, True)
        copytree(folder / "old", folder / "replaced" / "result")
        self._operations = done(save, folder / "run new", folder / "replaced" / "result", Counter())
        self._removals = sum(1 for _ in (folder / "old").rglob("*"))

    def __call__(self, rng: Random) -> Outcome:
        with TemporaryDirectory(dir=self._folder) as folder:
            place = Path(folder) / "result"
            copytree(self._folder / "old", place)
            counter = death(rng, self._operations)
            if rng.random() < 0.7:
                counter = Counter(rng.randrange(self._operations - self._removals - 5, self._operations + 1))
            ended = forked(save, self._folder / "run new", place, counter)
            left = done(read_result, place, True)
        for name, read in self._read.items():
            if left == read and not (fault := _wrong(ended)):
                return Outcome(f"replacing a result, killed: the {name} one", "right")
        return Outcome("replacing a result, killed", "wrong", fault or f"neither old nor new: {left.refusals[:1]}")


class Replacing:
    """A recorder is killed that replaces a run, mostly before the new one has steps."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._training = folder, RECORDED["gradients"]
        done(self._training.record, folder / "old", 1)
        self._old = done(read_steps, folder / "old")
        copytree(folder / "old", folder / "replaced" / "run")
        new = folder / "replaced" / "run"
        self._operations = done(record, self._training, new, Log(folder / "log"), Counter(), 0, "overwrite")
        self._truth = done(read_steps, new)

    def __call__(self, rng: Random) -> Outcome:
        with TemporaryDirectory(dir=self._folder) as folder:
            place, log = Path(folder) / "run", Log(Path(folder) / "log")
            copytree(self._folder / "old", place)
            counter = death(rng, self._operations // rng.choice((1, 2, 4)))
            ended = forked(record, self._training, place, log, counter, 0, "overwrite")
            left, said = done(read_steps, place), log.steps
        if left == self._old:
            fault = _wrong(ended) or ("the new one had steps" if said[0] else "")
            return Outcome("replacing a run, killed: the old one", "wrong" if fault else "right", fault)
        fault = _wrong(ended) or fault_of(left, self._truth, *said)
        return Outcome("replacing a run, killed: the new one", "wrong" if fault else "right", fault)


KILLS: list[Maker] = [*(partial(Recording, name) for name in RECORDED), Saving, Replacing]
