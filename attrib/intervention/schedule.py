"""What a recorded run gives each step: batch, options, random numbers; and what takes their place beyond its end."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..checks import check_ids
from ..errors import ReplayError
from ..run import Run

Batches = Callable[[int], tuple[Any, ...]]  # step -> (index, *inputs)


class Scheduled(NamedTuple):
    """ids (B,), numbers or strings, inputs of B rows each, hyper (K, H + 1), the generator's state before the forward pass
    or None."""

    ids: np.ndarray
    batch: tuple[Tensor, ...]
    hyper: np.ndarray
    random: Tensor | None


class Schedule:
    """Read a block at a time; a batch that comes again is handed out as it is."""

    def __init__(self, run: Run, device: torch.device, batches: Batches | None) -> None:
        self._run, self._device, self._batches = run, device, batches
        self._first = -1
        self._rows: dict[str, np.ndarray] = {}
        self._last: tuple[int, np.ndarray, tuple[Tensor, ...]] | None = None

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
            ids, *inputs = self._batches(step)
            batch = tuple(torch.as_tensor(t).to(self._device) for t in inputs)
            return Scheduled(check_ids(ids), batch, hyper, None)
        kind, rows, numbers = (self._rows[name][n] for name in ("kind", "row", "index"))
        drawn = torch.from_numpy(self._rows["random"][n]) if "random" in self._rows and step < run.steps else None
        ids = run.ids.of(numbers[numbers >= 0])
        return Scheduled(ids, self._inputs(int(kind), rows[rows >= 0]), hyper, drawn)

    def _read(self, step: int) -> None:
        """The block that a step stands in."""
        size = int(self._run.header["block"])
        first = step - step % size
        if first != self._first:
            reader, steps = self._run.reader, slice(first, min(first + size, self._run.steps))
            names = ("hyper", "index", "row", *(("random",) if "random" in reader else ()))
            self._rows = {**reader.facts(steps), **{name: reader.read(name, steps) for name in names}}
            self._first = first

    def _inputs(self, kind: int, rows: np.ndarray) -> tuple[Tensor, ...]:
        if self._last is None or self._last[0] != kind or not np.array_equal(self._last[1], rows):
            self._last = kind, rows, tuple(t.to(self._device) for t in self._run.inputs(kind, rows))
        return self._last[2]
