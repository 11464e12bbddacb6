"""Labelled datasets on disk, whole or not at all: written beside their place, and put there when they are complete."""

import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

import xarray as xr
import zarr

from ..errors import AttribError, StoreError
from .checked import check_present
from .owner import check_target, clear
from .place import beside, discard, locate, settle, writable
from .reader import chunk_keys, open_array, open_checked
from .schema import DIGESTS, FORMAT, compressors
from .sealing import SealingStore, create_digests


def save_dataset(dataset: xr.Dataset, target: Any, facts: dict[str, Any], overwrite: bool) -> None:
    """Write a dataset of numbers, with facts (JSON) in its header.

    Raises:
        StoreExistsError: something is there that must not be overwritten. StoreError: it could not be written.
    """
    check_target(target, overwrite, "result")
    place = locate(target)
    made = beside(place) if isinstance(place, Path) else place
    header = {"kind": "result", "id": uuid.uuid4().hex, "format": FORMAT, **facts}
    try:
        if not isinstance(place, Path):
            dataset = dataset.load()  # it may be what is there
            clear(place)
        _write(dataset, writable(made), header)
        replaced = settle(made, place, overwrite) if isinstance(place, Path) and isinstance(made, Path) else None
    except BaseException as error:
        with suppress(OSError):
            if isinstance(made, Path):
                discard(made)
        if isinstance(error, AttribError) or not isinstance(error, OSError):
            raise
        raise StoreError(
            f"the result could not be written: got {error!r}, at {place}. Nothing of it is left there, and what stood there "
            f"stands there still. Make room, or choose another place."
        ) from error
    if replaced is not None:
        discard(replaced)


def _write(dataset: xr.Dataset, store: Any, header: dict[str, Any]) -> None:
    sealing = SealingStore(store, header["id"], growing=False)
    encoding = {name: {"compressors": compressors()} for name in dataset.variables}
    dataset.drop_encoding().to_zarr(
        sealing, mode="w", zarr_format=3, consolidated=False, encoding=encoding, write_empty_chunks=True
    )
    create_digests(zarr.open_group(sealing, mode="r+", zarr_format=3))
    sealing.commit(header, full=True)


def open_dataset(target: Any) -> tuple[xr.Dataset, dict[str, Any], Any]:
    """A dataset that `save_dataset` wrote, lazily, its facts, and where it is.

    Raises:
        StoreError: nothing there, something else, or a file of it is missing or damaged; also when it is read.
    """
    store, where = open_checked(target, "result")
    for name in store.arrays:
        array = open_array(store, name)
        grid = [range(-(-n // c)) for n, c in zip(array.shape, array.chunks, strict=True)]
        if all(grid):
            check_present(store, array, chunk_keys(array, grid))
    try:
        dataset = xr.open_zarr(store, chunks=None, consolidated=False, zarr_format=3)
    except StoreError:
        raise
    except Exception as error:
        raise StoreError(f"no result can be opened there: got {str(error)[:200]!r}, at {where}.") from error
    dataset.attrs.pop("attrib", None)
    return dataset.drop_vars(DIGESTS), store.facts, where
