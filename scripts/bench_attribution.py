"""What recording and attribution cost, as ratios to the plain training that they explain, and the memory they need.

Each repetition trains plainly, trains recorded for replay, and attributes one question to every step, example and group;
ratios are taken within a repetition. Peak memory is that of a process that does nothing else.

    python scripts/bench_attribution.py [SETTING ...] [--repeats 5] [--steps N]
"""

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

from settings import SETTINGS, attribute, folder_bytes, machine, peak_memory, ratio, train

WORK = ("training", "recording", "attribution")


def do(work: str, name: str, steps: dict[str, int], store: Path) -> float:
    setting = SETTINGS[name](**steps)
    if work == "attribution":
        return attribute(setting, store)
    return train(setting, store if work == "recording" else None)


def measure(name: str, steps: dict[str, int], repeats: int, store: Path) -> None:
    do("training", name, {"steps": 3}, store)
    seconds: dict[str, list[float]] = {work: [] for work in WORK}
    for _ in range(repeats):
        for work in WORK:
            seconds[work].append(do(work, name, steps, store))
    setting: Any = SETTINGS[name](**steps)
    print(f"\n{name}: {SETTINGS[name].__doc__}")
    print(f"{len(setting.batches)} steps, {setting.parameters} parameters, store {folder_bytes(store) / 2**20:.1f} MiB")
    for work, values in seconds.items():
        print(
            f"{work:12s} {statistics.median(values):8.2f} s  {ratio(values, seconds['training'])} x training"
            f"  peak {peak_memory(do, work, name, steps, store):6.0f} MiB"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("settings", nargs="*", default=list(SETTINGS), metavar="SETTING", help=", ".join(SETTINGS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int)
    options = parser.parse_args()
    print(machine())
    for name in options.settings:
        with tempfile.TemporaryDirectory() as folder:
            steps = {"steps": options.steps} if options.steps else {}
            measure(name, steps, options.repeats, Path(folder) / "run.zarr")


if __name__ == "__main__":
    main()
