"""difference(): why two runs differ, exactly.

    m(theta'_T) - m(theta_T) = examples + reduction + options + start + penalty + context + buffers + residual

of a run and another one over the same batches: a replay with some examples left out or weighed otherwise, other options, a
changed start, or a training of the user's own. What each term is stands in `causes`. Sums are in float64.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn

from .account import share_bound
from .accounting import over_tensors
from .asked import Asked, Question, described, nothing
from .backwards import backwards
from .buffers import at_owners
from .causes import VIA, Causes, Done
from .functional import differentiable, uncompiled
from .marginals import Slots
from .matching import check_model
from .pair import Pair, paired
from .parts import PREFIX
from .path import Measured, Path, Secant
from .result import Difference
from .result.difference import CHECKED, SAYS
from .run import Run
from .shares import drawn
from .tally import Tally

log = logging.getLogger("attrib")
ROWS = ("reduction", "options", "penalty", "context")  # of every step


@differentiable
def difference(
    base: Run,
    changed: Run,
    model: nn.Module,
    measurement: Any,
    *,
    loss: Callable[..., Tensor],
    via: str = "cause",
    path: Path | None = None,
    keep: Sequence[str] | Sequence[Sequence[str]] | None = None,
    groups: Mapping[str, Sequence[str]] | None = None,
    dtype: torch.dtype | None = None,
    progress: bool = True,
    memory: int | None = None,
    executor: Executor | None = None,
) -> Difference:
    """Write m(changed) - m(base) of two recorded runs as a sum over what was done otherwise.

    The ledger of a counterfactual that was run; neither an account of what happened in one run nor a prediction.

    Args:
        base, changed: runs over the same batches, `changed` a replay of `base` or trained with the same ids at every step.
            Where `changed` begins or ends elsewhere, the steps that they share are compared.
        model: of the recorded architecture; given back as it was.
        measurement: `model -> (Q,)`, or one of `attrib.measure`.
        loss: as given to `attrib.record` for the base; weights that a replay gave to losses are read from its record.
        via: "cause": what was done to each example whose weight differs, carried through what followed; "reaction": what
            every example did otherwise, without a Hessian.
        path: of the measurement between the two ends; None for `Secant()`.
        keep, groups, dtype, progress, memory: see `attrib.attribute`.
        executor: whose workers do it, each some of the queries, see `attrib.attribute`; None: this process.

    Returns:
        A `Difference`, in the measurement's units; positive is what made it higher in the changed run.

    Raises:
        ReplayError: the runs cannot be compared; says why, and at which step. ModelMismatchError, MeasurementError,
        LossError, StoreError, KeptAxesError, ValueError. WorkerError: a worker died; its `result` has the queries before.

    Example:
        >>> print(attrib.difference(run, changed, model, measurement, loss=loss).check())
        query               base      examples     reduction      residual       changed
        0              ...
    """
    if via not in VIA:
        raise ValueError(f"via is none: got {via!r}, expected one of {', '.join(map(repr, VIA))}.")
    model, asked = uncompiled(model), Asked(keep, groups, dtype, progress, memory, executor)
    for run in (base, changed):
        check_model(run, model)
    grouping = asked.grouping(base)
    pair = paired((base, changed), model, loss, grouping.member)
    question = asked.question(pair, model, measurement, grouping)
    ends = base.whole(pair.base.first + pair.steps), changed.whole(pair.changed.first + pair.steps)
    causes = Causes(pair.within(question.slices), via)
    sweep, facts = Sweep(causes, question, path or Secant(), ends), _facts(pair, measurement, via)
    result = asked.answered(question, "difference", pair.steps, sweep, partial(_result, facts, pair.labels))
    if result.warning:
        log.warning("%s", result.warning)
    return result


def _result(facts: Mapping[str, Any], labels: np.ndarray, found: xr.Dataset) -> Difference:
    return Difference(found.assign_coords(example=labels).assign_attrs(facts))


def _facts(pair: Pair, measurement: Any, via: str) -> dict[str, Any]:
    base, changed = pair.base.run, pair.changed.run
    return {
        **described(base, measurement),
        "changed": str(changed.reader.target),
        "interventions": changed.replayed.get("interventions", []),
        "first": [pair.base.first, pair.changed.first],
        "via": via,
        "bound": share_bound(base.compute, base.compute),
        "meaning": f"the ledger of a difference that was run: {SAYS[via]}",
    }


@dataclass(frozen=True)
class Integrated:
    """The measurement between the two ends. vectors (Q, P): along the parameters; buffers (Q, K): what their changes do;
    start, end (Q,)."""

    vectors: Tensor
    buffers: np.ndarray | None
    start: np.ndarray
    end: np.ndarray

    @classmethod
    def of(cls, query: Measured, path: Path, ends: tuple[Tensor, Tensor]) -> "Integrated":
        first, last = (t.to(query.example.device) for t in ends)
        found = path.bind(query)(first, last)
        vectors, size = found.gradient.double(), query.parameters.size
        buffers = None
        if query.buffers.names:
            moved = (last.double() - first.double())[size:]
            each = over_tensors(query.buffers, vectors[:, size:] * moved)
            buffers = at_owners(query.parameters, query.buffers, each)
        start, end = (t.double().cpu().numpy() for t in (found.start, found.end))
        return cls(vectors[:, :size].cpu().contiguous(), buffers, start, end)


@dataclass(frozen=True)
class Sweep:
    """Backwards through a pair. ends (P + E,): the last states of either."""

    causes: Causes
    question: Question
    path: Path
    ends: tuple[Tensor, Tensor]

    def dataset(self, part: int, heard: Callable[[], Any] = nothing) -> xr.Dataset:
        """Of a part of the queries."""
        pair, integrated = self.causes.pair, Integrated.of(self.question.parts[part], self.path, self.ends)
        whole, begun = backwards(self.causes, integrated.vectors, np.arange(len(pair.labels)), self._tally, heard)
        beside = {"start": self.causes.start(begun) @ self.question.member}
        if integrated.buffers is not None:
            beside["buffers"] = integrated.buffers @ self.question.member
        return _dataset(whole, beside, integrated, self.question.labels)

    def _tally(self, number: int, done: Done, growth: tuple[np.ndarray, np.ndarray]) -> Tally:
        gaps = self.causes.gaps(done) if number in drawn(range(self.causes.pair.steps)) else {}
        values = done.values @ self.question.member
        nothing = np.zeros((len(values), values.shape[2]))
        rows = {name: done.rows[name] @ self.question.member if name in done.rows else nothing for name in ROWS}
        gross = np.abs(values.sum(2)).sum(1) + sum(np.abs(row).sum(1) for row in rows.values())
        slots = Slots(done.examples)
        return Tally(
            steps=range(number, number + 1),
            examples=slots.examples,
            marginals=slots.sums(self.question.kept, values),
            rows={name: row[:, None] for name, row in rows.items()},
            states={"growth": np.stack(growth, 1)},
            sums={"examples": values.sum((1, 2)), "gross": gross},
            gaps={name: np.array([gaps.get(name, np.nan)]) for name in CHECKED},
        )


def _dataset(
    whole: Tally, beside: Mapping[str, np.ndarray], integrated: Integrated, labels: tuple[str, ...]
) -> xr.Dataset:
    """beside: (Q, G), what is of no step."""
    initial, final = integrated.start, integrated.end
    rows = {name: whole.rows[name] for name in ROWS if whole.rows[name].any()}
    explained = whole.sums["examples"] + sum(row.sum((1, 2)) for row in rows.values())
    explained = explained + sum(row.sum(1) for row in beside.values())
    gross = whole.sums["gross"] + sum(np.abs(row).sum(1) for row in beside.values())
    variables: dict[str, Any] = {
        "initial": (("query",), initial),
        "final": (("query",), final),
        "residual": (("query",), final - initial - explained),
        "gross": (("query",), gross),
        **{name: (("query", "step", "group"), row) for name, row in rows.items()},
        **{name: (("query", "group"), row) for name, row in beside.items() if row.any()},
        "growth": (("query", "state"), whole.states["growth"]),
        **{f"{name}_identity": (("step",), gaps) for name, gaps in whole.gaps.items()},
        **{"_".join((PREFIX, *axes)): (("query", *axes), a) for axes, a in whole.marginals.items()},
    }
    coordinates = {
        "query": np.arange(len(initial)),
        "step": np.arange(len(whole.steps)),
        "state": np.arange(len(whole.steps) + 1),
        "example": whole.examples,
        "group": list(labels),
    }
    return xr.Dataset(variables, coordinates)
