"""Make the store of a run: the group, and arrays that fit its first step.

It is made when that step is about to be, and taken away again where the step then fails: what was refused leaves no store.
"""

from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import zarr
from zarr.abc.store import Store
from zarr.core.sync import sync
from zarr.errors import GroupNotFoundError

from ..errors import StoreError, StoreExistsError
from .examples import ExampleTables
from .ids import IdTable
from .schema import CHUNK_BYTES, DIMENSIONS, LOGS, STATE_BYTES, block_steps, create, local_path

PADDING = {"index": -1, "row": -1}  # of slots beyond a step's batch; of all other arrays 0
# at the top of a store
NAMES = {"constants", "state", "gradients", "factors", "ids", *(name.split("/")[0] for name in DIMENSIONS)}


class StepRecord(NamedTuple):
    """Everything about one step, as arrays. `state` is read only where `Writer.wants_state`."""

    theta: np.ndarray | None  # (P,) before the step
    gradient: np.ndarray  # (P,)
    hyper: np.ndarray  # (K, H) float64
    ids: np.ndarray  # (B,) int64, or objects that are strings
    batch: list[np.ndarray]  # (B, ...) each
    scale: float
    state: dict[str, np.ndarray] | None  # (P,) each, before the step
    random: np.ndarray | None  # (bytes,) uint8
    log: dict[str, float]  # some of LOGS
    shares: dict[str, np.ndarray]  # (B, ...) by name, with capture="gradients" or "factors"
    penalty: np.ndarray | None = None  # (P,), of the gradient


class Lengths(NamedTuple):
    """Steps per block, between stored states, between stored accumulators."""

    block: int
    states_every: int
    frame: int


class Created(NamedTuple):
    """A store that holds no step yet. shares: names of the arrays of stored shares. folder: made with it, if it is one."""

    group: zarr.Group
    arrays: dict[str, zarr.Array]
    shares: tuple[str, ...]
    examples: ExampleTables
    ids: IdTable
    lengths: Lengths
    folder: Path | None

    def remove(self) -> None:
        _remove(self.group, self.folder)


def check_target(target: Any, overwrite: bool) -> None:
    """Raise StoreExistsError where something is stored already and must not be overwritten.

    A folder or file that is no Zarr store is never overwritten, asked or not.
    """
    path = local_path(target)
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


def create_store(
    target: str | Store,
    overwrite: bool,
    header: dict[str, Any],
    constants: dict[str, np.ndarray],
    first: StepRecord,
    lengths: Lengths,
) -> Created:
    """The store of a run whose first step is `first`. Where it cannot be made, nothing of it is left.

    Raises:
        StoreExistsError, StoreError.
    """
    check_target(target, overwrite)
    path = local_path(target)
    folder = path if path is not None and not path.exists() else None
    try:
        group = zarr.create_group(target, overwrite=overwrite, zarr_format=3)
        try:
            arrays = _arrays(group, constants, first, lengths)
            ids = IdTable(group, first.ids, lengths.block)
            group.attrs["attrib"] = header
        except BaseException:
            _remove(group, folder)
            raise
    except Exception as error:
        raise StoreError(
            f"the store cannot be made: got {error!r}, expected a place that can be written to, at {target}. Choose another "
            f"place, or make room. The step was refused."
        ) from error
    return Created(group, arrays, tuple(first.shares), ExampleTables(group), ids, lengths, folder)


def _remove(group: zarr.Group, folder: Path | None) -> None:
    """Take away what was made and nothing else, as far as the place lets go of it."""
    with suppress(Exception):
        for name in NAMES:
            sync((group.store_path / name).delete_dir())
        sync((group.store_path / "zarr.json").delete())
        if folder is not None:
            folder.rmdir()


def _arrays(
    group: zarr.Group, constants: dict[str, np.ndarray], first: StepRecord, lengths: Lengths
) -> dict[str, zarr.Array]:
    """Those of the steps, with no rows yet: one for each kind of thing in the first. The constants are written as well."""
    for name, value in constants.items():
        dims = tuple(f"d{d}" for d in range(value.ndim))
        create(group, f"constants/{name}", value.shape, value.shape, value.dtype, dims)[...] = value
    n, every = lengths.block, lengths.states_every
    size, slots, kind = len(first.gradient), len(first.ids), first.gradient.dtype
    arrays: dict[str, zarr.Array] = {}

    def add(name: str, shape: tuple[int, ...], chunks: tuple[int, ...], dtype: Any, dims: Any = None) -> None:
        deltas = name == "theta" and every == 1
        dims, fill = dims or DIMENSIONS[name], PADDING.get(name, 0)
        arrays[name] = create(group, name, (0, *shape), chunks, dtype, dims, fill, deltas)

    entries = min(size, max(1, STATE_BYTES // (n * kind.itemsize)))
    alone = (1, min(size, STATE_BYTES // kind.itemsize))
    add("theta", (size,), (n, entries) if every == 1 else alone, kind)
    for name in ("gradient",) if first.penalty is None else ("gradient", "penalty"):
        add(name, (size,), (n, entries), kind)
    add("hyper", first.hyper.shape, (n, *first.hyper.shape), np.float64)
    add("index", (slots,), (n, slots), np.int64)
    add("row", (slots,), (n, slots), np.int64)
    add("kind", (), (n,), np.int64)
    for name in ("scale", *(f"log/{name}" for name in LOGS)):
        add(name, (), (n,), np.float64)
    for key, value in (first.state or {}).items():
        add(f"state/{key}", (size,), (1, size), value.dtype, ("frame", "parameter"))
    for name, values in first.shares.items():
        at_once = max(1, min(slots, CHUNK_BYTES // max(1, n * values[0].nbytes)))
        rest = ("parameter",) if name == "gradients" else tuple(f"d{d}" for d in range(values.ndim - 1))
        add(name, values.shape, (n, at_once, *values.shape[1:]), values.dtype, ("step", "slot", *rest))
    if first.random is not None:
        add("random", (len(first.random),), (n, len(first.random)), np.uint8)
    return arrays


def lengths_of(first: StepRecord, block: int | None, every: int) -> Lengths:
    """What was asked for, `block` and `states_every`, as it suits steps like the first."""
    theta = [first.gradient] if every == 1 else []  # of the same size
    vectors = [first.gradient] if first.penalty is None else [first.gradient, first.penalty]
    stored = [*theta, *vectors, *first.batch, *first.shares.values()]
    block = block or block_steps(sum(a.nbytes for a in stored))
    if every > 1:
        block = min(block, every)
        every = -(-every // block) * block
    return Lengths(block, every, max(block, every))
