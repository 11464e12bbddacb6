"""attribute(): one sweep backwards through a run that writes a measurement as a sum of contributions.

    m(theta_b) - m(theta_a) = contributions <U_s, g_{s,i}> + decay + inherited + residual

What U is stands in `accounting`, how the run is gone through in `sweep`. Sums are in float64.
"""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from .account import Account, Losses, apart, rounding_alone, share_bound
from .accounting import Accounting
from .averaged import Averaged, Averages
from .budget import Budget, Sizes, divide, divide_ahead
from .buffers import with_buffers
from .constants import wide
from .errors import Interrupted, WorkerError
from .executor import Pool, pool_of
from .functional import differentiable, uncompiled
from .interrupt import interruptible
from .layout import group_tensors
from .marginals import bytes_of, choose
from .matching import check_model
from .measure import Average, Measurement, OfAverage
from .parts import cancellation
from .path import Measured, Path, Secant
from .plan import sizes_of
from .query import query_of
from .result import IDENTITIES as RESULT_IDENTITIES
from .result import Result, join
from .run import Run
from .shares import Shares
from .store import CubeWriter
from .sweep import Work, summed_sweep
from .tally import Tally

log = logging.getLogger("attrib")

IDENTITIES = ("split", "limit")  # those that take passes of their own
CANCELLED = 1e4  # sizes of single contributions, in that of their sum, that say little each


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
    executor: Executor | None = None,
    shares: str | None = None,
) -> Result:
    """Write m(theta_b) - m(theta_a) as a sum over training examples, steps and parameter groups: an account of what happened
    on the realised path, not a counterfactual.

    Args:
        run: from `attrib.open_run`.
        model: of the recorded architecture, compiled or not. Used on its device, in its mode for the measurement; given back
            as it was. The run's states are explained; where the model's parameters are others, a warning says so.
        measurement: `model -> (Q,)`, or one of `attrib.measure`: also of an average of the model, `measure.averaged`.
        loss: as given to `attrib.record`; needed where the run was captured by "replay".
        path: `Secant()` (default), `GaussLegendre(nodes)` or `Midpoint(nodes)`.
        steps: a window slice(a, b), complete by itself; None for the whole run.
        keep: axes to keep contributions along, one set or several, of "step", "example", "group"; None: what fits in memory.
        groups: {name: [parameter names or patterns]}; None makes each parameter tensor a group.
        dtype: compute type. None: float64 for the measurement, the recorded type for gradients. Sums are in float64.
        progress: show a bar on work longer than two seconds.
        cube: path or Store to write all contributions to, (query, step, slot, group).
        memory: bytes to hold at most (`attrib.plan`), in as many sweeps as that takes; None: 4 GiB, or for one query.
        identities: those checked beside the three that cost nothing: "split", at a few steps, each share against the
            derivative of its own loss; "limit", that the path tends to the gradient. What is left out the result says.
        executor: whose workers do the work, to the same result up to the order of sums: `ProcessPoolExecutor(2,
            get_context("spawn"))`, Dask's `client.get_executor()`, any `concurrent.futures.Executor`; None: this process.
        shares: what a share is, see `attrib.record`; None: what it is in the run, which capture="replay" alone can change.

    Returns:
        A `Result`, in the measurement's units; what raised the measurement is positive.

    Raises:
        ModelMismatchError, MeasurementError, UntraceableModelError, LossError, StoreError, KeptAxesError, ValueError.
        Interrupted: Ctrl-C (a second one stops at once); WorkerError: a worker died. Their `result` is complete for what was
        done, None for nothing.

    Example:
        >>> result = attrib.attribute(run, model, measurement, loss=loss)
        >>> result.by("step", "example").shape
        (2, 12, 24)
    """
    path, model = Secant() if path is None else path, uncompiled(model)
    rest = keep, groups, dtype, progress, cube, memory, identities, executor, shares
    options = AttributeOptions(loss, path, steps, *rest)
    options.check(run, model)
    note_values(run, model, _window(run, steps).stop, getattr(measurement, "average", None))
    return attributed(run, model, measurement, options)


@dataclass(frozen=True)
class AttributeOptions:
    """The options of `attribute`."""

    loss: Callable[..., Tensor] | None = None
    path: Path = field(default_factory=Secant)
    steps: slice | None = None
    keep: Sequence[str] | Sequence[Sequence[str]] | None = None
    groups: Mapping[str, Sequence[str]] | None = None
    dtype: torch.dtype | None = None
    progress: bool = True
    cube: Any = None
    memory: int | None = None
    identities: Sequence[str] = IDENTITIES
    executor: Executor | None = None
    shares: str | None = None

    def check(self, run: Any, model: nn.Module) -> None:
        """Raise TypeError, ValueError or ModelMismatchError where they are not what they should be."""
        for name, value, kind, hint in (
            ("run", run, Run, "Open it with attrib.open_run(path)."),
            ("steps", self.steps, slice | None, "Pass slice(a, b), or None for the whole run."),
        ):
            if not isinstance(value, kind):
                raise TypeError(f"{name} is not what it should be: got {value!r}. {hint}")
        if isinstance(self.path, type) or not hasattr(self.path, "bind"):
            raise TypeError(f"path is not a path: got {self.path!r}, expected an object such as attrib.Secant().")
        if isinstance(self.identities, str) or not set(self.identities) <= set(IDENTITIES):
            raise ValueError(
                f"identities are none: got {self.identities!r}, expected some of {IDENTITIES}, such as ('split',)."
            )
        if self.executor is not None and (isinstance(self.executor, type) or not hasattr(self.executor, "submit")):
            raise TypeError(
                f"executor is none: got {self.executor!r}, expected an object of concurrent.futures, such as "
                f"ProcessPoolExecutor(2)."
            )
        check_model(run, model)


