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
from dataclasses import dataclass, replace
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from shutil import copytree, rmtree
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
from attrib.kernels import contraction

import attrib
from attrib.store import schema, writer
from attrib.store.sealing import SealingStore

from .damage import KEPT, Tally
from .reading import Answers, Refused, Stray, bits, read_result, read_steps
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


# one trial each: what was done, and what is wrong, empty where nothing is


@dataclass(frozen=True)
class Scene:
    """What trials start from. truths: of each training's whole run, what its steps say; operations: how many it took, in how
    many seconds. old, new: results and runs that replace each other, with what they say."""

    folder: Path
    truths: dict[str, Answers]
    operations: dict[str, int]
    seconds: dict[str, float]
    read: dict[str, Answers]

    @classmethod
    def made(cls, folder: Path) -> "Scene":
        truths, operations, seconds = {}, {}, {}
        for n, (name, training) in enumerate(RECORDED.items()):
            began = time.monotonic()
            store = folder / f"whole {n}" / "run"
            operations[name] = done(record, training, store, Log(folder / f"log {n}"), Counter(), 0)
            seconds[name] = time.monotonic() - began
            truths[name] = done(read_steps, store)
        read = {}
        for seed, name in enumerate(("old", "new")):
            done(TRAININGS["gradients"].record, folder / f"{name} run", seed)
            operations[f"save {name}"] = done(save, folder / f"{name} run", folder / name / "result", Counter())
            read[f"{name} run"] = done(read_steps, folder / f"{name} run")
            read[name] = done(read_result, folder / name / "result", True)
        return cls(folder, truths, operations, seconds, read)

    def death(self, rng: Random, name: str) -> tuple[Counter, float | None, str]:
        """At a file operation, with a part of what it wrote; or after a time."""
        if rng.random() < 0.85:
            number = rng.randrange(1, self.operations[name] + 1)
            return Counter(number, rng.choice((0.0, 1.0, rng.random()))), None, "at an operation"
        return Counter(), rng.random() * self.seconds.get(name, 1.0), "after a time"


def recording(scene: Scene, rng: Random, place: Path) -> tuple[str, str]:
    """A recorder is killed, and what it left read; every other time another goes on, which may be killed as well."""
    name = rng.choice(sorted(RECORDED))
    training, truth, log = RECORDED[name], scene.truths[name], Log(place / "log")
    counter, until, when = scene.death(rng, name)
    ended = forked(record, training, place / "run", log, counter, 0, until=until)
    kind = f"recorder killed {when}" if ended.status else "recorder not killed"
    goes_on = rng.random() < 0.5
    for again in range(4):
        if fault := _wrong(ended):
            return kind, f"{name}: {fault}"
        left = done(read_steps, place / "run")
        if fault := fault_of(left, truth, *log.steps):
            return kind, f"{name}: {fault}"
        if left.get(("complete", None)) == bits(True):
            return kind, "" if left.of_steps() == truth.of_steps() else f"{name}: the whole run is another"
        if not goes_on:
            return kind, ""
        kind, until = f"{kind.removesuffix(', gone on')}, gone on", None
        counter = Counter() if again == 2 else scene.death(rng, name)[0]
        seed = 99 if log.steps[0] else 0  # a run without a step is begun again
        ended = forked(record, training, place / "run", log, counter, seed, "resume", until=until)
    return kind, f"{name}: not complete"


def _wrong(ended: Ended) -> str:
    """With a process that ended otherwise than by itself or by being killed."""
    if isinstance(ended.value, Refused | Stray):
        return f"{type(ended.value).__name__}: {ended.value.message}"
    return "" if ended.status in (0, -signal.SIGKILL) else f"status {ended.status}"


def saving(scene: Scene, rng: Random, place: Path) -> tuple[str, str]:
    """A process is killed in `Result.save(overwrite=True)`."""
    copytree(scene.folder / "old" / "result", place / "result")
    counter = scene.death(rng, "save new")[0]
    ended = forked(save, scene.folder / "new run", place / "result", counter)
    left = done(read_result, place / "result", True)
    for name in ("old", "new"):
        if left == scene.read[name]:
            return f"saving killed: the {name} result", _wrong(ended)
    return "saving killed", f"{ended}: neither old nor new: {(left.refusals + left.strays)[:1]}"


def replacing(scene: Scene, rng: Random, place: Path) -> tuple[str, str]:
    """A recorder is killed that replaces a run, mostly before its first step is made."""
    name = "gradients"
    copytree(scene.folder / "old run", place / "run")
    counter = Counter(rng.randrange(1, scene.operations[name] // rng.choice((1, 2, 4))))
    log = Log(place / "log")
    ended = forked(record, RECORDED[name], place / "run", log, counter, 0, "overwrite")
    left = done(read_steps, place / "run")
    if left == scene.read["old run"]:
        return "replacing killed: the old run", _wrong(ended)
    return "replacing killed: the new run", _wrong(ended) or fault_of(left, scene.truths[name], *log.steps)


def campaign(count: int, seed: int, folder: Path) -> Tally:
    """So many processes killed, in a folder that is empty."""
    prepare()
    scene, tally, rng = Scene.made(folder), Tally(), Random(seed)
    for n in range(count):
        place = folder / f"trial {n}"
        place.mkdir()
        trial = rng.choices((recording, saving, replacing), (4, 1, 1))[0]
        kind, fault = trial(scene, rng, place)
        tally.note(kind, "wrong" if fault else "right", fault)
        rmtree(place)
    return tally
