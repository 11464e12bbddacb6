"""retrain_subsets(): the ground truth of what-if questions. The run is trained again without each of some sets of examples.

Batches, their order, options and random states are those of the record (`attrib.retrain`); each retraining is measured at
its end and not recorded. Where model, loss and optimizer allow, many are trained side by side (`together`). Where a loss
draws random numbers, those that remain draw others than before once some are left out; with weight 0 they draw the same.
"""

from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Executor
from importlib.metadata import version
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..errors import Interrupted, ReplayError, WorkerError
from ..executor import Tasks
from ..functional import differentiable, uncompiled
from ..interrupt import interruptible
from ..matching import check_model
from ..measure import Measurement
from ..path import Measured
from ..query import query_of
from ..run import Run
from .outcomes import FORMAT, Journal, Outcomes, packed
from .work import Changes, Retraining, intervention

AHEAD = 16  # pieces that are under way on workers
PIECES = 16  # that the retrainings are cut into at least, for workers
WORTH = 3  # so many side by side at least, or one at a time


@differentiable
def retrain_subsets(
    run: Run,
    subsets: Sequence[Collection[int | str]],
    measurement: Any,
    *,
    model: nn.Module,
    loss: Callable[..., Tensor],
    weight: float | Sequence[float | None] | None = None,
    store: Any = None,
    executor: Executor | None = None,
    backward: Callable[[Tensor, nn.Module], Any] | None = None,
    penalty: Callable[[nn.Module], Tensor] | None = None,
    dtype: torch.dtype | None = None,
    at_once: int | None = None,
    progress: bool = True,
) -> Outcomes:
    """Train a run again from its start without each of some sets of examples, and measure each model at the end.

    Args:
        run: from `attrib.open_run`.
        subsets: of each retraining the ids of the examples that it is *without*; all others are trained on as they were.
        measurement: `model -> (Q,)`, or one of `attrib.measure`.
        model: of the recorded architecture, in its mode for the measurement; a copy is trained, in the recorded modes.
        loss: as given to `attrib.record`.
        weight: what "without" means. None: left out of their batches, a mean is over those that remain (`Drop`). A number:
            their losses count so many times, the mean is over all of the batch as before (`Reweight`): 0 takes them out, 0.5
            half of each. Or one of these per subset.
        store: path of a file that the outcomes are written to as they come. A call that ended early goes on where it was.
        executor: whose workers do it: any `concurrent.futures.Executor`; None: this process.
        backward, penalty: what the loop did with the losses beyond the mean or the sum, and what it added, as for
            `attrib.replay` and `attrib.record`.
        dtype: that the measurement is computed in; None: float64, as for `attrib.attribute`.
        at_once: retrainings side by side, equal to one at a time up to the order of sums. None: as many as is good; 1: one
            at a time, as where losses draw random numbers or see each other.
        progress: show a bar on work longer than two seconds.

    Returns:
        The outcomes: values (subset, query), base (query,), subsets, a labelled dataset.

    Raises:
        ReplayError: ids that the run does not have, an empty subset, a batch that none is left of, another loss, `at_once`
            that cannot be. StoreExistsError: the file holds other outcomes. All of it before anything is trained.
        Interrupted: Ctrl-C; WorkerError: a worker died. `result` has the outcomes that are done.

    Example:
        >>> subsets = attrib.random_subsets(run, 0.1, 4)
        >>> outcomes = attrib.retrain_subsets(run, subsets, measurement, model=model, loss=loss)
        >>> outcomes.values.shape
        (4, 2)
    """
    _check_asked(run, executor, at_once)
    work = Retraining(run, uncompiled(model), loss, _measured(run, model, measurement, dtype), backward, penalty)
    changes = changes_of(run, subsets, weight)
    work.check()
    pieces = _pieces(work, changes, at_once, executor)
    journal = Journal(None if store is None else Path(store), _header(run, changes, measurement, work))
    with tqdm(total=len(changes), desc="retrain", unit="run", delay=2, disable=not progress) as bar:
        _train(work, changes, journal, pieces, bar)
    return journal.outcomes()


class Pieces(NamedTuple):
    """How the retrainings are gone through: so many at once, side by side or not, by whom."""

    length: int
    together: bool
    executor: Executor | None


