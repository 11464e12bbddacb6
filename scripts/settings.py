"""The training runs that the benchmarks are about, and how they are timed: ratios to plain training, side by side."""

import multiprocessing
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import attrib
from attrib.studies import digits, modular, text
from attrib.studies.recipe import cross_entropy


@dataclass
class Setting:
    """A model about to be trained. batches: (index, x, y) of each step; query: what is asked afterwards."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: Callable[[Any], Any] | None
    batches: list[tuple[Tensor, ...]]
    query: Any
    groups: dict[str, list[str]] | None = None

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())


def p113(steps: int = 100, examples: int = 4000) -> Setting:
    """ExPLAIND's setting: a one-layer transformer on sums modulo 113, 4000 examples full batch, 89 024 parameters."""
    torch.manual_seed(43)
    data, model = modular.unordered_pairs(train=examples), modular.PairTransformer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=4.0, betas=(0.9, 0.98))
    batch = data.train, data.x[data.train], data.y[data.train]
    query = attrib.measure.log_prob(data.x[data.test[:1]], data.y[data.test[:1]])
    return Setting(model, optimizer, None, [batch] * steps, query, modular.TRANSFORMER_GROUPS)


def p113_all(steps: int = 100, examples: int = 4000) -> Setting:
    """The same, and the log-probabilities of all 115 answers at once."""
    setting = p113(steps, examples)
    x = setting.query.batch[0]
    setting.query = lambda model: torch.log_softmax(model(x)[0], -1)
    return setting


def p31(steps: int = 1520) -> Setting:
    """The demo's run: a ReLU MLP on half of the sums modulo 31, 480 examples full batch, 13 152 parameters."""
    torch.manual_seed(0)
    data, model = modular.ordered_pairs(31, 0.5, 0), modular.PairMlp(31)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=1.0, betas=(0.9, 0.98))
    batch = data.train, data.x[data.train], data.y[data.train]
    return Setting(
        model, optimizer, None, [batch] * steps, attrib.measure.log_prob(data.x[data.test[:1]], data.y[data.test[:1]])
    )


def digits_cnn(steps: int = 176) -> Setting:
    """A ReLU network with convolutions on 8 x 8 digits, batches of 64, SGD with momentum, 9 946 parameters."""
    torch.manual_seed(0)
    data, model = digits.load(), digits.DigitsCnn()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    epochs = -(-steps // 22)
    index = [b for _ in range(epochs) for b in data.train[torch.randperm(len(data.train))].split(64)][:steps]
    return Setting(
        model,
        optimizer,
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=len(index) + 1),
        [(i, data.x[i], data.y[i]) for i in index],
        attrib.measure.log_prob(data.x[data.test[:1]], data.y[data.test[:1]]),
    )


def gpt(steps: int = 100) -> Setting:
    """A GPT (five layers, width 128) on standard-library text, 32 passages of 64 characters, AdamW, 1.0M parameters."""
    torch.manual_seed(0)
    data = text.load()
    model = text.Gpt(len(data.alphabet), data.length, width=128, layers=5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1, betas=(0.9, 0.95))
    count = len(data) * 9 // 10
    index = [torch.randint(0, count, (32,)) for _ in range(steps)]
    return Setting(
        model,
        optimizer,
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, steps),
        [(i, *data.passages(i)) for i in index],
        attrib.measure.log_prob(*data.passages(torch.tensor([count + 7]))),
    )


def gpt_8(steps: int = 100) -> Setting:
    """The same, and the log-probabilities of eight passages."""
    setting, data = gpt(steps), text.load()
    first = len(data) * 9 // 10 + 7
    setting.query = attrib.measure.log_prob(*data.passages(torch.arange(first, first + 8)))
    return setting


SETTINGS: dict[str, Callable[..., Setting]] = {
    "p113": p113,
    "p113_all": p113_all,
    "p31": p31,
    "digits": digits_cnn,
    "gpt": gpt,
    "gpt_8": gpt_8,
}


def train(setting: Setting, store: Any = None, **options: Any) -> float:
    """Seconds of the loop, closing of the recorder included; recorded to `store` where one is given."""
    start = time.perf_counter()
    optimizer: Any = setting.optimizer
    if store is not None:
        optimizer = attrib.record(optimizer, setting.model, cross_entropy, store, overwrite=True, **options)
    schedule = setting.schedule(optimizer) if setting.schedule else None
    for index, *batch in setting.batches:
        optimizer.zero_grad()
        cross_entropy(setting.model, *batch).mean().backward()
        optimizer.step(*((index, *batch) if store is not None else ()))
        if schedule:
            schedule.step()
    if store is not None:
        optimizer.close()
    return time.perf_counter() - start


def attribute(setting: Setting, store: Any, **options: Any) -> float:
    """Seconds of attributing the setting's query, to every step, example and group."""
    run = attrib.open_run(store)
    run.load(setting.model, run.steps)
    start = time.perf_counter()
    result = attrib.attribute(
        run, setting.model, setting.query, loss=cross_entropy, groups=setting.groups, progress=False, **options
    )
    seconds = time.perf_counter() - start
    result.check(1e-5)
    return seconds


def peak_memory(work: Callable[..., Any], *arguments: Any) -> float:
    """MiB at most that a fresh process holds while it does `work(*arguments)`, Python, torch and the model included."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        pool.submit(work, *arguments).result()
        return peak_of(pool)


def peak_of(pool: ProcessPoolExecutor) -> float:
    """MiB at most that the process of a pool held."""
    return pool.submit(_peak).result()


def _peak() -> float:
    status = Path("/proc/self/status")  # ru_maxrss would begin with the parent's
    if status.exists():
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def machine() -> str:
    info = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in info if "model name" in line), platform.machine())
    return f"{os.cpu_count()} cores, {model}, torch {torch.__version__}, {torch.get_num_threads()} threads"


def ratio(values: list[float], base: list[float]) -> str:
    """Median of the ratios of pairs measured back to back, and their range."""
    ratios = sorted(v / b for v, b in zip(values, base, strict=True))
    return f"{statistics.median(ratios):5.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f})"


def folder_bytes(folder: Path) -> int:
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
