"""What storing a run costs: a recorded step beside a plain one, vectors beside a plain file, codecs beside none.

All in CPU seconds, torch on one thread, plain and recorded work in turn, so that other work on the machine slows both alike.

- steps: of a recorded step, in those of a plain one: the loop's thread, and all others (they write); and what the first
  steps, which are traced and checked, take beyond that. Of the loop the median of the steps after those, plain and recorded
  in turn, and the mean, which has the checks in it that are made now and then; by the clock too, with --threads of torch
- files: the states of a recorded run, written and read a block at a time, digests compared, beside `ndarray.tofile` and
  `np.fromfile`; each of the two without syncing, reading from the page cache
- codecs: bytes left, and megabytes a second to write and to read, in memory, of states and gradients as training leaves them

Vectors are recorded as they are. Measured (AMD EPYC, one thread, 8 states of the GPT of 1.0M parameters; shared machine):

    of the states       size     MB/s written, read      of the gradients    size     MB/s
    as it is            1.000    12972  14052                                1.000    10733  10253
    lz4 5, by bits      0.873     1865   3161                                0.888     1646   3071
    lz4 1, by bytes     0.942     1401   3864                                0.960     1534   4125
    zstd 1, side by side, by bits 0.768 474 607                              0.908      519   1027

A file takes 4000 to 7000 MB/s: the quickest compressor is three times as slow as the disk's cache and saves an eighth, where
training is what has to wait. A run that is finished is worth the slower one, `attrib.compact`, which leaves three quarters.
The digest is XXH3, 30 GB/s, and the checksum CRC32C, 12 GB/s.

python scripts/bench_trajectory.py [steps files codecs] [--settings gpt resnet] [--steps 24] [--repeats 5]
"""

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numcodecs
import numpy as np
import torch
import xxhash
import zarr
from bench_frameworks import resnet18
from settings import SETTINGS, Setting, folder_bytes, machine
from torch import Tensor, nn

import attrib
from attrib.store import chunks, vectors
from attrib.store.disk import Disk
from attrib.store.schema import create
from attrib.store.sealing import SealingStore
from attrib.studies.recipe import cross_entropy

SKIPPED = 4  # steps that are traced and checked
OPTIONS = {"every state": {}, "states_every=8": {"states_every": 8}}


class Pictures(nn.Module):
    """ResNet-18 of transformers, with BatchNorm, which returns logits."""

    def __init__(self) -> None:
        super().__init__()
        self.net = resnet18()

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(pixel_values=x).logits
        return logits


