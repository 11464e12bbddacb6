"""Cost against work: examples N, parameters P, steps T, queries Q, layers L, tensors K, doubled one at a time.

A perceptron of L blocks on random data, full batch. P is doubled by width; L doubles it, too; K linear layers side by side
make one of the same parameters. Time is the ratio to the run before doubling, memory the peak of a fresh process.

    python scripts/bench_scaling.py [--repeats 5]
"""

import argparse
import itertools
import statistics
import tempfile
import time
from pathlib import Path

import torch
from settings import machine, peak_memory
from torch import Tensor, nn

import attrib
from attrib.studies.recipe import cross_entropy, train_recorded

BASE = {"N": 2000, "P": 128, "T": 40, "Q": 4, "L": 1, "K": 1}  # P: the width
INPUTS = 256


class Beside(nn.ModuleList):
    """Linear layers of the same inputs, their outputs one after the other."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([layer(x) for layer in self], -1)


def network(work: dict[str, int]) -> nn.Module:
    torch.manual_seed(0)
    widths, count = [INPUTS, *[work["P"], INPUTS] * work["L"]], work["K"]
    layers = [Beside(nn.Linear(a, b // count) for _ in range(count)) for a, b in itertools.pairwise(widths)]
    return nn.Sequential(*(part for layer in layers for part in (layer, nn.ReLU())), nn.Linear(INPUTS, 10))


def record(work: dict[str, int], store: Path) -> None:
    model = network(work)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    x, y = torch.randn(work["N"], INPUTS), torch.randint(0, 10, (work["N"],))
    batches = ((torch.arange(work["N"]), x, y) for _ in range(work["T"]))
    train_recorded(model, optimizer, cross_entropy, batches, store)


def attribute(work: dict[str, int], store: Path) -> float:
    torch.manual_seed(1)
    x, y = torch.randn(work["Q"], INPUTS), torch.randint(0, 10, (work["Q"],))
    run, model = attrib.open_run(store), network(work)
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
    print(", ".join(f"{name} = {value}" for name, value in BASE.items()))
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
            size = sum(p.numel() for p in network(work).parameters())
            print(
                f"{name:10s} P = {size:7d}: {statistics.median(seconds[name]):6.2f} s, "
                f"{statistics.median(a / b for a, b in zip(seconds[name], seconds['base'], strict=True)):5.2f} x,"
                f" peak {peak_memory(attribute, work, stores[name]):6.0f} MiB"
            )


if __name__ == "__main__":
    main()
