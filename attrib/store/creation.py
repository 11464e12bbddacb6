"""Make the store of a run: the group, and arrays that fit its first step.

It is made when that step is about to be, and taken away again where the step then fails: what was refused leaves no store.
A store that is to be overwritten keeps its place until the first step of the new one is made.
"""

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import zarr
from zarr.abc.store import Store
from zarr.core.sync import sync

from ..errors import StoreError, StoreExistsError
from ..inputs import Inputs
from .chunks import trimmed
from .disk import Disk
from .examples import ExampleTables, Places
from .ids import IdTable
from .lease import Lease
from .metadata import HEADER
from .owner import check_target, clear
from .place import Place, beside, discard, locate, occupied, settle, writable
from .reader import dimensions
from .schema import CHUNK_BYTES, DIMENSIONS, FACTS, PASS_FACTS, STATE_BYTES, Lengths, block_steps, create
from .sealing import SealingStore, create_digests

FACT_NAMES = {"facts": FACTS, "passes": PASS_FACTS}
PADDING = {"index": -1, "row": -1}  # of slots beyond a step's batch; of all other arrays 0


class PassRecord(NamedTuple):
    """One of the passes that the gradient of a step was made of. inputs: None where they are known to stand in the store.
    scale, factor_scale: see `schema`."""

    size: int
    inputs: Inputs | None
    scale: float
    factor_scale: float
    random: np.ndarray | None  # (bytes,) uint8


class StepRecord(NamedTuple):
    """Everything about one step, as arrays. `state` is read only where `Writer.wants_state`. buffers (entries,), by
    type, are those after the step; of the first, until it is made, those before it."""

    theta: np.ndarray | None  # (P,) before the step
    gradient: np.ndarray  # (P,)
    hyper: np.ndarray  # (K, H) float64
    ids: np.ndarray  # (B,) int64, or objects that are strings: of all passes, one behind the other
    passes: tuple[PassRecord, ...]
    state: dict[str, np.ndarray] | None  # (P,) each, before the step
    log: dict[str, float]  # some of LOGS
    shares: dict[str, np.ndarray]  # (B, ...) by name, with capture="gradients" or "factors"
    penalty: np.ndarray | None = None  # (P,), of the gradient
    buffers: dict[str, np.ndarray] = {}  # noqa: RUF012 - a named tuple's default, which nobody changes


class Placed(NamedTuple):
    """Of a step: ids (B,) int64, as numbers; the rows (B,) of its inputs, and where those of each pass stand."""

    ids: np.ndarray
    rows: np.ndarray
    passes: tuple[Places, ...]


@dataclass
class OpenStore:
    """The store of a run that is being recorded. shares: names of the arrays of stored shares. slots, passes: of a step.
    replaced: what stood there before, kept until the first step is made. lease: while it is written to."""

    place: Place
    sealing: SealingStore
    arrays: dict[str, zarr.Array]
    shares: tuple[str, ...]
    examples: ExampleTables
    ids: IdTable
    lengths: Lengths
    slots: int
    passes: int
    lease: Lease | None
    replaced: Path | None = None

    def assign(self, record: StepRecord) -> Placed:
        """What stands in the arrays for its ids and its inputs."""
        ids, places, first = self.ids.place(record.ids), [], 0
        for each in record.passes:
            assert each.inputs is not None
            places.append(self.examples.place(ids[first : first + each.size], each.inputs))
            first += each.size
        return Placed(ids, np.concatenate([at.rows for at in places]), tuple(places))

    def trim(self, steps: int, complete: bool) -> None:
        """The run ends: its arrays hold its steps, its inputs and no more."""
        rows = self.lengths.rows(steps, complete)
        for name, array in self.arrays.items():
            self.arrays[name] = trimmed(array, rows[dimensions(array)[0]])
        self.examples.trim()

    def keep(self) -> None:
        """The first step is made."""
        if self.replaced is not None:
            discard(self.replaced)
            self.replaced = None

    def remove(self) -> None:
        """Take away what was made and nothing else, as far as the place lets go of it; what it replaced is back."""
        if self.replaced is not None and isinstance(self.place, Path):
            made, self.replaced = settle(self.replaced, self.place, overwrite=True), None
            if made is not None:
                discard(made)
        else:
            remove_arrays(self.sealing, self.place)
        if self.lease is not None:
            self.lease.release()


def create_store(
    target: Any,
    overwrite: bool,
    header: dict[str, Any],
    constants: list[np.ndarray],
    first: StepRecord,
    lengths: Lengths,
) -> OpenStore:
    """The store of a run whose first step is `first`. Where it cannot be made, nothing of it is left.

    Raises:
        StoreExistsError, StoreError.
    """
    check_target(target, overwrite)
    place = locate(target)
    made = beside(place) if isinstance(place, Path) and occupied(place) else place
    try:
        existed = isinstance(made, Path) and made.exists()
        store = writable(made)
        lease = _occupy(made, store)
        sealing = SealingStore(store, header["id"], growing=True)
        try:
            sealing.begin(header)  # first: what a killed process leaves is a run's then
            arrays = _arrays(sealing, constants, first, lengths)
            ids = IdTable.created(zarr.open_group(sealing, mode="r+", zarr_format=3), first.ids, lengths.block)
            sealing.begin(header)
            replaced = None
            if isinstance(place, Path) and isinstance(made, Path) and made != place:
                replaced = settle(made, place, overwrite)
        except BaseException:
            remove_arrays(sealing, made, folder=not existed)
            if lease is not None:
                lease.release()
            raise
    except (StoreExistsError, StoreError):
        raise
    except Exception as error:
        raise StoreError(
            f"the store cannot be made: got {error!r}, expected a place that can be written to, at {target}. Choose another "
            f"place, or make room. The step was refused."
        ) from error
    sealing.move(place)
    group = zarr.open_group(sealing, mode="r+", zarr_format=3)
    widths = len(first.ids), len(first.passes)
    tables = ExampleTables(group)
    return OpenStore(place, sealing, arrays, tuple(first.shares), tables, ids, lengths, *widths, lease, replaced)


