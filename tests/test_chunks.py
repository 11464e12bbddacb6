"""Rows written past zarr are those that zarr would have written, and arrays are as long as what is in them at the end."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from cases import OPTIMIZERS
from training import train

from attrib.store import Reader, close_dropped
from attrib.store import chunks as past_zarr
from attrib.store.disk import Disk
from attrib.store.schema import create
from attrib.store.sealing import SealingStore

SHAPES = [((5,), (4,)), ((8, 3), (4, 3)), ((9, 7), (4, 3)), ((4, 5, 2), (4, 2, 2)), ((3, 0), (4, 1)), ((1, 6), (1, 4))]


def files(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def emptied(folder: Path, rows: int, like: np.ndarray, chunks: tuple[int, ...]) -> zarr.Array:
    group = zarr.create_group(SealingStore(Disk(folder), "id", growing=True), zarr_format=3)
    dims = ("step", *(f"d{d}" for d in range(like.ndim - 1)))
    return create(group, "a", (rows, *like.shape[1:]), chunks, like.dtype, dims, -1)


@pytest.mark.parametrize("dtype", [np.int64, np.float32, np.float64])
@pytest.mark.parametrize(("shape", "chunks"), SHAPES)
def test_rows_are_written_as_zarr_writes_them(
    shape: tuple[int, ...], chunks: tuple[int, ...], dtype: Any, tmp_path: Path
) -> None:
    values = np.random.default_rng(0).integers(-9, 9, shape).astype(dtype)
    emptied(tmp_path / "zarr", len(values), values, chunks)[...] = values
    array = past_zarr.grown(emptied(tmp_path / "past", 0, values, chunks), len(values))
    past_zarr.put(array, 0, values)
    assert array.shape[0] % chunks[0] == 0
    past_zarr.trimmed(array, len(values))
    assert files(tmp_path / "past") == files(tmp_path / "zarr")


@pytest.mark.parametrize("every", [1, 4])
def test_arrays_are_longer_than_a_run_that_is_killed_and_not_than_one_that_ends(every: int, tmp_path: Path) -> None:
    options: dict[str, Any] = {"block": 2, "states_every": every}
    train(tmp_path / "whole", OPTIMIZERS["adamw"], "mlp", steps=11, **options)
    reader = Reader(tmp_path / "whole")
    for name in reader.names():
        assert zarr.open_array(tmp_path / "whole" / name, mode="r").shape[:1] == (
            (reader.committed(name),) if reader.array(name).ndim else ()
        ), name
    train(tmp_path / "early", OPTIMIZERS["adamw"], "mlp", steps=11, close=False, **options)
    early = Reader(tmp_path / "early")
    assert 0 < early.steps < 11
    assert zarr.open_array(tmp_path / "early" / "gradient", mode="r").shape[0] > early.steps
    for name in ("gradient", "hyper", "index", "theta"):
        assert len(early.read(name)) == early.committed(name)
        np.testing.assert_array_equal(early.read(name), reader.read(name, slice(0, early.committed(name))))
    close_dropped()
