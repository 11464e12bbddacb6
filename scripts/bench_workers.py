"""What workers save: attributing one question by one process of one thread, and by several processes of one thread each.

Each repetition asks one process and then a process pool, or (with --dask) a cluster of Dask on this machine; ratios are
taken within a repetition. Workers are started before, and have answered once; `started` is the first call, which starts
them.

    python scripts/bench_workers.py [SETTING ...] [--workers 2] [--repeats 3] [--steps N] [--dask]
"""

import argparse
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from settings import SETTINGS, Setting, machine, ratio, train

import attrib
from attrib.studies.recipe import cross_entropy

# Dask's workers give back memory as soon as it is free, and every step pays for fresh pages: near half their speed
KEEP_MEMORY = {"OMP_NUM_THREADS": 1, "MALLOC_TRIM_THRESHOLD_": 1 << 30, "MALLOC_MMAP_THRESHOLD_": 1 << 30}


@contextmanager
def pool(workers: int) -> Iterator[Executor]:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, torch.set_num_threads, (1,)) as executor:
        yield executor


@contextmanager
def cluster(workers: int) -> Iterator[Executor]:
    import dask.config
    from distributed import Client, LocalCluster

    with (
        dask.config.set({"distributed.nanny.pre-spawn-environ": KEEP_MEMORY}),
        LocalCluster(workers, threads_per_worker=1, dashboard_address=None) as local,
        Client(local) as client,
        client.get_executor() as executor,
    ):
        client.run(torch.set_num_threads, 1)
        yield executor


def ask(setting: Setting, store: Path, executor: Executor | None) -> tuple[float, attrib.Result]:
    run = attrib.open_run(store)
    run.load(setting.model, run.steps)
    start = time.perf_counter()
    options: dict[str, Any] = {"loss": cross_entropy, "groups": setting.groups, "progress": False}
    result = attrib.attribute(run, setting.model, setting.query, executor=executor, **options)
    return time.perf_counter() - start, result


def furthest(found: attrib.Result, serial: attrib.Result) -> float:
    """The largest difference of a contribution, decay, remainder or timeline over the largest."""
    names = [
        name for name in serial.dataset if str(name).startswith(("contribution", "decay", "remainder", "timeline"))
    ]
    pairs = [(found.dataset[name].values, serial.dataset[name].values) for name in names]
    return max(float(np.abs(a - b).max() / (np.abs(b).max() or 1.0)) for a, b in pairs)


def measure(name: str, options: argparse.Namespace, store: Path) -> None:
    setting: Setting = SETTINGS[name](**({"steps": options.steps} if options.steps else {}))
    train(setting, store)
    ask(setting, store, None)
    print(f"\n{name}: {len(setting.batches)} steps, {setting.parameters} parameters", flush=True)
    ways = {"processes": pool, "Dask": cluster} if options.dask else {"processes": pool}
    for way, opened in ways.items():
        alone, together = [], []
        with opened(options.workers) as executor:
            started = ask(setting, store, executor)[0]
            for _ in range(options.repeats):
                took, serial = ask(setting, store, None)
                alone.append(took)
                took, found = ask(setting, store, executor)
                together.append(took)
        print(
            f"one process {statistics.median(alone):7.2f} s  {options.workers} {way} {statistics.median(together):7.2f} s, "
            f"{ratio(alone, together)} x as fast  started {started:.2f} s  furthest off {furthest(found, serial):.1e}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("settings", nargs="*", default=["gpt", "p113"], metavar="SETTING", help=", ".join(SETTINGS))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--dask", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(machine())
    for name in options.settings:
        with tempfile.TemporaryDirectory() as folder:
            measure(name, options, Path(folder) / "run.zarr")


if __name__ == "__main__":
    main()