def _occupy(place: Place, store: Store) -> Lease | None:
    """A folder that is ours and empty; of another store, what attrib wrote there before is taken out."""
    if not isinstance(place, Path) or not isinstance(store, Disk):
        clear(place)
        return None
    store.make()
    lease = Lease(place)
    if occupied(place):
        lease.release()
        check_target(place, overwrite=False)
    return lease


def remove_arrays(sealing: SealingStore, place: Place, folder: bool = True) -> None:
    """Take the arrays that were written, and the header, out of a store, and the folder if nothing else is in it."""
    with suppress(Exception):
        for name in {name.split("/")[0] for name in sealing.arrays}:
            sync(sealing.delete_dir(name))
        sync(sealing.delete(HEADER))
        if folder and isinstance(place, Path):
            os.rmdir(place)


def _arrays(store: Store, constants: list[np.ndarray], first: StepRecord, lengths: Lengths) -> dict[str, zarr.Array]:
    """Those of the steps, with no rows yet: one for each kind of thing in the first. The constants are written as well."""
    group = zarr.open_group(store, mode="r+", zarr_format=3)
    create_digests(group)
    for number, value in enumerate(constants):
        dims = tuple(f"d{d}" for d in range(value.ndim))
        create(group, f"constants/{number}", value.shape, value.shape, value.dtype, dims)[...] = value
    n, every = lengths.block, lengths.states_every
    size, slots, kind = len(first.gradient), len(first.ids), first.gradient.dtype
    arrays: dict[str, zarr.Array] = {}

    def add(name: str, shape: tuple[int, ...], chunks: tuple[int, ...], dtype: Any, dims: Any = None) -> None:
        dims, fill = dims or DIMENSIONS[name], PADDING.get(name, 0)
        arrays[name] = create(
            group,
            name,
            (0, *shape),
            chunks,
            dtype,
            dims,
            fill,
            attributes={"facts": list(FACT_NAMES[name])} if name in FACT_NAMES else None,
        )

    entries = min(size, max(1, STATE_BYTES // (n * kind.itemsize)))
    alone = (1, min(size, STATE_BYTES // kind.itemsize))
    add("theta", (size,), (n, entries) if every == 1 else alone, kind)
    add("gradient", (size,), (n, entries), kind)
    if first.penalty is not None:
        add("penalty", (size,), (n, entries), first.penalty.dtype)
    add("hyper", first.hyper.shape, (n, *first.hyper.shape), np.float64)
    add("index", (slots,), (n, slots), np.int64)
    add("row", (slots,), (n, slots), np.int64)
    add("facts", (len(FACTS),), (n, len(FACTS)), np.float64)
    passes = len(first.passes)
    add("passes", (passes, len(PASS_FACTS)), (n, passes, len(PASS_FACTS)), np.float64)
    for key, value in (first.state or {}).items():
        add(f"state/{key}", (size,), (1, min(size, STATE_BYTES // value.itemsize)), value.dtype, ("frame", "parameter"))
    for name, values in first.shares.items():
        at_once = max(1, min(slots, CHUNK_BYTES // max(1, n * values[0].nbytes)))
        rest = ("parameter",) if name == "gradients" else tuple(f"d{d}" for d in range(values.ndim - 1))
        add(name, values.shape, (n, at_once, *values.shape[1:]), values.dtype, ("step", "slot", *rest))
    for dtype, values in first.buffers.items():
        create(group, f"initial/{dtype}", values.shape, values.shape, values.dtype, ("entry",))[...] = values
        add(f"buffers/{dtype}", values.shape, (n, *values.shape), values.dtype, ("step", "entry"))
    random = first.passes[0].random
    if random is not None:
        add("random", (passes, len(random)), (n, passes, len(random)), np.uint8)
    return arrays


def lengths_of(first: StepRecord, block: int | None, every: int) -> Lengths:
    """What was asked for, `block` and `states_every`, as it suits steps like the first."""
    theta = [first.gradient] if every == 1 else []  # of the same size
    vectors = [first.gradient] if first.penalty is None else [first.gradient, first.penalty]
    inputs = [a for each in first.passes if each.inputs for a in (*each.inputs.rows, *each.inputs.shared)]
    stored = [*theta, *vectors, *inputs, *first.shares.values()]
    block = block or block_steps(sum(a.nbytes for a in stored))
    if every > 1:
        block = min(block, every)
        every = -(-every // block) * block
    return Lengths(block, every, max(block, every))


def numbers(record: StepRecord, placed: Placed) -> np.ndarray:
    """(M, fact), of its passes."""
    places = zip(record.passes, placed.passes, strict=True)
    return np.array([[each.size, at.kind, at.shared, each.scale, each.factor_scale] for each, at in places])


def padded(rows: list[np.ndarray], width: int, fill: int) -> np.ndarray:
    """Arrays (b, ...) of different b -> (len, width, ...), filled up; not copied where there is nothing to do."""
    if all(len(values) == width for values in rows):
        return rows[0][None] if len(rows) == 1 else np.stack(rows)
    out = np.full((len(rows), width, *rows[0].shape[1:]), fill, dtype=rows[0].dtype)
    for n, values in enumerate(rows):
        out[n, : len(values)] = values
    return out
