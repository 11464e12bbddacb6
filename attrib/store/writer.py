"""Append steps to a store; commit them in blocks, arrays first, the header with the count of committed steps last.

A run that is killed can be read up to its last commit. A block that takes long to fill is committed as it grows, every few
seconds; its chunks are written again then, which `seal` makes safe. States stand in the block of the step that starts from
them, so the last step of a full block is committed only with what follows, or by `close`.
"""

import logging
import time
from base64 import b64encode
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import zarr

from ..ending import at_end
from ..errors import StoreError
from ..generators import generators
from . import chunks, vectors
from .creation import PADDING, OpenStore, Placed, StepRecord, create_store, lengths_of, numbers, padded
from .owner import check_target, read_header
from .place import locate
from .resumption import Reopened
from .schema import COMMIT_SECONDS, COMMIT_SHARE, FACTS

log = logging.getLogger("attrib")

_dropped: list["Writer"] = []  # by recorders that are gone


def close_dropped() -> None:
    """Close the writers of recorders that were never closed and cannot be any more: they hold their stores."""
    while _dropped:
        _dropped.pop().finish()


@dataclass(frozen=True)
class Piece:
    """A block as far as it is filled, to be written. start: its first step. placed: of those of its records that were
    written before, shared by all pieces of the block. after: the parameters (P,) after its last step; generators: their
    state then, (octets,). facts: the header. full: it does not grow any more; last: nothing follows."""

    start: int
    records: list[StepRecord]
    placed: list[Placed]
    after: np.ndarray
    generators: np.ndarray
    facts: dict[str, Any]
    full: bool
    last: bool = False

    @property
    def stop(self) -> int:
        return self.start + len(self.records)