def _pieces(work: Retraining, changes: Changes, at_once: int | None, executor: Executor | None) -> Pieces:
    size = _at_once(work, changes, at_once)
    length = size if executor is None else min(size, -(-len(changes) // PIECES))
    return Pieces(length, size > 1, executor)


def _measured(run: Run, model: nn.Module, measurement: Any, dtype: torch.dtype | None) -> Measured:
    model = uncompiled(model)
    check_model(run, model)
    whole = run.whole(run.steps).to(next(model.parameters()).device)
    return query_of(run, model, measurement, dtype, whole, range(run.steps))


def _train(work: Retraining, changes: Changes, journal: Journal, pieces: Pieces, bar: Any) -> None:
    """All that the journal does not have."""
    bar.update(len(journal.done))
    left = [n for n in range(len(changes)) if n not in journal.done]
    parts = [left[lo : lo + pieces.length] for lo in range(0, len(left), pieces.length)]
    with interruptible() as request:
        try:
            for part, values in _done(work, changes, parts, pieces):
                journal.add(part, values)
                bar.update(len(part))
                if request.asked and len(journal.done) < len(changes):
                    raise Interrupted(
                        f"interrupted: got {len(journal.done)} of {len(changes)} outcomes. They are the .result of this "
                        f"exception; with store= the same call goes on behind them.",
                        journal.outcomes(),
                    )
        except WorkerError as error:
            error.result = journal.outcomes() if journal.done else None
            raise


def _done(
    work: Retraining, changes: Changes, parts: Sequence[list[int]], pieces: Pieces
) -> Iterator[tuple[list[int], np.ndarray]]:
    """Each part and its values, in order."""
    if pieces.executor is None:
        yield from ((part, work.outcomes(changes.at(part), pieces.together)) for part in parts)
        return
    tasks, waiting = Tasks(pieces.executor, work, AHEAD), deque(parts)
    under_way: deque[tuple[list[int], Any]] = deque()
    try:
        while waiting or under_way:
            while waiting and len(under_way) < AHEAD:
                part = waiting.popleft()
                where = f"the subsets {part[0]} to {part[-1]}"
                under_way.append((part, tasks.task(where, "outcomes", changes.at(part), pieces.together)))
            part, later = under_way.popleft()
            yield part, later.result()
    finally:
        for _, later in under_way:
            later.cancel()


def _at_once(work: Retraining, changes: Changes, asked: int | None) -> int:
    """How many side by side."""
    if asked == 1:
        return 1
    reason = work.obstacle()
    most = work.together_at_most(changes) if reason is None else 1
    if asked is None:
        return most if most >= WORTH else 1
    if most == 1:
        reason = reason or "they do not map, or do not fit into memory"
        raise ReplayError(
            f"they are not trained side by side: got at_once={asked}, expected 1, since {reason}, at "
            f"{work.run.reader.target}. Leave it out."
        )
    return asked


def changes_of(
    run: Run, subsets: Sequence[Collection[int | str]], weight: float | Sequence[float | None] | None
) -> Changes:
    """The retrainings, checked one by one.

    Raises:
        ReplayError: naming the subset.
    """
    if isinstance(subsets, str) or not len(subsets):
        raise ReplayError(f"there are no subsets: got {subsets!r}, expected lists of ids, one per retraining.")
    several = weight if isinstance(weight, Sequence | np.ndarray) else [weight] * len(subsets)
    if len(several) != len(subsets):
        raise ReplayError(
            f"the weights do not fit the subsets: got {len(several)}, expected {len(subsets)}, one each, or one for all."
        )
    place = {example: n for n, example in enumerate(run.examples.tolist())}
    changed = np.zeros((len(subsets), len(place)), dtype=bool)
    for n, (subset, each) in enumerate(zip(subsets, several, strict=True)):
        if isinstance(subset, str | int | np.integer):
            raise ReplayError(
                f"a subset is no list: got {subset!r}, expected ids, such as [{subset!r}], at subset {n}."
            )
        ids = [e if isinstance(e, str) else int(e) for e in subset]
        unknown = [e for e in ids if e not in place]
        if unknown or not ids:
            raise ReplayError(
                f"there are no such train examples: got {unknown[:5] or 'none at all'}, expected some of the {len(place)} "
                f"ids of the run, such as {next(iter(place))!r}, at subset {n}."
            )
        if each is not None and not (isinstance(each, Real) and np.isfinite(float(each))):
            raise ReplayError(f"a weight is none: got {each!r}, expected a finite number or None, at subset {n}.")
        changed[n, [place[e] for e in ids]] = True
    changes = Changes(changed, np.array([np.nan if w is None else float(w) for w in several]))
    for n, change in enumerate(changes):
        try:
            intervention(run, *change).check(run, 0, run.steps)
        except ReplayError as error:
            raise ReplayError(f"{error} It is subset {n}.") from None
    return changes


def _check_asked(run: Any, executor: Any, at_once: Any) -> None:
    if not isinstance(run, Run):
        raise TypeError(f"run is not what it should be: got {run!r}. Open it with attrib.open_run(path).")
    if executor is not None and (isinstance(executor, type) or not hasattr(executor, "submit")):
        raise TypeError(f"executor is none: got {executor!r}, expected an object of concurrent.futures.")
    if at_once is not None and (not isinstance(at_once, int) or at_once < 1):
        raise ValueError(f"at_once is none: got {at_once!r}, expected 1 or more, or None.")


def _header(run: Run, changes: Changes, measurement: Any, work: Retraining) -> dict[str, Any]:
    """JSON: what is asked. The measurement is known by its values at both ends of the run."""
    measured = work.measured
    device = measured.example.device
    start, base = (measured.values(run.whole(s).to(device)).double().tolist() for s in (0, run.steps))
    return {
        "kind": "outcomes",
        "format": FORMAT,
        "run": run.header["id"],
        "steps": run.steps,
        "examples": run.examples.tolist(),
        "changed": [packed(row) for row in changes.changed],
        "weight": [None if np.isnan(w) else w for w in changes.weight.tolist()],
        "measurement": getattr(measurement, "name", getattr(measurement, "__name__", type(measurement).__name__)),
        "units": getattr(measurement, "units", ""),
        "names": list(measurement.names) if isinstance(measurement, Measurement) else [],
        "dtype": str(measured.dtype).removeprefix("torch."),
        "start": start,
        "base": base,
        "versions": {"attrib": version("attrib"), "torch": torch.__version__},
    }