def note_values(run: Run, model: nn.Module, stop: int, average: Average | None = None) -> None:
    """Say so where a model's parameters are neither those of a state of the run, of its last, or of the average there, which
    is the user's up to the rounding of every update."""
    held = dict(model.named_parameters())
    values = run.layout.flatten(held[name].detach().to("cpu", run.dtype) for name in run.groups)
    if any(torch.equal(values, run.vector(state)) for state in dict.fromkeys((stop, run.steps))):
        return
    if average is not None:
        mean = Averages(run, average, stop).last
        if float((values.double() - mean).norm()) <= torch.finfo(run.dtype).eps ** 0.5 * float(mean.norm()):
            return
    last = dict(zip(run.groups, run.parameters(run.steps).values(), strict=True))
    name = next(name for name, part in run.layout.slices() if not torch.equal(values[part], last[name].flatten()))
    log.warning(
        "the model holds other parameters than the run's last state, first at %r: the states of the run are explained, not "
        "the values in the model. To silence this, put the run's values in: run.load(model, run.steps)",
        name,
    )


@differentiable
def attributed(run: Run, model: nn.Module, measurement: Any, options: AttributeOptions) -> Result:
    """`attribute` of what was checked."""
    window, compute = _window(run, options.steps), options.dtype or run.dtype
    averages, average = None, None
    if isinstance(measurement, OfAverage):
        average, measurement = measurement.average, measurement.measurement
        averages = Averages(run, average, window.stop)
    final = run.vector(window.stop) if averages is None else averages.last.to(run.dtype)
    final = with_buffers(final, run.trajectory.buffers.vectors(window.stop, window.stop)[0])
    final = final.to(next(model.parameters()).device)
    query = query_of(run, model, measurement, options.dtype, final, window)
    labels, member = group_tensors(run.layout.names, options.groups)
    sizes = {"step": len(window), "example": len(run.numbers), "group": len(labels)}
    kept = choose(options.keep, query.count, sizes)
    held = replace(
        sizes_of(run, bytes_of(kept, query.count, sizes)), averages=0 if averages is None else averages.count
    )
    budget = _divided(held, query.count, options)
    bound = share_bound(wide(run.precision), wide(compute))
    few = float(torch.finfo(run.precision).eps)  # a loss is rounded once or twice, a share by each layer
    losses = Losses(run.log("loss"), max(bound, 2 * few))
    remainder = (float("inf") if run.declares_remainder else max(bound, 4 * few)) if run.accounts_remainder else None
    asked = run, model, options.loss, compute, budget.slices
    shares = Shares(*asked, member, options.shares)
    if (aside := rounding_alone(run, shares, window)) is not None:
        shares = Shares(*asked, apart(member, aside), options.shares)
    account = Account(labels, member, tuple(kept), options.cube is not None, bound, remainder, losses, aside)
    limit = window.stop if "limit" in options.identities else None
    parts = query.parts(budget.at_once)
    works = (
        Work(run, window, sensitivity, shares, account, "split" in options.identities)
        for sensitivity in (_sensitivity(run, part, options.path, limit, averages) for part in parts)
    )  # one at a time: each holds blocks of the run and a graph
    cube = None if options.cube is None else CubeWriter(options.cube, window.start, query.count, len(window), labels)
    bar = tqdm(total=len(window) * len(parts), desc="attribute", unit="step", delay=2, disable=not options.progress)
    with bar, interruptible() as request:
        pooled = ((work, pool_of(work, options.executor, budget.ahead)) for work in works)
        done, died = _sweeps(
            pooled, _Listener(bar, bound if remainder is None else remainder, cube, run), lambda: request.asked
        )
    if cube is not None:
        cube.close(complete=not request.asked and died is None)
    facts = _facts(run, window, measurement, options) | ({} if average is None else {"average": repr(average)})
    names = measurement.names if isinstance(measurement, Measurement) else ()
    whole = join([account.dataset(*sums, facts) for sums in done], names) if done else None
    result = None if whole is None else Result(whole.assign_coords(example=run.ids.of(whole["example"].values)))
    if died is not None:
        died.result = result
        raise died
    assert result is not None
    if request.asked:
        raise _interrupted(result, query.count)
    if (times := cancellation(result.dataset)) > CANCELLED:
        log.warning(
            "the contributions of single examples cancel: their sizes sum to %.2g times what is summed, so that little can "
            "be read from each. A parameter whose gradient is rounding alone makes them so where Adam divides it by its own "
            "size, by rows a bias before batch normalisation: build its layer with bias=False, or ask by group",
            times,
        )
    return result


