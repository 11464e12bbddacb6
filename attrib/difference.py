"""difference(): why two runs differ, exactly.

    m(theta'_T) - m(theta_T) = examples + reduction + options + start + penalty + context + buffers + residual

of a run and another one over the same batches: a replay with some examples left out or weighed otherwise, other options, a
changed start, or a training of the user's own. What each term is stands in `causes`. Sums are in float64.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn
from tqdm import tqdm

from .accounting import over_tensors
from .budget import divide
from .buffers import owners
from .causes import VIA, Causes, Done
from .functional import differentiable, uncompiled
from .layout import group_tensors
from .marginals import Axes, Slots, bytes_of, choose
from .matching import check_model
from .measure import Measurement
from .optim import Carried
from .pair import Pair, paired
from .parts import PREFIX
from .path import Measured, Path, Secant
from .plan import sizes_of
from .query import query_of
from .result import Difference, join
from .result.difference import LARGE, SAYS
from .run import Run
from .tally import Tally, total

log = logging.getLogger("attrib")
VECTORS = 4  # times as many per query as accounting holds
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

    Raises:
        ReplayError: the runs cannot be compared; says why, and at which step. ModelMismatchError, MeasurementError,
        LossError, StoreError, KeptAxesError, ValueError. Nothing is written.

    Example:
        >>> changed = attrib.replay(run, 0, Drop(ids), model=model, loss=loss, store="without.zarr")  # doctest: +SKIP
        >>> print(attrib.difference(run, changed, model, measurement, loss=loss).check())  # doctest: +SKIP
    """
    if via not in VIA:
        raise ValueError(f"via is none: got {via!r}, expected one of {', '.join(map(repr, VIA))}.")
    model = uncompiled(model)
    for run in (base, changed):
        check_model(run, model)
    labels, member = group_tensors(base.layout.names, groups)
    pair = paired((base, changed), model, loss, member)
    ends = base.whole(pair.base.first + pair.steps), changed.whole(pair.changed.first + pair.steps)
    device = next(model.parameters()).device
    query = query_of(base, model, measurement, dtype, ends[0].to(device), range(base.steps))
    sizes = {"step": pair.steps, "example": len(pair.labels), "group": len(labels)}
    kept = tuple(choose(keep, query.count, sizes))
    budget = divide(sizes_of(base, bytes_of(kept, query.count, sizes)), query.count, memory)
    parts, done = query.parts(max(1, budget.at_once // VECTORS)), []
    bar = tqdm(total=pair.steps * len(parts), desc="difference", unit="step", delay=2, disable=not progress)
    with bar:
        for part in parts:
            integrated = Integrated.of(part, path or Secant(), ends)
            sweep = _Sweep(Causes(pair, via), member, kept)
            done.append(sweep.dataset(integrated, labels, lambda: bar.update()))
    names = measurement.names if isinstance(measurement, Measurement) else ()
    whole = join(done, names).assign_coords(example=pair.labels).assign_attrs(_facts(pair, measurement, via))
    result = Difference(whole)
    if (times := float(result.cancellation.max())) > LARGE:
        log.warning(
            "the terms cancel: they are %.3g times what they sum to, so that little can be read from each. The two runs have "
            'come apart; compare fewer steps, a smaller change, or ask for via="reaction"',
            times,
        )
    return result


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
            buffers = np.zeros((query.count, len(query.parameters.names)))
            for n, owner in enumerate(owners(query.parameters, query.buffers)):
                buffers[:, owner] += each[:, n]
        start, end = (t.double().cpu().numpy() for t in (found.start, found.end))
        return cls(vectors[:, :size].cpu().contiguous(), buffers, start, end)


@dataclass
class _Sweep:
    """Backwards through the pair."""

    causes: Causes
    member: np.ndarray
    kept: tuple[Axes, ...]

    def dataset(self, integrated: Integrated, labels: tuple[str, ...], heard: Callable[[], Any]) -> xr.Dataset:
        pair = self.causes.pair
        carried = Carried.of(pair.base.run.rules, integrated.vectors)

        def tallies() -> Iterator[Tally]:
            nonlocal carried
            for number in reversed(range(pair.steps)):
                after = carried
                done, carried = self.causes.step(number, after)
                yield self._tally(number, done, [float_norms(c.theta) for c in (carried, after)])
                heard()

        whole = total(tallies(), range(pair.steps), np.arange(len(pair.labels)))
        assert whole is not None
        beside = {"start": self.causes.start(carried) @ self.member}
        if integrated.buffers is not None:
            beside["buffers"] = integrated.buffers @ self.member
        return _dataset(whole, beside, integrated, labels)

    def _tally(self, number: int, done: Done, growth: list[np.ndarray]) -> Tally:
        values = done.values @ self.member
        nothing = np.zeros((len(values), values.shape[2]))
        rows = {name: done.rows[name] @ self.member if name in done.rows else nothing for name in ROWS}
        gross = np.abs(values.sum(2)).sum(1) + sum(np.abs(row).sum(1) for row in rows.values())
        slots = Slots(done.examples)
        return Tally(
            steps=range(number, number + 1),
            examples=slots.examples,
            marginals=slots.sums(self.kept, values),
            rows={name: row[:, None] for name, row in rows.items()},
            states={"growth": np.stack(growth, 1)},
            sums={"examples": values.sum((1, 2)), "gross": gross},
        )


def float_norms(vectors: Tensor) -> np.ndarray:
    """(Q, P) -> (Q,)."""
    return vectors.norm(dim=1).cpu().numpy()


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
        **{name: (("query", "group"), row) for name, row in beside.items() if row.any() or name == "start"},
        "growth": (("query", "state"), whole.states["growth"]),
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


def _facts(pair: Pair, measurement: Any, via: str) -> dict[str, Any]:
    base, changed = pair.base.run, pair.changed.run
    return {
        "run": str(base.reader.target),
        "changed": str(changed.reader.target),
        "first": [pair.base.first, pair.changed.first],
        "via": via,
        "measurement": getattr(measurement, "name", getattr(measurement, "__name__", type(measurement).__name__)),
        "units": getattr(measurement, "units", ""),
        **{key: base.header[key] for key in ("model", "optimizer", "capture", "versions", "recorded")},
        "shares": base.definition,
        "parameters": base.layout.size,
        "tensors": len(base.groups),
        "batch": base.header["slots"],
        "options": base.options,
        "meaning": f"the ledger of a difference that was run: {SAYS[via]}",
    }
