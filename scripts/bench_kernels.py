"""The contraction of stored float32 gradients with float64 sensitivities, against torch in float64.

python scripts/bench_kernels.py [--repeats 9]
"""

import argparse
import time

import numpy as np
import torch
from attrib.kernels.contraction import contract_rows
from settings import machine, ratio

ROWS, ENTRIES = 1000, 89_024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=9)
    repeats = parser.parse_args().repeats
    print(machine())
    random = np.random.default_rng(0)
    rows = random.standard_normal((ROWS, ENTRIES), dtype=np.float32)
    for queries in (1, 8, 115):
        sensitivity = random.standard_normal((queries, ENTRIES))
        theirs, ours = [], []
        for _ in range(repeats + 1):
            start = time.perf_counter()
            want = (torch.from_numpy(sensitivity) @ torch.from_numpy(rows).double().T).numpy()
            theirs.append(time.perf_counter() - start)
            start = time.perf_counter()
            got = contract_rows(sensitivity, rows, np.array([0, ENTRIES]))[..., 0]
            ours.append(time.perf_counter() - start)
        gap = np.abs(got - want).max() / np.abs(want).max()
        print(
            f"{queries:4d} queries, {ROWS} x {ENTRIES} rows: torch in float64 takes {ratio(theirs[1:], ours[1:])} times as "
            f"long; largest difference {gap:.1e}"
        )


if __name__ == "__main__":
    main()
