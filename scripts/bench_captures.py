"""What recording costs by capture, in time and bytes, as ratios to plain training and to full per-example gradients.

    python scripts/bench_captures.py [SETTING ...] [--repeats 5] [--steps N]

disk: what writing a plain file of as many bytes as the run's store holds takes, in training times; done right after.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from settings import SETTINGS, folder_bytes, machine, ratio, train

import attrib

CAPTURES: dict[str, dict[str, Any]] = {
    "replay": {},
    "replay, every 16th state": {"states_every": 16},
    "factors": {"capture": "factors"},
    "gradients": {"capture": "gradients"},
}


def plain_write(folder: Path, size: int) -> float:
    """Seconds for a new file of so many bytes that do not compress."""
    block = np.random.default_rng(0).integers(0, 255, 64 << 20, dtype=np.uint8)
    start = time.perf_counter()
    with (folder / "plain").open("wb") as file:
        for left in range(size, 0, -len(block)):
            file.write(block[: min(left, len(block))])
    seconds = time.perf_counter() - start
    (folder / "plain").unlink()
    return seconds


def share_bytes(store: Path) -> int:
    """Bytes of the shares of one step in memory, not compressed."""
    run = attrib.open_run(store)
    prefix = {"factors": "factors/", "gradients": "gradients"}.get(run.capture)
    arrays = [run.reader.array(name) for name in run.reader.names() if prefix and name.startswith(prefix)]
    return sum(a.nbytes // max(1, a.shape[0]) for a in arrays)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("settings", nargs="*", default=["p113", "digits"], metavar="SETTING")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=12)
    options = parser.parse_args()
    print(machine())
    for name in options.settings:
        build = SETTINGS[name]
        train(build(3))
        print(f"\n{name}, {options.steps} steps: {build.__doc__}")
        for capture, asked in CAPTURES.items():
            plain, recorded, disk, sizes = [], [], [], (0, 0)
            for _ in range(options.repeats):
                with tempfile.TemporaryDirectory() as folder:
                    store = Path(folder) / "run.zarr"
                    plain.append(train(build(options.steps)))
                    recorded.append(train(build(options.steps), store, **asked))
                    sizes = share_bytes(store), folder_bytes(store)
                    disk.append(plain_write(Path(folder), sizes[1]))
            written = statistics.median(disk) / statistics.median(plain)
            print(
                f"{capture:25s} {ratio(recorded, plain)} x training, disk {written:5.2f}"
                f"  shares {sizes[0] / 2**20:8.1f} MiB a step, store {sizes[1] / 2**20 / options.steps:8.2f} MiB a step"
            )


if __name__ == "__main__":
    main()
