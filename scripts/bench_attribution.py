"""What recording and attribution cost, next to the training they explain: the p = 113 setting of ExPLAIND.

4000 examples full batch, 89 024 parameters, AdamW, float32. Plain and recorded training alternate, step by step on the same
parameters' path, so that both see the same machine; figures are medians over steps, ratios to the median plain step.

    python scripts/bench_attribution.py [--steps 30] [--repeats 5] [--queries 1]
"""

import argparse
import os
import platform
import resource
import statistics
import tempfile
import time
from pathlib import Path

import torch

import attrib
from attrib.studies.modular import TRANSFORMER_GROUPS, PairTransformer, unordered_pairs
from attrib.studies.recipe import cross_entropy


def train(steps: int, store: str | None) -> list[float]:
    """Seconds of each step, recorded to `store` where one is given; the last entry is what closing took."""
    torch.manual_seed(43)
    data = unordered_pairs()
    model = PairTransformer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=4.0, betas=(0.9, 0.98))
    recorder = attrib.record(optimizer, model, cross_entropy, store, overwrite=True) if store else optimizer
    x, y = data.x[data.train], data.y[data.train]
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        recorder.zero_grad()
        cross_entropy(model, x, y).mean().backward()
        if store:
            recorder.step(data.train, x, y)
        else:
            recorder.step()
        seconds.append(time.perf_counter() - start)
    start = time.perf_counter()
    if store:
        recorder.close()
    return [*seconds, time.perf_counter() - start]


def attribute(store: str, queries: int) -> float:
    data = unordered_pairs()
    held_out = data.test[:queries]
    run, model = attrib.open_run(store), PairTransformer()
    measurement = attrib.measure.log_prob(data.x[held_out], data.y[held_out])
    start = time.perf_counter()
    result = attrib.attribute(run, model, measurement, loss=cross_entropy, groups=TRANSFORMER_GROUPS, progress=False)
    seconds = time.perf_counter() - start
    result.check(1e-5)
    return seconds


def peak() -> float:
    """Peak memory of this process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--queries", type=int, default=1)
    options = parser.parse_args()
    plain, recorded, attributed = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "run.zarr")
        train(3, None)
        memory = {"training": peak()}
        for _ in range(options.repeats):
            plain.append(sum(train(options.steps, None)))
            recorded.append(sum(train(options.steps, store)))
            memory.setdefault("recording", peak())
            attributed.append(attribute(store, options.queries))
        memory["attribution"] = peak()
        size = sum(f.stat().st_size for f in Path(store).rglob("*") if f.is_file())
    base = statistics.median(plain)
    print(f"{os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"p=113, 4000 examples, {options.steps} steps, {options.queries} queries, median of {options.repeats}")
    for name, values in (("training", plain), ("recording", recorded), ("attribution", attributed)):
        median = statistics.median(values)
        spread = f"{min(values):.2f}-{max(values):.2f}"
        ratio = statistics.median(v / b for v, b in zip(values, plain, strict=True))
        print(f"{name:12s} {median:8.2f} s  ({spread} s)  {ratio:6.2f} x training  peak {memory[name]:7.0f} MiB")
    print(
        f"attribution per query {statistics.median(attributed) / options.queries / base:.2f} x training; ",
        end="",
    )
    print(f"store {size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