def resnet(steps: int, size: int = 32) -> Setting:
    """On images of 64 x 64, SGD with momentum, 11.2M parameters."""
    torch.manual_seed(0)
    model, x, y = Pictures(), torch.randn(256, 3, 64, 64), torch.randint(0, 4, (256,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    index = [torch.randperm(256)[:size] for _ in range(steps)]
    return Setting(model, optimizer, None, [(i, x[i], y[i]) for i in index], None)


ALL: dict[str, Callable[[int], Setting]] = {**SETTINGS, "resnet": resnet, "resnet64": partial(resnet, size=64)}


def stepping(setting: Setting, store: Path | None = None, **options: Any) -> Iterator[None]:
    """A step at every `next`, recorded where a store is given."""
    optimizer: Any = setting.optimizer
    if store is not None:
        optimizer = attrib.record(optimizer, setting.model, cross_entropy, store, **options)
    for index, *batch in setting.batches:
        optimizer.zero_grad()
        cross_entropy(setting.model, *batch).mean().backward()
        optimizer.step(*((index, *batch) if store is not None else ()))
        yield
    if store is not None:
        optimizer.close()


class Spent(NamedTuple):
    """CPU seconds of this thread, of all threads, and seconds."""

    here: float
    everywhere: float
    wall: float


def spent(work: Callable[[], Any]) -> Spent:
    before = time.thread_time(), time.process_time(), time.perf_counter()
    work()
    after = time.thread_time(), time.process_time(), time.perf_counter()
    return Spent(*(b - a for a, b in zip(before, after, strict=True)))


def bench_steps(name: str, steps: int, repeats: int) -> None:
    for label, options in OPTIONS.items():
        shares = {"shares": "rows"} if name.startswith("resnet") else {}
        with tempfile.TemporaryDirectory() as folder:
            plain = partial(next, stepping(ALL[name](steps)))
            recorded = partial(next, stepping(ALL[name](steps), Path(folder) / "run", **options, **shares), None)
            pairs = [(spent(plain), spent(recorded)) for _ in range(steps)]
            closing = spent(recorded)
            disk = folder_bytes(Path(folder)) / steps / 2**20
        first, steady = pairs[:SKIPPED], pairs[SKIPPED:]
        base, wall = (statistics.median(getattr(p, kind) for p, _ in steady) for kind in ("here", "wall"))
        loop, clock = (
            statistics.median(getattr(r, kind) / getattr(p, kind) for p, r in steady) for kind in ("here", "wall")
        )
        mean = sum(r.here for _, r in steady) / sum(p.here for p, _ in steady)
        others = sum(each.everywhere - each.here for _, each in steady) + closing.everywhere
        others -= sum(each.everywhere - each.here for each, _ in steady)
        writing = others / len(steady) / base
        print(
            f"{name:8s} {label:14s} plain step {1e3 * base:6.1f} ms; recorded {loop + writing:.2f} of it: {loop:.2f} (mean "
            f"{mean:.2f}) in the loop's thread, {writing:.2f} in others; by the clock {clock:.2f} of {1e3 * wall:.1f} ms; "
            f"start-up {sum(r.wall - p.wall for p, r in first):.2f} s; {disk:.1f} MiB a step",
            flush=True,
        )


def plainly(path: Path, blocks: Sequence[np.ndarray]) -> None:
    with path.open("wb") as file:
        for block in blocks:
            block.tofile(file)


def opened(path: Path, like: np.ndarray) -> tuple[SealingStore, zarr.Array]:
    store = SealingStore(Disk(path), "bench", growing=True)
    group = zarr.create_group(store, zarr_format=3)
    return store, create(group, "theta", (0, like.shape[1]), like.shape, like.dtype, ("state", "parameter"))


def in_chunks(store: SealingStore, array: zarr.Array, blocks: Sequence[np.ndarray]) -> None:
    """As a recorder's thread does: the rows of a block are vectors, each for itself."""
    for n, block in enumerate(blocks):
        array = chunks.grown(array, (n + 1) * len(block))
        vectors.put(store, array, n * len(block), list(block))


def bench_files(name: str, steps: int, repeats: int) -> None:
    options = {"shares": "rows"} if name.startswith("resnet") else {}
    writes, reads = [], []
    with tempfile.TemporaryDirectory() as folder:
        for _ in stepping(ALL[name](steps), Path(folder) / "run", **options):
            pass
        run = attrib.open_run(Path(folder) / "run")
        length, size = run.trajectory.block, run.layout.size
        parts = [slice(first, first + length) for first in range(0, run.steps - length + 1, length)]
        blocks = [run.reader.read("theta", part) for part in parts]
        plain, like = Path(folder) / "plain", blocks[0]
        offsets = [part.start * like[0].nbytes for part in parts]
        for n in range(repeats):
            plain.unlink(missing_ok=True)
            base = spent(partial(plainly, plain, blocks)).everywhere
            writes.append(base / spent(partial(in_chunks, *opened(Path(folder) / f"{n}", like), blocks)).everywhere)
            base = sum(spent(partial(np.fromfile, plain, like.dtype, like.size, offset=o)).everywhere for o in offsets)
            shutil.rmtree(Path(folder) / f"{n}")  # so that neither takes pages that the other leaves
            reads.append(base / sum(spent(partial(run.reader.read, "theta", part)).everywhere for part in parts))
    said = (f"{statistics.median(r):.2f} ({min(r):.2f}-{max(r):.2f})" for r in (writes, reads))
    print(f"{name:8s} {len(blocks)} blocks of {length} x {size}: of the plain file's speed,", *said, flush=True)


def codecs() -> dict[str, Callable[[np.ndarray], tuple[Callable[[], Any], Callable[[Any], Any]]]]:
    """Of an array (row, parameter): what packs it, and what unpacks that."""
    numcodecs.blosc.set_nthreads(1)

    def blosc(name: str, level: int, shuffle: int, side_by_side: bool = False) -> Any:
        codec = numcodecs.Blosc(name, level, shuffle)

        def of(a: np.ndarray) -> Any:
            def unpack(packed: Any) -> Any:
                flat = np.frombuffer(codec.decode(packed), a.dtype)
                return np.ascontiguousarray(flat.reshape(a.T.shape).T) if side_by_side else flat

            return (lambda: codec.encode(np.ascontiguousarray(a.T) if side_by_side else a)), unpack

        return of

    return {
        "as it is (a copy)": lambda a: (a.tobytes, bytearray),
        "lz4 5, by bits": blosc("lz4", 5, 2),
        "lz4 1, by bytes": blosc("lz4", 1, 1),
        "lz4 5, side by side, by bits": blosc("lz4", 5, 2, True),
        "zstd 1, by bits": blosc("zstd", 1, 2),
        "zstd 1, by bytes": blosc("zstd", 1, 1),
        "zstd 1, side by side, by bits": blosc("zstd", 1, 2, True),
        "zstd 3, side by side, by bits": blosc("zstd", 3, 2, True),
    }


def bench_codecs(name: str, steps: int, repeats: int) -> None:
    setting, found = ALL[name](8), {"states": [], "gradients": []}
    parameters = list(setting.model.parameters())
    for _ in stepping(setting):
        found["states"].append(torch.cat([p.detach().reshape(-1) for p in parameters])[: 1 << 20].numpy())
        found["gradients"].append(torch.cat([p.grad.reshape(-1) for p in parameters])[: 1 << 20].numpy())
    for what, rows in found.items():
        values = np.stack(rows)
        best = min(spent(lambda values=values: xxhash.xxh3_64_intdigest(values)).here for _ in range(repeats))
        print(f"{name} {what} {values.shape}; digest {values.nbytes / best / 1e6:.0f} MB/s")
        for label, codec in codecs().items():
            pack, unpack = codec(values)
            packed = pack()
            seconds = [min(spent(work).here for _ in range(repeats)) for work in (pack, lambda: unpack(packed))]  # noqa: B023
            speeds = " ".join(f"{values.nbytes / s / 1e6:7.0f}" for s in seconds)
            print(
                f"  {label:30s} {len(packed) / values.nbytes:.3f} of the bytes; MB/s, write, read: {speeds}", flush=True
            )


PARTS = {"steps": bench_steps, "files": bench_files, "codecs": bench_codecs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--settings", nargs="+", default=["gpt", "resnet"], choices=list(ALL))
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="of torch (1)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(machine())
    for part in options.parts:
        for name in options.settings:
            PARTS[part](name, options.steps, options.repeats)


if __name__ == "__main__":
    main()
