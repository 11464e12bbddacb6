"""What attribution of one query costs a small model: the first time in a process, again, and a step of it.

CPU seconds, torch on one thread, the least of several. First: in a process that has only imported attrib and made the model.
Steady: a step of the run, by the difference between all steps and the second half of them; what is left of "again" is
start-up, tracing for the most part. Ratios are to plain training in the same process.

    python scripts/bench_startup.py [SETTING ...] [--repeats 5] [--steps N]
"""

import argparse
import multiprocessing
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from settings import SETTINGS, attribute, machine, train


def cpu(work: Any, *arguments: Any, **options: Any) -> float:
    start = time.process_time()
    work(*arguments, **options)
    return time.process_time() - start


def first(name: str, steps: dict[str, int], store: Path) -> float:
    torch.set_num_threads(1)
    return cpu(attribute, SETTINGS[name](**steps), store)


def fresh(*arguments: Any) -> float:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(first, *arguments).result()


def measure(name: str, steps: dict[str, int], repeats: int, store: Path) -> str:
    make = SETTINGS[name]
    train(make(**steps), store)
    setting = make(**steps)
    count = len(setting.batches)
    half = slice(count // 2, count)
    attribute(setting, store)
    started = min(fresh(name, steps, store) for _ in range(max(2, repeats // 2)))
    rounds = [
        (cpu(train, make(**steps)), cpu(attribute, setting, store), cpu(attribute, setting, store, steps=half))
        for _ in range(repeats)
    ]
    plain, again, late = (min(values) for values in zip(*rounds, strict=True))
    step = (again - late) / (count - len(range(*half.indices(count))))
    columns = [
        f"{name}, {count} steps",
        f"{plain:.2f} s",
        f"{started:.2f} s; {started / plain:.2f}",
        f"{again:.2f} s; {again / plain:.2f}",
        f"{1e3 * step:.2f} ms; {step * count / plain:.2f}",
        f"{again - step * count:.2f} s",
    ]
    return f"| {' | '.join(columns)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("settings", nargs="*", default=["digits", "p31"], metavar="SETTING", help=", ".join(SETTINGS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(machine())
    print("| setting | training | first; ratio | again; ratio | a step; ratio | start-up |")
    for name in options.settings:
        with tempfile.TemporaryDirectory() as folder:
            steps = {"steps": options.steps} if options.steps else {}
            print(measure(name, steps, options.repeats, Path(folder) / "run.zarr"), flush=True)


if __name__ == "__main__":
    main()
