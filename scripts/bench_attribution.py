"""What recording and attribution cost, as ratios to the plain training that they explain.

Each repetition trains plainly, trains recorded for replay, and attributes one question to every step, example and group;
ratios are taken within a repetition.

    python scripts/bench_attribution.py [SETTING ...] [--repeats 5] [--steps N]
"""

import argparse
import statistics
import tempfile
from pathlib import Path

from settings import SETTINGS, attribute, folder_bytes, machine, peak_memory, ratio, train


def measure(name: str, steps: dict[str, int], repeats: int, store: Path) -> None:
    build = SETTINGS[name]
    seconds: dict[str, list[float]] = {"training": [], "recording": [], "attribution": []}
    memory: dict[str, float] = {}
    train(build(3))
    for _ in range(repeats):
        setting = build(**steps)
        for work in seconds:
            with peak_memory() as peak:
                if work == "attribution":
                    seconds[work].append(attribute(setting, store))
                else:
                    seconds[work].append(train(build(**steps), store if work == "recording" else None))
                memory[work] = peak()
    print(f"\n{name}: {build.__doc__}")
    print(f"{len(setting.batches)} steps, {setting.parameters} parameters, store {folder_bytes(store) / 2**20:.1f} MiB")
    for work, values in seconds.items():
        print(
            f"{work:12s} {statistics.median(values):8.2f} s  {ratio(values, seconds['training'])} x training"
            f"  peak {memory[work]:6.0f} MiB"
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
