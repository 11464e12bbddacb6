"""What the shares of a batch cost by either definition where its losses depend on each other, in passes there and back.

    python scripts/bench_shares.py [layers] [queries]

A network of layers of width 64, each with batch norm on the batch's own statistics: four tensors a layer.
"""

import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attrib.batch import Batch
from attrib.gradients import DEFINITIONS
from attrib.layout import Layout

BATCH, WIDTH, TIMES = 128, 64, 7


def network(layers: int) -> nn.Module:
    torch.manual_seed(0)
    parts: list[nn.Module] = []
    for _ in range(layers):
        parts += [nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH, track_running_stats=False), nn.ReLU()]
    return nn.Sequential(*parts)


def losses(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y, reduction="none")


def seconds(function: Callable[[], Any]) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def main(layers: int = 15, queries: int = 1) -> None:
    model = network(layers)
    named = dict(model.named_parameters())
    layout = Layout(tuple(named), tuple(tuple(p.shape) for p in named.values()))
    theta = layout.flatten(named.values()).detach()
    x, y = torch.randn(BATCH, WIDTH), torch.randint(0, WIDTH, (BATCH,))
    along, batch = torch.randn(queries, layout.size), Batch.of((x, y))

    def passed() -> None:
        torch.autograd.grad(losses(model, x, y).sum(), list(model.parameters()))

    cases: dict[str, Callable[[], Any]] = {"there and back": passed}
    for shares, kind in DEFINITIONS.items():
        gradients: Any = kind(losses, model, layout, torch.float32)
        for groups in (1, len(named)):
            member = [k % groups for k in range(len(named))]
            cases[f"by {shares}, groups: {groups}"] = lambda g=gradients, m=member: g.contract(theta, batch, along, m)
    first = {name: seconds(case) for name, case in cases.items()}
    for _ in range(4):  # what is called often is traced
        for case in cases.values():
            case()
    taken = {name: [seconds(case) for _ in range(TIMES)] for name, case in cases.items()}
    once = float(np.median(taken["there and back"]))
    print(f"{len(named)} tensors, {BATCH} examples, {queries} queries; there and back {1e3 * once:.1f} ms")
    for name, times in taken.items():
        print(f"{name.ljust(28)}{np.median(times) / once:8.1f} passes, the first time {first[name] / once:8.1f}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
