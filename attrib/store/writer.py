"""Append steps to a store; commit them in blocks, arrays first, the count of committed steps last.

A run that is killed can be read up to its last committed block. States stand in the block of the step that starts
from them, so the last step of the last full block is committed only with the next block, or by `close`.
"""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import numpy as np
from zarr.abc.store import Store

from ..errors import StoreError
from .creation import PADDING, Created, StepRecord, check_target, create_store, lengths_of
from .schema import LOGS


class StepRecords(NamedTuple):
    """Consecutive steps from `start` on."""

    start: int
    records: list[StepRecord]


class Writer:
    """Writes one run, from its first step on, a block at a time on a thread of its own.

    At most one block is being written while the next fills up. What goes wrong there is raised by the next `check` or
    `ready`; `close` tries again.

    Args:
        target: path or zarr Store.
        header: JSON-able facts about the run, stored as the group's attribute `attrib`.
        constants: tensors that do not change, by name.
        overwrite: replace what is there.
        block: steps per block; None chooses by size.
        states_every: states stored; rounded up to whole blocks where it is longer than one.
    """

    def __init__(
        self,
        target: str | Store,
        header: dict[str, Any],
        constants: dict[str, np.ndarray],
        overwrite: bool,
        block: int | None,
        states_every: int = 1,
    ) -> None:
        check_target(target, overwrite)
        self._target, self._overwrite, self._constants = target, overwrite, constants
        self._header = {**header, "committed_steps": 0, "complete": False}
        self._asked = block, states_every
        self._created: Created | None = None
        self._steps = 0  # appended
        self._records: list[StepRecord] = []
        self._buffers: dict[str, np.ndarray] = {}
        self._thread = ThreadPoolExecutor(1, "attrib-writer")
        self._writing: tuple[StepRecords, Future[None]] | None = None
        self._unwritten: StepRecords | None = None  # of a block that failed
        self._broken: BaseException | None = None

    @property
    def steps(self) -> int:
        """Steps appended so far, committed or not."""
        return self._steps

    @property
    def wants_state(self) -> bool:
        """Whether the next step begins a block, or with `states_every` a key frame."""
        return self._created is None or (not self._records and self._steps % self._store.lengths.frame == 0)

    @contextmanager
    def ready(self, record: StepRecord) -> Iterator[None]:
        """Within it the step is made and appended: before, what can fail of its storing is tried. The store is made for the
        first step, and taken away again where that one fails.

        Raises:
            StoreError, StoreExistsError: the step must not be made.
        """
        if self._created is None:
            self._create(record)
        self.check(wait=len(self._records) + 1 == self._store.lengths.block)
        try:
            yield
        except BaseException:
            if not self._steps:
                self._store.remove()
                self._created = None
            raise

    def append(self, record: StepRecord, theta_after: np.ndarray) -> None:
        """Add a step, within `ready`; a full block goes to the writing thread. The arrays must not change afterwards."""
        if self._steps % self._store.lengths.states_every:
            record = record._replace(theta=None)
        self._records.append(record)
        self._last = theta_after
        self._steps += 1
        if len(self._records) == self._store.lengths.block:
            steps = self._take()
            self._writing = steps, self._thread.submit(self._write, steps)

    def check(self, wait: bool = False) -> None:
        """Raise StoreError where the last block could not be written."""
        if self._writing and (wait or self._writing[1].done()):
            (steps, future), self._writing = self._writing, None
            error = future.exception()
            if error is not None:
                self._broken, self._unwritten = error, steps
        if self._broken:
            raise StoreError(
                f"the store could not be written: got {self._broken!r}, at a block that ends before step {self._steps}. "
                f"Its steps were made but are not stored; earlier blocks can be read. Recording has ended: make room and "
                f"call recorder.close()."
            ) from self._broken

    def update_header(self, **facts: Any) -> None:
        """Change facts in the header, before the first step; they are written with the first commit."""
        self._header.update(facts)

    def close(self, complete: bool = True) -> None:
        """Write what is left, the final parameters, and whether the run is complete."""
        self._thread.shutdown(wait=True)
        with suppress(StoreError):
            self.check(wait=True)
        if not self._steps:
            return
        if self._unwritten is not None:
            self._write(self._unwritten)
        if self._records:
            self._write(self._take())
        self._put("theta", -(-self._steps // self._store.lengths.states_every), self._last[None])
        self._header["complete"] = complete
        self._mark(self._steps)

    @property
    def _store(self) -> Created:
        assert self._created is not None
        return self._created

    def _create(self, first: StepRecord) -> None:
        lengths = lengths_of(first, *self._asked)
        self._header.update(**lengths._asdict(), arity=len(first.batch))
        self._created = create_store(self._target, self._overwrite, self._header, self._constants, first, lengths)

    def _take(self) -> StepRecords:
        records, self._records = self._records, []
        return StepRecords(self._steps - len(records), records)

    # one block, on the writing thread

    def _write(self, steps: StepRecords) -> None:
        self._put_block(steps)
        # the state after the last step stands in the next block, or can be made again
        self._mark(steps.start + len(steps.records) - (self._store.lengths.states_every == 1))

    def _put_block(self, steps: StepRecords) -> None:
        start, lengths = steps.start, self._store.lengths
        records = [r._replace(ids=self._store.ids.place(r.ids)) for r in steps.records]
        placed = [self._store.examples.place(r.ids, r.batch) for r in records]
        width = max(self._store.arrays["index"].shape[1], *(len(r.ids) for r in records))
        self._widen(width, start)
        states = [r.theta for r in records if r.theta is not None]
        if states:
            self._put("theta", start // lengths.states_every, self._stacked("theta", states))
        self._put("gradient", start, self._stacked("gradient", [r.gradient for r in records]))
        if records[0].penalty is not None:
            self._put("penalty", start, np.stack([r.penalty for r in records if r.penalty is not None]))
        self._put("hyper", start, np.stack([r.hyper for r in records]))
        self._put("scale", start, np.array([r.scale for r in records]))
        self._put("index", start, _padded([r.ids for r in records], width, PADDING["index"]))
        self._put("kind", start, np.array([kind for kind, _ in placed]))
        self._put("row", start, _padded([rows for _, rows in placed], width, PADDING["row"]))
        for name in records[0].shares:
            self._put(name, start, _padded([r.shares[name] for r in records], width, 0))
        if records[0].random is not None:
            self._put("random", start, np.stack([r.random for r in records if r.random is not None]))
        for name in LOGS:
            self._put(f"log/{name}", start, np.array([r.log.get(name, np.nan) for r in records]))
        for key, value in (records[0].state or {}).items():
            self._put(f"state/{key}", start // lengths.frame, value[None])
        self._header.update(rows=self._store.examples.commit(), ids=self._store.ids.commit(), slots=width)

    def _stacked(self, name: str, rows: list[np.ndarray]) -> np.ndarray:
        """In the same memory for every block: pages that are new to the process cost more than the copy."""
        if name not in self._buffers:
            self._buffers[name] = np.empty((self._store.lengths.block, len(rows[0])), dtype=rows[0].dtype)
        return np.stack(rows, out=self._buffers[name][: len(rows)])

    def _widen(self, width: int, steps: int) -> None:
        """Make room for larger batches, and write the padding of the earlier steps: no committed chunk may be missing."""
        for name in (*PADDING, *self._store.shares):
            array, fill = self._store.arrays[name], PADDING.get(name, 0)
            if array.shape[1] >= width:
                continue
            whole = -(-array.shape[1] // array.chunks[1]) * array.chunks[1]  # columns that have chunks already
            rest = array.shape[2:]
            array.resize((array.shape[0], width, *rest))
            for first in range(0, steps, array.chunks[0]):
                array[first : min(first + array.chunks[0], steps), whole:] = fill

    def _put(self, name: str, start: int, values: np.ndarray) -> None:
        array = self._store.arrays[name]
        array.resize((start + len(values), *values.shape[1:]))
        array[start:] = values

    def _mark(self, committed: int) -> None:
        self._header["committed_steps"] = committed
        self._store.group.attrs["attrib"] = self._header


def _padded(rows: list[np.ndarray], width: int, fill: int) -> np.ndarray:
    """Arrays (b, ...) of different b -> (len, width, ...), filled up; not copied where there is nothing to do."""
    if all(len(values) == width for values in rows):
        return rows[0][None] if len(rows) == 1 else np.stack(rows)
    out = np.full((len(rows), width, *rows[0].shape[1:]), fill, dtype=rows[0].dtype)
    for n, values in enumerate(rows):
        out[n, : len(values)] = values
    return out
