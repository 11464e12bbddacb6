"""The states of a run on disk: writing and reading them, against a plain file of the same bytes, and their size.

Writing ends with the bytes on the disk (sync); reading is from the page cache.

python scripts/bench_trajectory.py [SETTING ...] [--repeats 7] [--steps 64]
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import zarr
from settings import SETTINGS, cross_entropy, folder_bytes, machine, ratio

from attrib.store.schema import STATE_BYTES, block_steps, create


def states(name: str, steps: int) -> np.ndarray:
    """(steps, P) of a real run."""
    setting = SETTINGS[name](steps)
    found = []
    for _, *batch in setting.batches:
        found.append(torch.cat([p.detach().reshape(-1).clone() for p in setting.model.parameters()]))
        setting.optimizer.zero_grad()
        cross_entropy(setting.model, *batch).mean().backward()
        setting.optimizer.step()
    return torch.stack(found).numpy()


def timed(work: object) -> float:
    start = time.perf_counter()
    work()  # type: ignore[operator]
    return time.perf_counter() - start


def measure(name: str, theta: np.ndarray, repeats: int) -> None:
    block = block_steps(2 * theta[0].nbytes)
    entries = min(theta.shape[1], STATE_BYTES // (block * theta.itemsize))
    writes, reads, plain_writes, plain_reads, size = [], [], [], [], 0
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            plain, path = Path(folder) / "plain", Path(folder) / "run"

            def write_plain(plain: Path = plain) -> None:
                with plain.open("wb") as file:
                    for first in range(0, len(theta), block):
                        file.write(theta[first : first + block])
                os.sync()

            def write(path: Path = path) -> None:
                group = zarr.create_group(path, zarr_format=3)
                dims = ("state", "parameter")
                array = create(group, "theta", (0, theta.shape[1]), (block, entries), theta.dtype, dims, steps=True)
                for first in range(0, len(theta), block):
                    array.resize((min(first + block, len(theta)), theta.shape[1]))
                    array[first:] = theta[first : first + block]
                os.sync()

            plain_writes.append(timed(write_plain))
            writes.append(timed(write))
            size = folder_bytes(path)
            plain_reads.append(timed(lambda plain=plain: np.fromfile(plain, theta.dtype)))
            array = zarr.open_group(path, mode="r")["theta"]
            reads.append(timed(lambda array=array: array[:]))
            np.testing.assert_array_equal(array[:].view(np.int32), theta.view(np.int32))
    print(
        f"{name:8s} {theta.shape[0]} x {theta.shape[1]}, blocks of {block}: write {ratio(plain_writes, writes)}, "
        f"read {ratio(plain_reads, reads)} of the plain file's speed; size {size / theta.nbytes:.3f} of raw"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("settings", nargs="*", default=["p113", "gpt", "p31"], metavar="SETTING")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--steps", type=int, default=64)
    options = parser.parse_args()
    print(machine())
    for name in options.settings:
        measure(name, states(name, options.steps), options.repeats)


if __name__ == "__main__":
    main()