def _sweeps(
    works: Iterable[tuple[Work, Pool]], heard: Callable[[Tally], Tally], asked: Callable[[], bool]
) -> tuple[list[tuple[Tally, np.ndarray]], WorkerError | None]:
    """One sweep for each part of the queries: its tally and what was inherited. Cut short, the parts that are whole, or the
    first as far as it came, and the error that did it."""
    done: list[tuple[Tally, np.ndarray]] = []
    for work, pool in works:
        tally, inherited, died = summed_sweep(work, pool, heard, asked)
        if tally is not None and inherited is not None and (tally.steps == work.window or not done):
            done.append((tally, inherited))
        if asked() or died is not None:
            return done, died
    return done, None


@dataclass
class _Listener:
    """Hears of every step when it is done: shows progress, says what is wrong, each thing once, writes the cube."""

    bar: Any
    bound: float
    cube: CubeWriter | None
    run: Run
    said: set[str] = field(default_factory=set)

    def __call__(self, tally: Tally) -> Tally:
        for n, gap in enumerate(tally.gaps["batch"]):
            if gap > self.bound:
                self._say(
                    "batch",
                    "the shares miss the recorded gradient by %.2g of their size at step %d: the model or the loss is not "
                    "the one that was recorded, or the loss holds a small penalty that is no example's",
                    *(gap, tally.steps[n]),
                )
        for name, sentence in tally.failures.items():
            if name in RESULT_IDENTITIES:
                self._say(name, "the %s identity fails: %s", name, sentence)
            else:
                self._say(name, "%s", sentence)
        for step, (numbers, contributions) in zip(reversed(tally.steps), reversed(tally.slots), strict=False):
            assert self.cube is not None
            self.cube.put(step, self.run.ids.of(numbers), contributions)
        self.bar.update(len(tally.steps))
        return replace(tally, slots=()) if tally.slots else tally

    def _say(self, name: str, sentence: str, *values: Any) -> None:
        if name not in self.said:
            self.said.add(name)
            log.warning(sentence, *values)


def _interrupted(result: Result, asked: int) -> Interrupted:
    """What is done is complete by itself: all steps for the first queries, or a window of the last steps."""
    first, last = result.dataset.attrs["window"]
    return Interrupted(
        f"interrupted: got {result.dataset.sizes['query']} of {asked} queries over the steps {first} to {last}, complete by "
        f"themselves. They are the .result of this exception, in a notebook sys.last_value.result.",
        result,
    )


# what was asked


def _sensitivity(
    run: Run, measured: Measured, path: Path, limit: int | None, averages: Averages | None
) -> Accounting | Averaged:
    accounting = Accounting(measured, path, limit, run.unmodelled)
    return accounting if averages is None else Averaged(accounting, averages)


def _divided(sizes: Sizes, queries: int, options: AttributeOptions) -> Budget:
    divided = divide if options.executor is None else divide_ahead
    budget = divided(sizes, queries, options.memory)
    if options.cube is not None and budget.at_once < queries:
        raise ValueError(
            f"a cube is written in one sweep: got {queries} queries, of which {budget.at_once} fit the memory. Allow more "
            f"memory, or ask for them in several calls with a cube each."
        )
    return budget


def _window(run: Run, steps: slice | None) -> range:
    window = steps if steps is not None else slice(None)
    start, stop, stride = window.indices(run.steps)
    inside = all(v is None or -run.steps <= v <= run.steps for v in (window.start, window.stop))
    if stride != 1 or stop <= start or not inside:
        raise ValueError(
            f"the window is not a range of recorded steps: got {window}, expected slice(a, b) with 0 <= a < b <= "
            f"{run.steps} and stride 1."
        )
    return range(start, stop)


def _facts(run: Run, window: range, measurement: Any, options: AttributeOptions) -> dict[str, Any]:
    h, sizes = run.header, run.log("remainder")[window.start : window.stop]
    sizes = sizes[~np.isnan(sizes)]
    left = [float(sizes.max(initial=0.0)), len(sizes)]  # the largest, relative to |p.grad|, of so many steps
    return {
        **({"remainder": left} if run.declares_remainder else {}),
        "run": str(run.reader.target),
        "measurement": getattr(measurement, "name", getattr(measurement, "__name__", type(measurement).__name__)),
        "units": getattr(measurement, "units", ""),
        "path": repr(options.path),
        "identities": [*(() if run.declares_remainder else ("batch",)), "step", "measurement", *options.identities],
        "dtype": str(options.dtype or run.dtype).removeprefix("torch."),
        "eps": share_bound(wide(run.precision), wide(options.dtype or run.dtype)) ** 2,
        **{key: h[key] for key in ("model", "optimizer", "capture", "versions", "recorded")},
        "shares": options.shares or run.definition,
        "parameters": run.layout.size,
        "tensors": len(run.groups),
        "batch": h["slots"],
        "options": run.options,
        "meaning": "accounting of the realised training path; not a counterfactual",
    }
