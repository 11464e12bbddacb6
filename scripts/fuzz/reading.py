"""Everything that can be read of a run or of a result, question by question, as bits.

An answer is what was read, or `Refused` by an error that says what is wrong, or a `Stray` exception, which nobody raised on
purpose.
"""

import io
import traceback
from collections.abc import Callable, Iterable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
import xarray as xr

import attrib
from attrib.cli import main
from attrib.report.payload import payload

from .trainings import Training

Label = tuple[str, int | None]  # a question, and the step it is about


class Refused(NamedTuple):
    message: str


class Stray(NamedTuple):
    message: str


class CommandError(attrib.errors.AttribError):
    """A command ended with a message and another status than 0."""


class Answers(dict[Label, Any]):
    def ask(self, question: str, step: int | None, ask: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """The value, which is kept as bits; None where there was none."""
        try:
            value = ask(*args, **options)
            self[question, step] = bits(value)
            return value
        except attrib.errors.AttribError as error:
            self[question, step] = Refused(str(error))
        except Exception as error:  # whatever it is, it is what is looked for here
            frames = traceback.extract_tb(error.__traceback__)[-3:]
            where = ", ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames)
            self[question, step] = Stray(f"{question}, {step}: {error!r}"[:600] + f" at {where}")
        return None

    @property
    def refusals(self) -> list[str]:
        return [answer.message for answer in self.values() if isinstance(answer, Refused)]

    @property
    def strays(self) -> list[str]:
        return [answer.message for answer in self.values() if isinstance(answer, Stray)]

    def differing(self, truth: "Answers") -> list[Label]:
        """The questions that were answered, and otherwise than in truth."""
        answered = {label for label, answer in self.items() if not isinstance(answer, Refused | Stray)}
        return sorted((label for label in answered if self[label] != truth.get(label)), key=str)

    def of_steps(self) -> "Answers":
        """Those that are the same whenever the run is recorded."""
        return Answers({k: v for k, v in self.items() if k[1] is not None and k[0] != "seconds"})


def bits(value: Any) -> Any:
    """Something that is equal only to the very same: NaN to NaN, 0.0 not to -0.0."""
    if isinstance(value, attrib.Run):
        value = type(value).__name__  # its answers stand for it
    if isinstance(value, attrib.Result):
        value = value.dataset
    if isinstance(value, attrib.ledger.Ledger):
        value = value.terms
    if isinstance(value, torch.Tensor):
        value = value.detach().numpy()
    if isinstance(value, np.ndarray):
        content = value.tolist() if value.dtype == object else np.ascontiguousarray(value).tobytes()
        return str(value.dtype), value.shape, content
    if isinstance(value, float | np.floating):
        return np.float64(value).tobytes()
    if isinstance(value, pd.DataFrame):
        return tuple((name, bits(column.to_numpy())) for name, column in value.items())
    if isinstance(value, xr.Dataset):
        return {str(n): bits(v) for n, v in value.variables.items()}, bits(value.attrs)
    if isinstance(value, xr.Variable | xr.DataArray):
        return value.dims, bits(value.values), bits(dict(value.attrs))
    if isinstance(value, dict):
        return {key: bits(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [bits(v) for v in value]
    return type(value).__name__, value if isinstance(value, str | int | bool | type(None)) else repr(value)


def read_run(place: Path, training: Training, commands: bool) -> Answers:
    """What a run says; asked by the command line too where there was no error before, or where that is wanted."""
    answers = Answers()
    run = answers.ask("run", None, attrib.open_run, place)
    if run is not None:
        _facts(answers, run)
        _steps(answers, run)
        answers.ask("optimizer", None, lambda: run.optimizer(training.model(), run.steps).state_dict()["state"])
        result = answers.ask("result", None, lambda: training.attribute(attrib.open_run(place)))
        if result is not None:
            answers.ask("check", None, result.check)
        answers.ask("verify", None, verified, place)
    for command in ("info", "verify") if commands or not answers.refusals else ():
        answers.ask(f"attrib {command}", None, commanded, command, str(place))
    return answers


def read_steps(place: Path) -> Answers:
    """What a run says of its steps, and whether it can be verified."""
    answers = Answers()
    run = answers.ask("run", None, attrib.open_run, place)
    if run is not None:
        _steps(answers, run)
        answers.ask("complete", None, lambda: run.complete)
        answers.ask("verify", None, verified, place)
    return answers


def _facts(answers: Answers, run: attrib.Run) -> None:
    answers.ask("header", None, lambda: run.header)
    answers.ask("described", None, lambda: [line for line in str(run).splitlines() if not line.startswith("size")])
    answers.ask("constants", None, run.constants)
    answers.ask("examples", None, lambda: run.examples)
    answers.ask("options", None, lambda: run.options)


def _steps(answers: Answers, run: attrib.Run) -> None:
    for step in range(run.steps + 1):
        answers.ask("vector", step, run.vector, step)
    for step in range(run.steps):
        for name in ("index", "batch", "scales", "random_state"):
            answers.ask(name, step, getattr(run, name), step)
        if run.capture == "gradients":
            answers.ask("shares", step, run.shares, step)
        if run.capture == "factors":
            answers.ask("factors", step, run.factors, step)
    for name in ("loss", "batch_identity", "step_identity", "split_identity", "seconds"):
        log = answers.ask(name, None, run.log, name)
        answers.update({(name, step): bits(value) for step, value in enumerate(() if log is None else log)})


def read_result(place: Path, commands: bool) -> Answers:
    """What a saved result says."""
    answers = Answers()
    result = answers.ask("result", None, attrib.open_result, place)
    if result is not None:
        answers.ask("load", None, lambda: attrib.open_result(place).dataset.load())
        for axes in [(), *result.kept]:
            answers.ask(f"by {axes}", None, result.by, *axes)
        for name in ("check", "timeline", "top"):
            answers.ask(name, None, getattr(result, name))
        answers.ask("page", None, payload, attrib.open_result(place), None, None, None, False)
    for command in ("top", "timeline") if commands or not answers.refusals else ():
        answers.ask(f"attrib {command}", None, commanded, command, str(place))
    return answers


def verified(place: Path) -> Any:
    """What `attrib.verify` says; its failure is raised."""
    verification = attrib.verify(attrib.open_run(place), progress=False)
    if verification.failure is not None:
        raise CommandError(verification.failure)
    return verification.chunks, verification.identities


def commanded(*words: str) -> list[str]:
    """What a command prints, but for sizes; what it complains of is raised."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        status = main(list(words))
    if status:
        raise CommandError(out.getvalue() + err.getvalue())
    return [line for line in out.getvalue().splitlines() if not line.startswith("size")]


def names_one(message: str, names: Iterable[str], place: Path) -> bool:
    """Whether an error names one of some files, or its array; the root's is the store itself."""
    arrays = {name.split("/c/")[0].removesuffix("/zarr.json") for name in names}
    return (
        any(name in message for name in names)
        or any(repr(array) in message or f"{array}/" in message for array in arrays)
        or ("zarr.json" in names and str(place) in message)
    )
