"""What products of the Hessian with directions cost, in plain passes there and back over the same batch.

    python scripts/bench_curvature.py [setting] [slices in MiB]

Seconds of the processor in one thread, pairs measured back to back: the median of their ratios, and the range. By count of
matrix products a pass is three, and each direction takes six more: 3 x for one, 17 x for eight. What is above the memory of
a pass is that of a process of its own, at its highest.
"""

import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from settings import SETTINGS, Setting, cross_entropy, machine, peak_memory, ratio
from torch import Tensor, nn

from attrib.curvature import KINDS, Curvature
from attrib.functional import Functional
from attrib.layout import Layout

QUERIES, WARM = (1, 8), 5  # calls before what is called often is taped


class Mlp(nn.Module):
    """8 x 8 digits, one hidden layer of 64."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.output = nn.Linear(64, 64), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(F.gelu(self.hidden(x.flatten(1))))


def setting(name: str) -> Setting:
    made = SETTINGS["digits" if name == "mlp" else name](steps=2)
    made.model = Mlp() if name == "mlp" else made.model
    return made


def work(name: str, queries: int, kind: str, slices: int | None) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """A plain pass, and the products; of no queries the pass twice."""
    here = setting(name)
    _, *batch = here.batches[0]
    named = dict(here.model.named_parameters())
    layout = Layout(tuple(named), tuple(tuple(p.shape) for p in named.values()))
    curvature = Curvature(Functional(here.model, cross_entropy, layout, torch.float32), slices, kind)
    theta, size = layout.flatten(named.values()), len(batch[0])
    weights, along = torch.full((size,), 1 / size), torch.randn(max(1, queries), layout.size)

    def passed() -> None:
        here.model.zero_grad()
        cross_entropy(here.model, *batch).mean().backward()

    return passed, (lambda: curvature.products(theta, batch, weights, along)) if queries else passed


def seconds(function: Callable[[], Any]) -> float:
    began = time.process_time()
    function()
    return time.process_time() - began


def several(name: str, queries: int, kind: str, slices: int | None) -> None:
    _, products = work(name, queries, kind, slices)
    for _ in range(WARM):
        products()


def main(names: list[str], slices: int | None) -> None:
    torch.set_num_threads(1)
    print(machine())
    for name in names:
        passed, _ = work(name, 0, "exact", None)
        times = 5 if name == "gpt" else 21
        once = sorted(seconds(passed) for _ in range(times))[times // 2]
        base = peak_memory(several, name, 0, "exact", slices)
        print(f"{name}: a pass {1e3 * once:.1f} ms")
        for kind in KINDS:
            for queries in QUERIES:
                passed, products = work(name, queries, kind, slices)
                for _ in range(WARM):
                    products()
                pairs = [(seconds(products), seconds(passed)) for _ in range(times)]
                cost = ratio(*map(list, zip(*pairs, strict=True)))
                more = peak_memory(several, name, queries, kind, slices) - base
                print(f"  {kind.ljust(14)} Q = {queries}: {cost} passes, {more:.0f} MiB more than a pass", flush=True)


if __name__ == "__main__":
    chosen = sys.argv[1:2] or ["mlp", "digits", "gpt"]
    main(chosen, int(sys.argv[2]) << 20 if len(sys.argv) > 2 else None)
