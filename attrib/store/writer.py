"""Append steps to a store; commit them in blocks, arrays first, the count of committed steps last.

A run that is killed can be read up to its last committed block. States stand in the block of the step that starts
from them, so the last step of the last full block is committed only with the next block, or by `close`.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import zarr
from zarr.abc.store import Store
from zarr.errors import GroupNotFoundError

from ..errors import StoreError, StoreExistsError
from .examples import ExampleTables
from .schema import CHUNK_BYTES, DIMENSIONS, LOGS, STATE_BYTES, block_steps, create

PADDING = {"index": -1, "row": -1}  # of slots beyond a step's batch; of all other arrays 0


class StepRecord(NamedTuple):
    """Everything about one step, as arrays. `state` is read only where `Writer.wants_state`."""

    theta: np.ndarray | None  # (P,) before the step
    gradient: np.ndarray  # (P,)
    hyper: np.ndarray  # (K, H) float64
    ids: np.ndarray  # (B,) int64
    batch: list[np.ndarray]  # (B, ...) each
    scale: float
    state: dict[str, np.ndarray] | None  # (P,) each, before the step
    random: np.ndarray | None  # (bytes,) uint8
    log: dict[str, float]  # some of LOGS
    shares: dict[str, np.ndarray]  # (B, ...) by name, with capture="gradients" or "factors"
    penalty: np.ndarray | None = None  # (P,), of the gradient


class Steps(NamedTuple):
    """Consecutive steps from `start` on."""

    start: int
    records: list[StepRecord]


def check_target(target: Any, overwrite: bool) -> None:
    """Raise StoreExistsError where something is stored already and must not be overwritten.

    A folder or file that is no Zarr store is never overwritten, asked or not.
    """
    path = Path(target) if isinstance(target, str | Path) else None
    if path is not None and path.exists() and not (path / "zarr.json").exists():
        if path.is_file() or any(path.iterdir()):
            raise StoreExistsError(
                f"something other than a store is there: got {target}, expected a new path or an empty folder. "
                f"Choose another path; attrib does not delete what it did not write."
            )
        return
    if overwrite:
        return
    try:
        zarr.open_group(target, mode="r")
    except (FileNotFoundError, GroupNotFoundError):
        return
    raise StoreExistsError(
        f"a store exists already: got {target}, expected an empty place. Choose another path, or pass overwrite=True."
    )


class Writer:
    """Writes one run, from its first step on, a block at a time on a thread of its own.

    At most one block is being written while the next fills up. What goes wrong there is raised by the next `check` or
    `append`; `close` tries again.

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
        self._block, self._every, self._frame = block, states_every, 1
        self._steps = 0  # appended
        self._records: list[StepRecord] = []
        self._arrays: dict[str, zarr.Array] = {}
        self._buffers: dict[str, np.ndarray] = {}
        self._thread = ThreadPoolExecutor(1, "attrib-writer")
        self._writing: tuple[Steps, Future[None]] | None = None
        self._unwritten: Steps | None = None  # of a block that failed
        self._broken: BaseException | None = None

    @property
    def steps(self) -> int:
        """Steps appended so far, committed or not."""
        return self._steps

    @property
    def wants_state(self) -> bool:
        """Whether the next step begins a block, or with `states_every` a key frame."""
        return not self._records and self._steps % self._frame == 0

    def append(self, record: StepRecord, theta_after: np.ndarray) -> None:
        """Add a step; a full block is handed to the writing thread. The arrays must not change afterwards."""
        if not self._arrays:
            self._create(record)
        if self._every > 1 and self._steps % self._every:
            record = record._replace(theta=None)
        self._records.append(record)
        self._last = theta_after
        self._steps += 1
        if len(self._records) == self._block:
            self.check(wait=True)
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
        self._put("theta", -(-self._steps // self._every), self._last[None])
        self._header["complete"] = complete
        self._mark(self._steps)

    def _take(self) -> Steps:
        records, self._records = self._records, []
        return Steps(self._steps - len(records), records)

    # one block, on the writing thread

    def _write(self, steps: Steps) -> None:
        self._put_block(steps)
        # the state after the last step stands in the next block, or can be made again
        self._mark(steps.start + len(steps.records) - (self._every == 1))

    def _put_block(self, steps: Steps) -> None:
        start, records = steps.start, steps.records
        placed = [self._table.place(r.ids, r.batch) for r in records]
        width = max(self._arrays["index"].shape[1], *(len(r.ids) for r in records))
        self._widen(width, start)
        states = [r.theta for r in records if r.theta is not None]
        if states:
            self._put("theta", start // self._every, self._stacked("theta", states))
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
            self._put(f"state/{key}", start // self._frame, value[None])
        self._header.update(rows=self._table.commit(), slots=width)

    def _stacked(self, name: str, rows: list[np.ndarray]) -> np.ndarray:
        """In the same memory for every block: pages that are new to the process cost more than the copy."""
        if name not in self._buffers:
            self._buffers[name] = np.empty((self._block or len(rows), len(rows[0])), dtype=rows[0].dtype)
        return np.stack(rows, out=self._buffers[name][: len(rows)])

    def _widen(self, width: int, steps: int) -> None:
        """Make room for larger batches, and write the padding of the earlier steps: no committed chunk may be missing."""
        for name in (*PADDING, *self._shares):
            array, fill = self._arrays[name], PADDING.get(name, 0)
            if array.shape[1] >= width:
                continue
            whole = -(-array.shape[1] // array.chunks[1]) * array.chunks[1]  # columns that have chunks already
            rest = array.shape[2:]
            array.resize((array.shape[0], width, *rest))
            for first in range(0, steps, array.chunks[0]):
                array[first : min(first + array.chunks[0], steps), whole:] = fill

    def _put(self, name: str, start: int, values: np.ndarray) -> None:
        array = self._arrays[name]
        array.resize((start + len(values), *values.shape[1:]))
        array[start:] = values

    def _mark(self, committed: int) -> None:
        self._header["committed_steps"] = committed
        self._group.attrs["attrib"] = self._header

    def _create(self, first: StepRecord) -> None:
        """The group, and arrays that fit the first step. Until then nothing is written: what was refused leaves no store."""
        check_target(self._target, self._overwrite)
        self._group = zarr.create_group(self._target, overwrite=self._overwrite, zarr_format=3)
        self._table = ExampleTables(self._group)
        for name, value in self._constants.items():
            dims = tuple(f"d{d}" for d in range(value.ndim))
            create(self._group, f"constants/{name}", value.shape, value.shape, value.dtype, dims)[...] = value
        self._shares = tuple(first.shares)
        theta = [first.gradient] if self._every == 1 else []  # of the same size
        vectors = [first.gradient] if first.penalty is None else [first.gradient, first.penalty]
        stored = [*theta, *vectors, *first.batch, *first.shares.values()]
        n = self._set_lengths(sum(a.nbytes for a in stored))
        size, slots, kind = len(first.gradient), len(first.ids), first.gradient.dtype
        self._header["arity"] = len(first.batch)
        entries = min(size, max(1, STATE_BYTES // (n * kind.itemsize)))
        if self._every == 1:
            self._add("theta", (size,), (n, entries), kind, steps=True)
        else:
            self._add("theta", (size,), (1, min(size, STATE_BYTES // kind.itemsize)), kind)
        for name in ("gradient", "penalty")[: len(vectors)]:
            self._add(name, (size,), (n, entries), kind)
        self._add("hyper", first.hyper.shape, (n, *first.hyper.shape), np.float64)
        self._add("index", (slots,), (n, slots), np.int64)
        self._add("row", (slots,), (n, slots), np.int64)
        self._add("kind", (), (n,), np.int64)
        for name in ("scale", *(f"log/{name}" for name in LOGS)):
            self._add(name, (), (n,), np.float64)
        for key, value in (first.state or {}).items():
            name = f"state/{key}"
            self._arrays[name] = create(self._group, name, (0, size), (1, size), value.dtype, ("frame", "parameter"))
        for name, values in first.shares.items():
            at_once = max(1, min(slots, CHUNK_BYTES // max(1, n * values[0].nbytes)))
            dims = (
                "step",
                "slot",
                *(("parameter",) if name == "gradients" else (f"d{d}" for d in range(values.ndim - 1))),
            )
            self._add(name, values.shape, (n, at_once, *values.shape[1:]), values.dtype, dims)
        if first.random is not None:
            self._add("random", (len(first.random),), (n, len(first.random)), np.uint8)
        self._mark(0)

    def _set_lengths(self, bytes_per_step: int) -> int:
        """Steps per block, between stored states, between stored accumulators."""
        self._block = self._block or block_steps(bytes_per_step)
        if self._every > 1:
            self._block = min(self._block, self._every)
            self._every = -(-self._every // self._block) * self._block
        self._frame = max(self._block, self._every)
        self._header.update(block=self._block, states_every=self._every, frame=self._frame)
        return self._block

    def _add(
        self,
        name: str,
        shape: tuple[int, ...],
        chunks: tuple[int, ...],
        dtype: Any,
        dimensions: tuple[str, ...] | None = None,
        steps: bool = False,
    ) -> None:
        dims, fill = dimensions or DIMENSIONS[name], PADDING.get(name, 0)
        self._arrays[name] = create(self._group, name, (0, *shape), chunks, dtype, dims, fill, steps)


def _padded(rows: list[np.ndarray], width: int, fill: int) -> np.ndarray:
    """Arrays (b, ...) of different b -> (len, width, ...), filled up; not copied where there is nothing to do."""
    if all(len(values) == width for values in rows):
        return rows[0][None] if len(rows) == 1 else np.stack(rows)
    out = np.full((len(rows), width, *rows[0].shape[1:]), fill, dtype=rows[0].dtype)
    for n, values in enumerate(rows):
        out[n, : len(values)] = values
    return out
