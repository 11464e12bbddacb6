"""What influences and differences cost, as ratios to the training that they are about.

Each repetition trains plainly, and asks: one influence and eight, all identities on; the difference to a run without 1 % of
the examples, by cause and by reaction. Ratios are taken within a repetition.

    python scripts/bench_counterfactuals.py [SETTING ...] [--repeats 5] [--steps N]
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from settings import SETTINGS, machine, ratio, train

import attrib
from attrib.intervention import Drop
from attrib.studies.recipe import cross_entropy

NAMES = ("gpt", "digits", "p113")
WORK = ("training", "influence", "8 influences", "difference", "reaction")


def asked(setting: Any, run: attrib.Run, work: str, changed: attrib.Run) -> float:
    """Seconds of one question."""
    start = time.perf_counter()
    if "influence" in work:
        measurement = setting.query.select([0] * 8) if work == "8 influences" else setting.query
        attrib.influence(run, setting.model, measurement, loss=cross_entropy, keep=("example",), progress=False)
    else:
        via = "reaction" if work == "reaction" else "cause"
        attrib.difference(
            run, changed, setting.model, setting.query, loss=cross_entropy, via=via, keep=("example",), progress=False
        )
    return time.perf_counter() - start


def measure(name: str, steps: dict[str, int], repeats: int, folder: Path) -> None:
    setting = SETTINGS[name](**steps)
    train(setting, folder / "run.zarr")
    run = attrib.open_run(folder / "run.zarr")
    dropped = run.examples[::100].tolist()
    model = SETTINGS[name](**steps).model
    changed = attrib.replay(
        run, 0, Drop(dropped), model=model, loss=cross_entropy, store=folder / "changed.zarr", progress=False
    )
    seconds: dict[str, list[float]] = {work: [] for work in WORK}
    for repeat in range(repeats + 1):
        for work in WORK:
            again = SETTINGS[name](**steps)
            took = train(again, None) if work == "training" else asked(setting, run, work, changed)
            if repeat:  # the first one warms up
                seconds[work].append(took)
    print(f"\n{name}: {SETTINGS[name].__doc__}")
    print(f"{run.steps} steps, {setting.parameters} parameters, {len(dropped)} of {len(run.examples)} examples dropped")
    for work, values in seconds.items():
        print(f"{work:14s} {statistics.median(values):8.2f} s  {ratio(values, seconds['training'])} x training")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("settings", nargs="*", default=list(NAMES), metavar="SETTING", help=", ".join(NAMES))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int)
    options = parser.parse_args()
    print(machine())
    for name in options.settings:
        with tempfile.TemporaryDirectory() as folder:
            steps = {"steps": options.steps} if options.steps else {}
            measure(name, steps, options.repeats, Path(folder))


if __name__ == "__main__":
    main()
