"""attribute(): one sweep backwards through a run that writes a measurement as a sum of contributions.

    for s = T-1 ... 0:
        Gbar_s                       path gradient: <Gbar_s, Delta_s> = m(theta_{s+1}) - m(theta_s)
        U_s, carry                   the update pulled back: sensitivity of m(theta_T) to the gradient of step s
        <U_s, g_{s,i}>               contribution of example i at step s, per group
        decay, timeline              what weight decay and a penalty did; what the step's update did
    what is left of the carry, times the momentum before the first step: inherited

State: vectors (Q, P) in float64. Nothing has the size of examples x parameters.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn
from tqdm import tqdm

from .budget import Budget, divide
from .errors import Interrupted, MeasurementError
from .functional import differentiable
from .interrupt import Request, interruptible
from .layout import group_tensors
from .marginals import bytes_of, choose
from .measure import Measurement
from .optim import decay_rates, pullback
from .path import Path, PathGradient, Query, Secant, limit_gap
from .plan import sizes_of
from .result import Result, join
from .run import Block, Run, check_model
from .sink import Sink, Terms
from .source import Source, drawn

log = logging.getLogger("attrib")

IDENTITIES = ("split", "limit")  # those that take passes of their own
LIMIT_STEPS = 2  # that the limit is looked at, side by side
GRADIENT, START, END = 3, 4, 5  # where these stand among the sums of a step, see `Terms`


@differentiable
def attribute(
    run: Run,
    model: nn.Module,
    measurement: Any,
    *,
    loss: Callable[..., Tensor] | None = None,
    path: Path | None = None,
    steps: slice | None = None,
    keep: Sequence[str] | Sequence[Sequence[str]] | None = None,
    groups: Mapping[str, Sequence[str]] | None = None,
    dtype: torch.dtype | None = None,
    progress: bool = True,
    cube: Any = None,
    memory: int | None = None,
    identities: Sequence[str] = IDENTITIES,
) -> Result:
    """Write m(theta_b) - m(theta_a) as a sum over training examples, steps and parameter groups.

    Accounting of what happened on the realised path, not a counterfactual.

    Args:
        run: from `attrib.open_run`.
        model: of the recorded architecture. Used on its device, in its mode for the measurement; given back as it was.
        measurement: `model -> (Q,)`, or one of `attrib.measure`.
        loss: as given to `attrib.record`; needed where the run was captured by "replay".
        path: `Secant()` (default), `GaussLegendre(nodes)` or `Midpoint(nodes)`.
        steps: a window slice(a, b), complete by itself; None for the whole run.
        keep: axes to keep contributions along, one set or several, of "step", "example", "group"; None keeps all
            marginals that fit in memory.
        groups: {name: [parameter names or patterns]}; None makes each parameter tensor a group.
        dtype: compute type. None: float64 for the measurement, the recorded type for gradients. Sums are in float64.
        progress: show a bar on work longer than two seconds.
        cube: path or Store to write all contributions to, (query, step, slot, group).
        memory: bytes to hold at most (`attrib.plan`), in as many sweeps as that takes; None: 4 GiB, or for one query.
        identities: those checked beside the three that cost nothing: "split", at a few steps, each share against the
            derivative of its own loss; "limit", that the path tends to the gradient. What is left out the result says.

    Raises:
        ModelMismatchError, MeasurementError, UntraceableModelError, LossError, StoreError, KeptAxesError, ValueError.
        Interrupted: Ctrl-C; its `result` is complete for what was done. A second Ctrl-C stops at once.
    """
    _check_arguments(run, model, path, steps, identities)
    start, stop = _window(run, steps)
    query = _query(run, model, measurement, dtype, run.vector(stop).to(next(model.parameters()).device))
    labels, member = group_tensors(run.layout.names, groups)
    sizes = {"step": stop - start, "example": len(run.examples), "group": len(labels)}
    kept = choose(keep, query.count, sizes)
    budget = _divided(run, query.count, bytes_of(kept, query.count, sizes), memory, cube)
    source = Source(run, model, loss, dtype or run.dtype, query.example.device, budget.slices, member)
    facts, parts = _facts(run, measurement, path or Secant(), dtype, identities), query.parts(budget.at_once)
    sink = partial(Sink, run, start, labels, member, sizes, kept, cube, dtype or run.dtype)
    names = measurement.names if isinstance(measurement, Measurement) else ()
    bar = tqdm(total=sizes["step"] * len(parts), desc="attribute", unit="step", delay=2, disable=not progress)
    with bar, interruptible() as request:
        sweep = Sweep(run, range(start, stop), path or Secant(), source, bar, request, tuple(identities))
        found = join(_sweeps(sweep, parts, sink, facts), names)
    if request.asked:
        raise _interrupted(Result(found), query.count)
    return Result(found)


@dataclass(frozen=True)
class Sweep:
    """What every sweep through the steps needs; `request` says whether to stop; `identities`: those beside the three."""

    run: Run
    steps: range
    path: Path
    source: Source
    bar: Any
    request: Request
    identities: tuple[str, ...]

    @cached_property
    def drawn(self) -> frozenset[int]:
        """The steps whose split is checked."""
        return drawn(self.steps) if "split" in self.identities else frozenset()


def _sweeps(
    sweep: Sweep, parts: Sequence[Query], make_sink: Callable[[int], Sink], facts: dict[str, Any]
) -> list[xr.Dataset]:
    """One sweep for each part of the queries; asked to stop, the parts that are whole, or the first as far as it came."""
    found: list[xr.Dataset] = []
    for part in parts:
        sink = make_sink(part.count)
        reached = _sweep(sweep, part, sink)
        if reached == sweep.steps.start or not found:
            found.append(sink.dataset({**facts, "shares": _definition(sweep)}, reached))
        if sweep.request.asked:
            break
    return found


def _definition(sweep: Sweep) -> str:
    """In a sentence, what a share is in this result."""
    if sweep.source.coupled:
        return (
            "the gradient of the example's own loss; the losses of a batch depend on each other, so it goes through what "
            "the other examples do to it, too"
        )
    return "the gradient of the example's own loss"


def _interrupted(result: Result, asked: int) -> Interrupted:
    """What is done is complete by itself: all steps for the first queries, or a window of the last steps."""
    first, last = result.dataset.attrs["window"]
    return Interrupted(
        f"interrupted: got {result.dataset.sizes['query']} of {asked} queries over the steps {first} to {last}, complete by "
        f"themselves. They are the .result of this exception, in a notebook sys.last_value.result.",
        result,
    )


def _sweep(sweep: Sweep, query: Query, sink: Sink) -> int:
    """The run backwards, for one set of queries; returns the first step done: a later one if it was asked to stop."""
    run, first = sweep.run, sweep.steps.start
    device = query.example.device
    carry = torch.zeros(query.count, run.layout.size, dtype=torch.float64, device=device)
    integrate = sweep.path.bind(query)
    for block in run.blocks(first, sweep.steps.stop):
        if "limit" in sweep.identities and block.steps.stop == sweep.steps.stop:
            at = min(len(block.steps), query.steps_at_once(), LIMIT_STEPS)
            sink.add_limit(limit_gap(query, integrate, block.theta[-at - 1 :].to(device)), query.dtype)
        for done in _sweep_block(sweep, block, integrate, query.steps_at_once(), carry, sink):
            if sweep.request.asked and done > first:
                momentum = next(run.blocks(done, done + 1)).momentum
                sink.close(_tensors(run, carry * momentum.to(device)), complete=False)
                return done
    sink.close(_tensors(run, carry * block.momentum.to(device)))
    return first


def _sweep_block(
    sweep: Sweep, block: Block, integrate: Callable[..., PathGradient], at_once: int, carry: Tensor, sink: Sink
) -> Iterator[int]:
    """One block, backwards, several steps at a time; yields each step that `carry` was moved to before."""
    for stop in range(len(block.steps), 0, -at_once):
        steps = slice(max(0, stop - at_once), stop)
        theta = block.theta[steps.start : stop + 1].to(carry.device)
        terms, sensitivity = _trace_back(sweep.run, block, steps, theta, integrate(theta[:-1], theta[1:]), carry)
        found: list[np.ndarray] = []
        for n in range(steps.start, stop):
            at = n - steps.start
            gradient = terms[GRADIENT][at]
            here = sweep.source.contract(block, n, theta[at], sensitivity[at], gradient)
            if block.start + n in sweep.drawn:
                seen = np.abs(terms[START][at]) + np.abs(terms[END][at])
                split = sweep.source.split(block, n, theta[at], sensitivity[at], here, seen)
                sink.add_split(block.start + n, block.index[n], split)
            found.append(here.values)
            sweep.bar.update()
        sink.add(block.start + steps.start, block.index[steps], Terms(found, *terms))
        del found, sensitivity  # of many queries they are as large as all that the next steps need
        yield block.start + steps.start


def _trace_back(
    run: Run, block: Block, steps: slice, theta: Tensor, path: PathGradient, carry: Tensor
) -> tuple[list[np.ndarray], Tensor]:
    """From Gbar of n steps: the sums of `Terms` over each tensor, and U (n, Q, P), which takes the place of Gbar in memory;
    `carry` is moved to before the steps."""
    vectors = path.gradient.double()
    replayed = torch.stack([delta for _, delta in block.updates[steps]]).to(theta.device)
    recorded = [block.examples[steps], *([] if block.penalty is None else [block.penalty[steps]])]
    leverage = torch.zeros_like(path.start, dtype=torch.float64)
    by_path, by_step = [], []
    for _, part in run.layout.slices():
        states, here = theta[:, part].double(), vectors[..., part]
        along = [states[1:] - states[:-1], replayed[:, part].double(), states[:-1]]
        by_path.append(here @ torch.stack(along, 2))
        leverage += (here.abs() @ states[:-1].abs().unsqueeze(2)).squeeze(2)
    for n in reversed(range(steps.start, steps.stop)):
        parts, at = [part.to(carry.device) for part in block.updates[n][0]], n - steps.start
        vectors[at], carry[...] = pullback(parts, carry, vectors[at])
    for _, part in run.layout.slices():
        along = [theta[:-1, part].double(), *(g[:, part].to(theta.device).double() for g in recorded)]
        by_step.append(vectors[..., part] @ torch.stack(along, 2))
    moved, real, along_theta = torch.stack(by_path, 2).cpu().numpy().transpose(3, 0, 1, 2)
    coupled, gradient, *penalty = torch.stack(by_step, 2).cpu().numpy().transpose(3, 0, 1, 2)
    rates = np.stack([decay_rates(parts, len(run.layout.names)) for parts, _ in block.updates[steps]])
    decay = sum(penalty, rates[:, None, 0] * coupled - rates[:, None, 1] * along_theta)
    ends = (t.double().cpu().numpy() for t in (path.start, path.end, leverage))
    return [decay, moved, real, gradient, *ends], vectors


def _tensors(run: Run, values: Tensor) -> np.ndarray:
    """(Q, P) -> (Q, K): summed over each parameter tensor."""
    sizes = np.diff(run.layout.bounds).tolist()
    return torch.stack([part.sum(-1) for part in values.split(sizes, -1)], -1).cpu().numpy()


# what was asked


def _query(run: Run, model: nn.Module, measurement: Any, dtype: torch.dtype | None, theta: Tensor) -> Query:
    """In float64 unless asked otherwise; in the run's type where a callable's own tensors leave no choice."""
    try:
        return Query(model, measurement, run.layout, dtype or torch.float64, theta)
    except MeasurementError as error:
        if dtype is not None or run.dtype == torch.float64:
            raise
        try:
            found = Query(model, measurement, run.layout, run.dtype, theta)
        except MeasurementError:
            raise error from None
        log.info("the measurement is computed in %s, the type of its own tensors", run.dtype)
        return found


def _divided(run: Run, queries: int, kept: int, memory: int | None, cube: Any) -> Budget:
    budget = divide(sizes_of(run, kept), queries, memory)
    if cube is not None and budget.at_once < queries:
        raise ValueError(
            f"a cube is written in one sweep: got {queries} queries, of which {budget.at_once} fit the memory. Allow more "
            f"memory, or ask for them in several calls with a cube each."
        )
    return budget


def _check_arguments(run: Any, model: nn.Module, path: Any, steps: Any, identities: Any) -> None:
    for name, value, kind, hint in (
        ("run", run, Run, "Open it with attrib.open_run(path)."),
        ("steps", steps, slice | None, "Pass slice(a, b), or None for the whole run."),
    ):
        if not isinstance(value, kind):
            raise TypeError(f"{name} is not what it should be: got {value!r}. {hint}")
    if path is not None and (isinstance(path, type) or not hasattr(path, "bind")):
        raise TypeError(f"path is not a path: got {path!r}, expected an object such as attrib.Secant().")
    if isinstance(identities, str) or not set(identities) <= set(IDENTITIES):
        raise ValueError(f"identities are none: got {identities!r}, expected some of {IDENTITIES}, such as ('split',).")
    check_model(run, model)


def _window(run: Run, steps: slice | None) -> tuple[int, int]:
    window = steps if steps is not None else slice(None)
    start, stop, stride = window.indices(run.steps)
    inside = all(v is None or -run.steps <= v <= run.steps for v in (window.start, window.stop))
    if stride != 1 or stop <= start or not inside:
        raise ValueError(
            f"the window is not a range of recorded steps: got {window}, expected slice(a, b) with 0 <= a < b <= "
            f"{run.steps} and stride 1."
        )
    return start, stop


def _facts(
    run: Run, measurement: Any, path: Path, dtype: torch.dtype | None, identities: Sequence[str]
) -> dict[str, Any]:
    h = run.header
    return {
        "run": str(run.reader.target),
        "measurement": getattr(measurement, "name", getattr(measurement, "__name__", type(measurement).__name__)),
        "units": getattr(measurement, "units", ""),
        "path": repr(path),
        "identities": ["batch", "step", "measurement", *identities],
        "dtype": str(dtype or run.dtype).removeprefix("torch."),
        **{key: h[key] for key in ("model", "optimizer", "capture", "versions", "recorded")},
        "parameters": run.layout.size,
        "tensors": len(run.groups),
        "batch": h["slots"],
        "options": run.options,
        "meaning": "accounting of the realised training path; not a counterfactual",
    }
