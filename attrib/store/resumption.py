"""Open the store of a run that ended early, to go on writing it.

The block that was growing is read back whole: its chunks are written again as it grows on.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from .creation import OpenStore, PassRecord, Placed, StepRecord
from .examples import ExampleTables, Places
from .ids import IdTable
from .lease import Lease
from .place import locate, writable
from .reader import Reader
from .schema import DIGESTS, LOGS, Lengths, continued
from .sealing import SealingStore


@dataclass(frozen=True)
class Reopened:
    """start: first step of the block that grows; records, placed: its steps so far. generators: their state (octets,) then;
    after: the parameters (P,), once they are known."""

    store: OpenStore
    header: dict[str, Any]
    start: int
    records: list[StepRecord]
    placed: list[Placed]
    generators: np.ndarray
    after: np.ndarray = field(default_factory=lambda: np.zeros(0))

    @property
    def steps(self) -> int:
        return self.start + len(self.records)


def lease(target: Any) -> Lease | None:
    """Of a store that is there.

    Raises:
        StoreExistsError: a recorder is writing to it.
    """
    place = locate(target)
    return Lease(place.resolve()) if isinstance(place, Path) and place.is_dir() else None


def reopen(reader: Reader, held: Lease | None) -> Reopened:
    """The store of a run that is being read, which nobody else writes to.

    Raises:
        StoreError: something that is needed is damaged.
    """
    place, header = locate(reader.target), {k: v for k, v in reader.header.items() if k not in ("sealed", "seal")}
    sealing = SealingStore(writable(place), header["id"], growing=True, attributes=reader.store.attributes)
    sealing.resume(reader.store.closed())
    group = zarr.open_group(sealing, mode="r+", zarr_format=3)
    stepwise = [
        n
        for n in reader.store.arrays
        if n != DIGESTS and n.split("/")[0] not in ("constants", "initial", "examples", "shared", "ids")
    ]
    arrays = {name: continued(reader.array(name), sealing) for name in stepwise}
    shares = tuple(name for name in stepwise if name.split("/")[0] in ("gradients", "factors"))
    widths = int(header["slots"]), int(header["passes"])
    lengths = Lengths(*(int(header[name]) for name in Lengths._fields))
    written = int(header["written_steps"])
    tables = ExampleTables.restored(group, reader, written)
    ids = IdTable.restored(group, reader)
    store = OpenStore(place, sealing, arrays, shares, tables, ids, lengths, *widths, held)
    start = written - written % lengths.block
    records, placed = _growing(reader, lengths, range(start, written), shares) if written > start else ([], [])
    return Reopened(store, header, start, records, placed, reader.generators)


def _growing(
    reader: Reader, lengths: Lengths, steps: range, shares: tuple[str, ...]
) -> tuple[list[StepRecord], list[Placed]]:
    """The records of the steps of a block that is not full, without their inputs, and where those stand."""
    rows = slice(steps.start, steps.stop)
    every, frame = lengths.states_every, lengths.frame
    stored = [step for step in steps if step % every == 0]
    states = (
        dict(zip(stored, reader.read("theta", slice(stored[0] // every, stored[-1] // every + 1)), strict=True))
        if (stored)
        else {}
    )
    buffers = {name: name.removeprefix("buffers/") for name in reader.names() if name.startswith("buffers/")}
    names = ("gradient", "hyper", "index", "row", *shares, *buffers, *(n for n in ("penalty", "random") if n in reader))
    read = {name: reader.read(name, rows) for name in names}
    facts, passes = reader.facts(rows), reader.passes(rows)
    drawn = read.get("random", [[None] * passes.values.shape[1]] * len(steps))
    keys = [name for name in reader.names() if name.startswith("state/")]
    records, placed = [], []
    for n, step in enumerate(steps):
        ids = read["index"][n][read["index"][n] >= 0]
        begins = step == steps.start and step % frame == 0
        records.append(
            StepRecord(
                theta=states.get(step),
                gradient=read["gradient"][n],
                hyper=read["hyper"][n],
                ids=ids,
                passes=tuple(
                    PassRecord(p.slots.stop - p.slots.start, None, p.scale, p.factor_scale, random)
                    for p, random in zip(passes.of_step(n), drawn[n], strict=False)
                ),
                state={k.removeprefix("state/"): reader.read(k, step // frame) for k in keys} if begins else None,
                log={name: float(facts[name][n]) for name in LOGS},
                shares={name: read[name][n][: len(ids)] for name in shares},
                penalty=read["penalty"][n] if "penalty" in read else None,
                buffers={dtype: read[name][n] for name, dtype in buffers.items()},
            )
        )
        at = read["row"][n][: len(ids)]
        placed.append(Placed(ids, at, tuple(Places(p.kind, at[p.slots], p.shared) for p in passes.of_step(n))))
    return records, placed