class Writer:
    """Writes one run, from its first step on, a block at a time on a thread of its own.

    At most one block is being written while the next fills up. What could not be written is tried again by the next `check`,
    `ready` or `close`, which raise what goes wrong. A process that ends without `close` writes what is left.

    Args:
        target: path or zarr Store. header: JSON-able facts about the run, stored in the group's attribute `attrib`.
        constants: tensors that do not change, in the order of their names in the header.
        overwrite: replace what is there. reopened: a store of this run, to go on with.
        block: steps per block, committed whole; None chooses by size, and commits as it grows.
        states_every: states stored; rounded up to whole blocks where it is longer than one.
    """

    def __init__(
        self,
        target: Any,
        header: dict[str, Any],
        constants: list[np.ndarray],
        overwrite: bool,
        block: int | None,
        states_every: int = 1,
        reopened: Reopened | None = None,
    ) -> None:
        if reopened is None:
            check_target(target, overwrite)
        self.place = locate(target)
        self._overwrite, self._constants = overwrite, constants
        self._header = {**header, "complete": False} if reopened is None else reopened.header
        self._asked = block, states_every
        self._opened: OpenStore | None = None if reopened is None else reopened.store
        self._start = 0 if reopened is None else reopened.start  # first step of the block that grows
        self._records: list[StepRecord] = [] if reopened is None else reopened.records
        self._placed: list[Placed] = [] if reopened is None else reopened.placed
        self._last: np.ndarray = np.zeros(0) if reopened is None else reopened.after
        self._generators: np.ndarray = np.zeros(0, np.uint8) if reopened is None else reopened.generators
        self._buffers: dict[str, np.ndarray] = {}
        self._thread = ThreadPoolExecutor(1, "attrib-writer")
        self._writing: tuple[Piece, Future[None]] | None = None
        self._unwritten: Piece | None = None  # it could not be
        self._due = 0.0  # when the block that grows is committed next
        self._cancel = at_end(self.finish)
        self.closed = False

    @property
    def steps(self) -> int:
        """Steps appended so far, committed or not."""
        return self._start + len(self._records)

    @property
    def wants_state(self) -> bool:
        """Whether the next step begins a block, or with `states_every` a key frame."""
        return self._opened is None or (not self._records and self._start % self._store.lengths.frame == 0)

    @contextmanager
    def ready(self, record: StepRecord) -> Iterator[None]:
        """Within it the step is made and appended: before, what can fail of its storing is tried. The store is made for the
        first step, and taken away again where that one fails.

        Raises:
            StoreError, StoreExistsError: the step must not be made.
        """
        if self._opened is None:
            self._create(record)
        self.check(wait=len(self._records) + 1 == self._store.lengths.block)
        try:
            yield
        except BaseException:
            if not self.steps:
                self._store.remove()
                self._opened = None
            raise
        self._store.keep()

    def append(self, record: StepRecord, theta_after: np.ndarray) -> None:
        """Add a step, within `ready`; a full block goes to the writing thread. The arrays must not change afterwards."""
        if self.steps % self._store.lengths.states_every:
            record = record._replace(theta=None)
        now = time.monotonic()
        if not self._records:
            self._due = max(self._due, now + COMMIT_SECONDS)
        self._records.append(record)
        self._last, self._generators = theta_after, generators(whole=True).numpy()
        if len(self._records) == self._store.lengths.block:
            self._submit(self._piece(full=True))
            self._start, self._records, self._placed = self.steps, [], []
        elif now >= self._due and self._asked[0] is None and self._writing is None:
            self._submit(self._piece(full=False))

    def check(self, wait: bool = False) -> None:
        """Raise StoreError where a block could not be written, nor now."""
        self._collect(wait)
        if self._unwritten is None:
            return
        piece = self._unwritten
        try:
            self._write(piece)
        except Exception as error:
            raise StoreError(
                f"the store could not be written: got {error!r}, at steps {piece.start} to {piece.stop - 1} of "
                f"{self.place}, before step {self.steps}. They were made, and are kept in memory; what was "
                f"committed can be read. Make room, and go on or call recorder.close(): either writes them."
            ) from error
        self._unwritten = None

    def update_header(self, **facts: Any) -> None:
        """Change facts in the header; they are written with the next commit."""
        self._header.update(facts)

    def flush(self) -> None:
        """Commit the steps so far. Raises StoreError where they could not be written; they are kept."""
        self.check(wait=True)
        if self._records:
            self._unwritten = self._piece(full=False)
            self.check()

    def close(self, complete: bool = True) -> None:
        """Write what is left, the final parameters, and whether the run is complete.

        Raises:
            StoreError: it could not be written; it may be called again.
        """
        if self.closed:
            return
        self._collect(wait=True)
        if self._unwritten is not None and (self._unwritten.last or not self._unwritten.full):
            self._unwritten = None  # what follows holds the same, and more
        self.check()
        if self.steps:
            self.update_header(complete=complete)
            self._unwritten = self._piece(full=complete, last=True)
            self.check()
        self.release()

    def release(self) -> None:
        """Let go of the store, with nothing more written to it."""
        self._thread.shutdown(wait=True)
        if self._opened is not None and self._opened.lease is not None:
            self._opened.lease.release()
        self._cancel()
        self.closed = True

    def drop(self) -> None:
        """Nobody can close it any more: it is closed at the end, or when another recorder is made."""
        if not self.closed:
            _dropped.append(self)

    def finish(self) -> None:
        """Close it because nobody did."""
        try:
            self.close(complete=False)
            if self.steps:
                log.error(
                    "a recorder was not closed: its %d steps were written to %s, as those of a run that ended early. "
                    "Call recorder.close(), or use `with`, or go on with resume=True",
                    *(self.steps, self.place),
                )
        except Exception as error:
            log.error("a recorder was not closed, and what was left of it could not be written: %s", error)

    @property
    def _store(self) -> OpenStore:
        assert self._opened is not None
        return self._opened

    def _create(self, first: StepRecord) -> None:
        lengths = lengths_of(first, *self._asked)
        self._header.update(lengths._asdict())
        header = {
            **self._header,
            "committed_steps": 0,
            "written_steps": 0,
            "slots": len(first.ids),
            "passes": len(first.passes),
            **dict.fromkeys(("forms", "rows", "shared"), ()),
            "ids": [0, 0],
        }
        self._opened = create_store(self.place, self._overwrite, header, self._constants, first, lengths)

    def _piece(self, full: bool, last: bool = False) -> Piece:
        facts = dict(self._header)
        return Piece(self._start, list(self._records), self._placed, self._last, self._generators, facts, full, last)

    def _submit(self, piece: Piece) -> None:
        self._writing = piece, self._thread.submit(self._write, piece)

    def _collect(self, wait: bool) -> None:
        """Of the block that is being written, once it is, whether it was."""
        if self._writing and (wait or self._writing[1].done()):
            (piece, future), self._writing = self._writing, None
            if future.exception() is not None:
                self._unwritten = piece

    # one block, on the writing thread

    def _write(self, piece: Piece) -> None:
        began = time.monotonic()
        self._check_owner()
        every = self._store.lengths.states_every
        follows = piece.last or not piece.full  # the state after the last step is stored with it
        if piece.records:
            self._put_block(piece, follows)
        if piece.last and (piece.facts["complete"] if every > 1 else not piece.records):
            self._put_vectors("theta", -(-piece.stop // every), [piece.after])
        if piece.last:
            self._store.trim(piece.stop, bool(piece.facts["complete"]))
        committed = piece.stop - (every == 1 and not follows)
        counts = {"committed_steps": committed, "written_steps": piece.stop}
        # in no chunk: one that is replaced is there for this header and for the one before
        drawn = {"generators": b64encode(piece.generators.tobytes()).decode()}
        widths = {"slots": self._store.slots, "passes": self._store.passes}
        held = {**self._store.examples.facts, "ids": self._store.ids.written, **widths}
        self._store.sealing.commit({**piece.facts, **counts, **held, **drawn}, piece.full)
        self._due = time.monotonic() + max(COMMIT_SECONDS, (time.monotonic() - began) / COMMIT_SHARE)

    def _check_owner(self) -> None:
        """Raise StoreError where the store is not this run's any more."""
        attributes = read_header(self._store.sealing, self.place)
        if attributes is None or attributes["attrib"].get("id") != self._header["id"]:
            raise StoreError(
                f"the store is another run's now, or was taken away: expected run {self._header['id']}, at {self.place}. "
                f"Nothing was written to it."
            )

    def _put_block(self, piece: Piece, follows: bool) -> None:
        start, records, lengths = piece.start, piece.records, self._store.lengths
        piece.placed.extend(map(self._store.assign, records[len(piece.placed) :]))
        width, passes = max(len(r.ids) for r in records), max(len(r.passes) for r in records)
        slotted, drawn = (*PADDING, *self._store.shares), [n for n in ("random",) if n in self._store.arrays]
        self._store.slots = width = self._widen(slotted, self._store.slots, width, start)
        self._store.passes = passes = self._widen(("passes", *drawn), self._store.passes, passes, start)
        last = [piece.after] if follows and lengths.states_every == 1 else []
        states = [*(r.theta for r in records if r.theta is not None), *last]
        if states:
            self._put_vectors("theta", start // lengths.states_every, states)
        self._put_vectors("gradient", start, [r.gradient for r in records])
        if records[0].penalty is not None:
            self._put_vectors("penalty", start, [r.penalty for r in records if r.penalty is not None])
        self._put("hyper", start, np.stack([r.hyper for r in records]))
        self._put("index", start, padded([p.ids for p in piece.placed], width, PADDING["index"]))
        self._put("row", start, padded([p.rows for p in piece.placed], width, PADDING["row"]))
        self._put("facts", start, np.array([[r.log.get(name, np.nan) for name in FACTS] for r in records]))
        self._put("passes", start, padded([*map(numbers, records, piece.placed)], passes, 0))
        for name in records[0].shares:
            self._put(name, start, padded([r.shares[name] for r in records], width, 0))
        if drawn:
            random = [np.stack([p.random for p in r.passes if p.random is not None]) for r in records]
            self._put("random", start, padded(random, passes, 0))
        for dtype in records[0].buffers:
            self._put(f"buffers/{dtype}", start, np.stack([r.buffers[dtype] for r in records]))
        for key, value in (records[0].state or {}).items():
            self._put_vectors(f"state/{key}", start // lengths.frame, [value])
        self._store.examples.commit()
        self._store.ids.commit()

    def _stacked(self, name: str, rows: list[np.ndarray]) -> np.ndarray:
        """In the same memory for every block: pages that are new to the process cost more than the copy."""
        if name not in self._buffers:
            self._buffers[name] = np.empty((self._store.lengths.block + 1, len(rows[0])), dtype=rows[0].dtype)
        return np.stack(rows, out=self._buffers[name][: len(rows)])

    def _widen(self, names: Sequence[str], before: int, width: int, steps: int) -> int:
        """Make room for larger batches, or more passes, and write the padding of the earlier steps: no committed chunk may
        be missing. The width from now on."""
        if width <= before:
            return before
        for name in names:
            array, fill = self._store.arrays[name], PADDING.get(name, 0)
            whole = -(-before // array.chunks[1]) * array.chunks[1]  # columns that have chunks already
            array.resize((array.shape[0], width, *array.shape[2:]))
            for first in range(0, steps, array.chunks[0]):
                array[first : min(first + array.chunks[0], steps), whole:] = fill
        return width

    def _put(self, name: str, start: int, values: np.ndarray) -> None:
        chunks.put(self._grown(name, start + len(values)), start, values)

    def _grown(self, name: str, rows: int) -> zarr.Array:
        array = self._store.arrays[name] = chunks.grown(self._store.arrays[name], rows)
        return array

    def _put_vectors(self, name: str, start: int, rows: list[np.ndarray]) -> None:
        """(P,) each. What fills chunks is not copied."""
        array = self._grown(name, start + len(rows))
        done = vectors.put(self._store.sealing, array, start, rows)
        if done < len(rows):
            chunks.put(array, start + done, self._stacked(name, rows[done:]))
