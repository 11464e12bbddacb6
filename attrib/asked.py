"""What a counterfactual question asks of a run: of which queries, summed into which groups, along which axes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import xarray as xr
from torch import nn
from tqdm import tqdm

from .budget import divide
from .layout import group_tensors
from .marginals import Axes, bytes_of, choose
from .measure import Measurement
from .pair import Pair
from .path import Measured
from .plan import sizes_of
from .query import query_of
from .result import join
from .run import Run


@dataclass(frozen=True)
class Asked:
    """Of the options of `attrib.difference` and `attrib.influence` those that they share."""

    keep: Sequence[str] | Sequence[Sequence[str]] | None
    groups: Mapping[str, Sequence[str]] | None
    dtype: torch.dtype | None
    progress: bool
    memory: int | None

    def grouping(self, run: Run) -> "Grouping":
        """Raises ValueError where the groups are none."""
        return Grouping(*group_tensors(run.layout.names, self.groups))

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
        return Question(query.parts(budget.at_once), *grouping, kept, names, budget.slices)

    def answered(
        self, question: "Question", name: str, steps: int, sweep: Callable[[Measured, Callable[[], Any]], xr.Dataset]
    ) -> xr.Dataset:
        """One dataset of all queries. sweep: of some of them, which says when a step is done."""
        count = steps * len(question.parts)
        with tqdm(total=count, desc=name, unit="step", delay=2, disable=not self.progress) as bar:
            return join([sweep(part, bar.update) for part in question.parts], question.names)


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
