"""The contraction of gradients with the sensitivities of many queries, against plainer ways.

Stored float32 gradients with float64 sensitivities, against torch in float64; and the gradients of a linear layer, at one
position of each example, with sensitivities of some rank in every row, as a sum over pairs against all products.

python scripts/bench_kernels.py [--repeats 9]
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from attrib.kernels.contraction import contract_rows
from attrib.kernels.factors import Outer
from settings import machine, ratio

ROWS, ENTRIES = 1000, 89_024
EXAMPLES, OUTPUTS, INPUTS, QUERIES = 4000, 512, 64, 115  # the largest layer at p = 113


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    found = work()
    return time.perf_counter() - start, found


def stored(queries: int, repeats: int) -> None:
    random = np.random.default_rng(0)
    rows = random.standard_normal((ROWS, ENTRIES), dtype=np.float32)
    sensitivity = random.standard_normal((queries, ENTRIES))
    theirs, ours = [], []
    for _ in range(repeats + 1):
        seconds, want = timed(lambda: (torch.from_numpy(sensitivity) @ torch.from_numpy(rows).double().T).numpy())
        theirs.append(seconds)
        seconds, got = timed(lambda: contract_rows(sensitivity, rows, np.array([0, ENTRIES]))[..., 0])
        ours.append(seconds)
    gap = np.abs(got - want).max() / np.abs(want).max()
    print(
        f"{queries:4d} queries, {ROWS} x {ENTRIES} rows: torch in float64 takes {ratio(theirs[1:], ours[1:])} times as "
        f"long; largest difference {gap:.1e}"
    )


def in_pairs(rank: int, repeats: int) -> None:
    random = torch.Generator().manual_seed(0)
    factor = Outer(*(torch.randn(EXAMPLES, 1, n, generator=random) for n in (OUTPUTS, INPUTS)))
    over = torch.randn(OUTPUTS, QUERIES, rank, generator=random, dtype=torch.float64)
    along = torch.randn(OUTPUTS, rank, INPUTS, generator=random, dtype=torch.float64)
    directions = (over @ along).transpose(0, 1).contiguous()
    plain, ours = [], []
    for _ in range(repeats + 1):
        seconds, want = timed(lambda: factor.contract(directions.float()))
        plain.append(seconds)
        seconds, got = timed(lambda: factor.contract(factor.low_rank(directions, 1) or directions.float()))
        ours.append(seconds)
    gap = float((got - want).abs().max() / want.abs().max())
    how = "in pairs" if factor.low_rank(directions, 1) is not None else "as they are"
    print(
        f"{QUERIES:4d} queries of rank {rank:2d} a row, {EXAMPLES} x {OUTPUTS} x {INPUTS}, multiplied {how}: all products "
        f"take {ratio(plain[1:], ours[1:])} times as long; largest difference {gap:.1e}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=9)
    repeats = parser.parse_args().repeats
    print(machine())
    for queries in (1, 8, 115):
        stored(queries, repeats)
    for rank in (1, 4, 8, 16, 24, 48):
        in_pairs(rank, repeats)


if __name__ == "__main__":
    main()
