"""What a counterfactual question asks of a run: of which queries, summed into which groups, along which axes."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from math import ceil
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
import xarray as xr
from torch import nn
from tqdm import tqdm

from .budget import divide
from .errors import WorkerError
from .executor import Tasks
from .layout import group_tensors
from .marginals import Axes, bytes_of, choose
from .measure import Measurement
from .pair import Pair
from .path import Measured
from .plan import sizes_of
from .query import query_of
from .result import Labelled, join
from .run import Run

Answer = TypeVar("Answer", bound=Labelled)
PARTS = 8  # that workers are given the queries in, where memory asks for no more: each goes through all steps by itself


class Backwards(Protocol):
    """What goes through the steps; pickles."""

    def dataset(self, part: int, heard: Callable[[], Any] = ...) -> xr.Dataset:
        """Of a part of the queries. heard: called when a step is done."""
        ...


def nothing() -> None:
    """Hears of a step on a worker."""


@dataclass(frozen=True)
class Asked:
    """Of the options of `attrib.difference` and `attrib.influence` those that they share."""

    keep: Sequence[str] | Sequence[Sequence[str]] | None
    groups: Mapping[str, Sequence[str]] | None
    dtype: torch.dtype | None
    progress: bool
    memory: int | None
    executor: Executor | None = None

    def grouping(self, run: Run) -> "Grouping":
        """Raises ValueError where the groups are none."""
        return Grouping(*group_tensors(run.layout.names, self.groups))

    @property
    def by_group(self) -> bool:
        """Whether an axis of groups is kept."""
        kept = [self.keep] if isinstance(self.keep, str) else self.keep
        return kept is None or any("group" in axes for axes in kept)

    def question(self, pair: Pair, model: nn.Module, measurement: Any, grouping: "Grouping") -> "Question":
        """Of the measurement at the last state of the base.

        Raises:
            MeasurementError, KeptAxesError, ValueError: one of them is none.
        """
        run = pair.base.run
        whole = run.whole(pair.base.first + pair.steps).to(next(model.parameters()).device)
        query = query_of(run, model, measurement, self.dtype, whole, range(run.steps))
        sizes = {"step": pair.steps, "example": len(pair.labels), "group": len(grouping.labels)}
        kept = tuple(choose(self.keep, query.count, sizes))
        kind = "influence" if pair.itself else "difference"
        budget = divide(sizes_of(run, bytes_of(kept, query.count, sizes), kind), query.count, self.memory)
        names = measurement.names if isinstance(measurement, Measurement) else ()
        at_once = budget.at_once
        if self.executor is not None:
            at_once = min(at_once, ceil(query.count / PARTS))
        return Question(query.parts(at_once), *grouping, kept, names, budget.slices)

    def answered(
        self, question: "Question", name: str, steps: int, sweep: Backwards, labelled: Callable[[xr.Dataset], Answer]
    ) -> Answer:
        """Of all queries, part by part. labelled: makes a result of what a sweep gives.

        Raises:
            WorkerError: a worker died. What the work itself raises, as it is.
        """
        parts = range(len(question.parts))
        with tqdm(total=steps * len(parts), desc=name, unit="step", delay=2, disable=not self.progress) as bar:
            if self.executor is None:
                return labelled(join([sweep.dataset(part, bar.update) for part in parts], question.names))
            tasks, done = Tasks(self.executor, sweep, PARTS), list[xr.Dataset]()
            sent = [tasks.task(question.said(part), "dataset", part) for part in parts]
            try:
                for later in sent:
                    done.append(later.result())
                    bar.update(steps)
            except WorkerError as error:
                error.result = labelled(join(done, question.names)) if done else None
                raise
            finally:
                for later in sent:
                    later.cancel()
            return labelled(join(done, question.names))


class Grouping(NamedTuple):
    """labels: of G groups. member (K, G): which tensors make each."""

    labels: tuple[str, ...]
    member: np.ndarray


@dataclass(frozen=True)
class Question:
    """parts: the queries, as many at once as fit the memory. labels, member (K, G): the groups. kept: the axes of what is
    kept. names: of the queries, or nothing. slices: bytes of a slice of the passes over the examples."""

    parts: list[Measured]
    labels: tuple[str, ...]
    member: np.ndarray
    kept: tuple[Axes, ...]
    names: tuple[str, ...]
    slices: int

    def said(self, part: int) -> str:
        """Which queries those of a part are."""
        first = sum(p.count for p in self.parts[:part])
        return f"the queries {first} to {first + self.parts[part].count}"


def described(run: Run, measurement: Any) -> dict[str, Any]:
    """For the attributes of a result: the run, and what was measured."""
    return {
        "run": str(run.reader.target),
        "measurement": getattr(measurement, "name", getattr(measurement, "__name__", type(measurement).__name__)),
        "units": getattr(measurement, "units", ""),
        **{key: run.header[key] for key in ("model", "optimizer", "capture", "versions", "recorded")},
        "shares": run.definition,
        "parameters": run.layout.size,
        "tensors": len(run.groups),
        "batch": run.header["slots"],
        "options": run.options,
    }
