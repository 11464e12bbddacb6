"""What a recorded run gives each step: batch, options, random numbers; and what takes their place beyond its end."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..batch import Batch
from ..checks import check_batch
from ..errors import ReplayError
from ..run import Run
from ..steps import RecordedPass, passes_of
from ..store import PASS_FACTS, Passes

Batches = Callable[[int], tuple[Any, ...]]  # step -> (index, *inputs)


class ScheduledPass(NamedTuple):
    """ids (B,), numbers or strings, the batch, the generators' state before the forward pass or None."""

    ids: np.ndarray
    batch: Batch
    random: Tensor | None


class Scheduled(NamedTuple):
    """The passes of a step, and hyper (K, H + 1)."""

    passes: tuple[ScheduledPass, ...]
    hyper: np.ndarray


class Schedule:
    """Read a block at a time; a batch that comes again is handed out as it is."""

    def __init__(self, run: Run, device: torch.device, batches: Batches | None) -> None:
        self._run, self._device, self._batches = run, device, batches
        self._first = -1
        self._rows: dict[str, np.ndarray] = {}
        self._passes = Passes(np.zeros((0, 1, len(PASS_FACTS))))
        self._last: tuple[RecordedPass, Batch] | None = None

    def check(self, until: int) -> None:
        """Raise ReplayError where steps lie beyond the record and nothing says what their batches are."""
        run = self._run
        if until <= run.steps or self._batches is not None:
            return
        numbers = run.reader.read("index", slice(0, run.steps))
        if numbers.shape[1] == len(run.numbers) and (np.sort(numbers, 1) == run.numbers).all():
            return
        raise ReplayError(
            f"the batches beyond the record are not known: got until {until}, expected until <= {run.steps}, since not "
            f"every batch was all {len(run.numbers)} examples. Pass batches=, a function step -> (index, *inputs)."
        )

    def step(self, step: int) -> Scheduled:
        run = self._run
        at = min(step, run.steps - 1)
        self._read(at)
        n = at - self._first
        hyper = self._rows["hyper"][n]
        if step >= run.steps and self._batches is not None:
            index, *inputs = self._batches(step)
            ids, batch = check_batch(index, tuple(map(_tensor, inputs)))
            return Scheduled((ScheduledPass(ids, batch.map(self._there), None),), hyper)
        numbers, rows = (self._rows[name][n] for name in ("index", "row"))
        ids = run.ids.of(numbers[numbers >= 0])
        recorded = passes_of(self._passes, n, rows, self._rows.get("random") if step < run.steps else None)
        return Scheduled(tuple(ScheduledPass(ids[p.slots], self._inputs(p), p.random) for p in recorded), hyper)

    def _read(self, step: int) -> None:
        """The block that a step stands in."""
        size = int(self._run.header["block"])
        first = step - step % size
        if first != self._first:
            reader, steps = self._run.reader, slice(first, min(first + size, self._run.steps))
            names = ("hyper", "index", "row", *(("random",) if "random" in reader else ()))
            self._rows, self._passes = {name: reader.read(name, steps) for name in names}, reader.passes(steps)
            self._first = first

    def _inputs(self, wanted: RecordedPass) -> Batch:
        if self._last is None or not wanted.same_inputs(self._last[0]):
            self._last = wanted, self._run.inputs(wanted).map(self._there)
        return self._last[1]

    def _there(self, t: Tensor) -> Tensor:
        return t.to(self._device)


def _tensor(part: Any) -> Any:
    return torch.from_numpy(part) if isinstance(part, np.ndarray) else part
