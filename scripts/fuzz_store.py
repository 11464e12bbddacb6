"""Try to prove the store wrong: damage its files, kill who writes them, cut the power; see `fuzz/` for how.

    python scripts/fuzz_store.py [--runs 3000] [--results 1500] [--metadata 800] [--kills 300] [--cuts 500] [--seed 0]

- runs, results: a file of a recorded run, or of a saved result, is changed: bits, lengths, names, metadata; a quarter of the
  changes exchange valid chunks. Then everything is read. What was changed must be named by an error, or read as before
- metadata: the same, of metadata files alone
- kills: a process is killed at a file operation, or in what it writes, or at any moment. What is left must be what its last
  commit said, and go on to the very run that nobody killed
- cuts: the power is lost at a file operation, and with it any part of what was not fsynced, on a model of a disk; what that
  cannot show is said in `fuzz/power.py`

Linux. Prints how often what came of what, then each fault; the status is 0 where there was none.
"""

import argparse
import os
import tempfile
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import reduce
from multiprocessing import get_context
from operator import add
from pathlib import Path

os.environ.setdefault("NUMBA_NUM_THREADS", "1")

from fuzz.damage import METADATA, RESULTS, RUNS
from fuzz.kills import KILLS, prepare
from fuzz.power import CUTS
from fuzz.tally import GOOD, Maker, Tally, campaign

PARTS: dict[str, tuple[Sequence[Maker], int]] = {
    "runs": (RUNS, 3000),
    "results": (RESULTS, 1500),
    "metadata": (METADATA, 800),
    "kills": (KILLS, 300),
    "cuts": (CUTS, 500),
}


def tried(makers: Sequence[Maker], count: int, seed: int, where: str | None = None) -> Tally:
    """So many trials, in a folder that is gone afterwards."""
    prepare()
    warnings.simplefilter("error")
    with tempfile.TemporaryDirectory(dir=where) as folder:
        return campaign(makers, count, seed, Path(folder))


def shared(makers: Sequence[Maker], count: int, seed: int, workers: int, where: str | None = None) -> Tally:
    """The same in processes that have no threads yet, so that they may be forked."""
    counts = [count // workers + (n < count % workers) for n in range(workers)]
    with ProcessPoolExecutor(workers, get_context("spawn"), max_tasks_per_child=1) as executor:
        futures = [
            executor.submit(tried, makers, some, seed + 1000 * n, where) for n, some in enumerate(counts) if some
        ]
        return reduce(add, (future.result() for future in futures), Tally())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for part, (_, count) in PARTS.items():
        parser.add_argument(f"--{part}", type=int, default=count, metavar="N", help=f"trials ({count})")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes (1)")
    parser.add_argument("--folder", help="to work in, on a fast disk; a temporary one")
    options = parser.parse_args()
    wrong = 0
    for part, (makers, _) in PARTS.items():
        began, count = time.monotonic(), getattr(options, part)
        tally = shared(makers, count, options.seed, options.workers, options.folder)
        print(f"{part}: {count} in {time.monotonic() - began:.0f} s\n{tally}\n", flush=True)
        wrong += sum(n for (_, verdict), n in tally.counts.items() if verdict not in GOOD)
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
