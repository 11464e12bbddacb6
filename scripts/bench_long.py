"""Whether a step costs more the longer a run is: CPU time late in a run over that early in it.

    python scripts/bench_long.py [--steps N] [--examples N]

Two runs of a tiny model: the same 512 examples again and again, 8 a step; and a stream of examples that each come once, 500
a step.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from settings import machine
from torch import Tensor, nn

import attrib
from attrib.studies.recipe import cross_entropy

PARTS = 10  # of a run; the first warms up
Batch = tuple[Tensor, Tensor, Tensor]


def again(steps: int) -> Iterator[Batch]:
    x = torch.randn(512, 4)
    y = x.argmax(1) % 2
    for _ in range(steps):
        index = torch.randint(0, len(x), (8,))
        yield index, x[index], y[index]


def once(examples: int) -> Iterator[Batch]:
    for start in range(0, examples, 500):
        x = torch.randn(500, 4)
        yield torch.arange(start, start + 500), x, x.argmax(1) % 2


def seconds(work: Callable[[], Any]) -> float:
    """Of all threads, on a processor."""
    start = time.process_time()
    work()
    return time.process_time() - start


def record(model: nn.Module, batches: Iterator[Batch], steps: int, store: Path) -> list[float]:
    """Seconds a step in each part of the run."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-2)
    length = steps // PARTS
    with attrib.record(optimizer, model, cross_entropy, store) as recorder:

        def train() -> None:
            for _ in range(length):
                index, x, y = next(batches)
                recorder.zero_grad()
                cross_entropy(model, x, y).mean().backward()
                recorder.step(index, x, y)

        return [seconds(train) / length for _ in range(PARTS)]


def show(what: str, early: float, late: float) -> None:
    print(f"{what:36s} {late / early:5.2f}    {early * 1e3:8.3f} ms, then {late * 1e3:8.3f} ms")


def bench(batches: Iterator[Batch], steps: int, store: Path) -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    parts = record(model, batches, steps, store)
    show("recording a step, late over early", parts[1], parts[-1])
    run, query = attrib.open_run(store), attrib.measure.log_prob(torch.ones(1, 4), torch.zeros(1, dtype=torch.long))

    def attribute(stop: int) -> None:
        result = attrib.attribute(run, model, query, loss=cross_entropy, steps=slice(0, stop), progress=False)
        result.check(1e-4)

    few = run.steps // PARTS
    starting = seconds(lambda: attribute(1))  # reading the inputs and tracing, which comes once
    starting = min(starting, seconds(lambda: attribute(1)))
    short, whole = (seconds(lambda stop=stop: attribute(stop)) - starting for stop in (few, run.steps))
    show("attributing a step, run over a tenth", short / few, whole / run.steps)
    print(f"{'verifying a step':36s} {seconds(lambda: attrib.verify(run, progress=False)) / run.steps * 1e3:8.3f} ms")
    print(f"{'the index of a step, in order':36s} {seconds(lambda: [*map(run.index, range(few))]) / few * 1e3:8.3f} ms")
    print(f"{'print(run)':36s} {seconds(lambda: str(attrib.open_run(store))):8.3f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--examples", type=int, default=1_500_000)
    options = parser.parse_args()
    print(machine())
    torch.set_num_threads(1)
    for name, batches, steps in (
        (f"512 examples, {options.steps} steps", again(options.steps), options.steps),
        (f"{options.examples} examples once", once(options.examples), options.examples // 500),
    ):
        print(f"\n{name}")
        with tempfile.TemporaryDirectory() as folder:
            bench(batches, steps, Path(folder) / "run.zarr")


if __name__ == "__main__":
    main()
