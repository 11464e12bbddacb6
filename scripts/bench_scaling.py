"""Cost against work: examples N, parameters P, steps T and queries Q of an attribution, doubled one at a time.

A two-layer network on random data, full batch. Time is the ratio to the run before doubling, memory the peak of a fresh
process.

    python scripts/bench_scaling.py [--repeats 5]
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from settings import machine, peak_memory
from torch import nn

import attrib
from attrib.studies.recipe import cross_entropy, train_recorded

BASE = {"N": 2000, "P": 256, "T": 40, "Q": 4}


def network(hidden: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, 256), nn.ReLU(), nn.Linear(256, 10))


def record(work: dict[str, int], store: Path) -> None:
    model = network(work["P"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    x, y = torch.randn(work["N"], 64), torch.randint(0, 10, (work["N"],))
    batches = ((torch.arange(work["N"]), x, y) for _ in range(work["T"]))
    train_recorded(model, optimizer, cross_entropy, batches, store)


def attribute(work: dict[str, int], store: Path) -> float:
    torch.manual_seed(1)
    x, y = torch.randn(work["Q"], 64), torch.randint(0, 10, (work["Q"],))
    run, model = attrib.open_run(store), network(work["P"])
    run.load(model, run.steps)
    start = time.perf_counter()
    result = attrib.attribute(
        run, model, attrib.measure.log_prob(x, y), loss=cross_entropy, keep=["example"], progress=False
    )
    seconds = time.perf_counter() - start
    result.check(1e-5)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    print(machine())
    print(
        f"N = {BASE['N']} examples, T = {BASE['T']} steps, Q = {BASE['Q']} queries, P = parameters at width {BASE['P']}"
    )
    cases = {"base": BASE, **{f"{name} doubled": {**BASE, name: 2 * value} for name, value in BASE.items()}}
    with tempfile.TemporaryDirectory() as folder:
        stores = {name: Path(folder) / name.replace(" ", "-") for name in cases}
        for name, work in cases.items():
            record(work, stores[name])
        seconds: dict[str, list[float]] = {name: [] for name in cases}
        for name, work in cases.items():
            attribute(work, stores[name])
        for _ in range(repeats):
            for name, work in cases.items():
                seconds[name].append(attribute(work, stores[name]))
        for name, work in cases.items():
            size = sum(p.numel() for p in network(work["P"]).parameters())
            print(
                f"{name:10s} P = {size:7d}: {statistics.median(seconds[name]):6.2f} s, "
                f"{statistics.median(a / b for a, b in zip(seconds[name], seconds['base'], strict=True)):5.2f} x,"
                f" peak {peak_memory(attribute, work, stores[name]):6.0f} MiB"
            )


if __name__ == "__main__":
    main()
