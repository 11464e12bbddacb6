"""The arrays of a run. T steps, P parameters, K parameter tensors, H numbers a step and tensor, R distinct inputs.

    theta        [state, parameter]            parameters that step s started from; row T: the final ones. Bits preserved.
                                               With states_every=k: those of every k-th step, and the final ones
    gradient     [step, parameter]             p.grad as the optimizer saw it
    penalty      [step, parameter]             what of it was a penalty's and no example's, where the loop had one
    state/*      [frame, parameter]            the optimizer's accumulators before the first step of each block, or before
                                               every k-th step
    hyper        [step, tensor, hyper]         the numbers that the step of each tensor depended on
    index        [step, slot]                  ids of the training examples, -1 where the batch was smaller
    kind         [step]                        which table of examples/ holds the inputs of the batch
    row          [step, slot]                  which row of it those of the slot
    scale        [step]                        share = scale * gradient of the example's loss (reduction, clipping); NaN
                                               where it is to be fitted to p.grad when it is asked for
    examples/*/* [row, ...]                    the inputs: a table per shape, in it an array per tensor of the batch
    gradients    [step, slot, parameter]       per-example shares, with capture="gradients"
    factors/*/*/* [step, slot, ...]            the same as factors of the layers, with capture="factors"
    random       [step, byte]                  state of torch's generator before the forward pass, where the loss uses it;
                                               of Python's and numpy's global ones behind it, where it uses those
    constants/*                                buffers and frozen parameters; of a type that numpy lacks as integers of its
                                               width, the header naming it under "digests"
    log/*        [step]                        mean loss and the identities, NaN where not checked; seconds of training

Everything about one step can be rebuilt from these: the coefficients of the update follow from the gradients and the last
state, so they are not stored a second time.
"""

from pathlib import Path
from typing import Any

import zarr
from zarr.codecs import BloscCodec, Crc32cCodec

from .codec import StepDelta

FORMAT = 2
BLOCK_BYTES = 64 << 20  # of what a block's steps hold: one block is written while the next fills up
BLOCK_STEPS = 64
CHUNK_BYTES = 2 << 20
STATE_BYTES = 8 << 20  # of a chunk of parameters or gradients, which are read whole: larger chunks cost less to write

LOGS = ("loss", "batch_identity", "step_identity", "split_identity", "seconds")

DIMENSIONS: dict[str, tuple[str, ...]] = {
    "theta": ("state", "parameter"),
    "gradient": ("step", "parameter"),
    "penalty": ("step", "parameter"),
    "hyper": ("step", "tensor", "hyper"),
    "index": ("step", "slot"),
    "row": ("step", "slot"),
    "kind": ("step",),
    "scale": ("step",),
    "random": ("step", "byte"),
    **{f"log/{name}": ("step",) for name in LOGS},
}


def create(
    group: zarr.Group,
    name: str,
    shape: tuple[int, ...],
    chunks: tuple[int, ...],
    dtype: Any,
    dimensions: tuple[str, ...],
    fill: int = 0,
    steps: bool = False,
) -> zarr.Array:
    """An array with fast lossless compression and a checksum on every chunk.

    fill: what stands beyond its edge. steps: rows are states of a training run, stored as differences: seven tenths of
    the size, where shuffled bytes alone leave nine tenths.
    """
    return group.create_array(
        name,
        shape=shape,
        chunks=tuple(max(1, c) for c in chunks),
        dtype=dtype,
        dimension_names=dimensions,
        fill_value=fill,
        filters=(StepDelta(),) if steps else (),
        compressors=(BloscCodec(cname="lz4", clevel=5, shuffle="shuffle"), Crc32cCodec()),
        config={"write_empty_chunks": True},
    )


def block_steps(bytes_per_step: int) -> int:
    """Steps of a block: as many as fit BLOCK_BYTES, at most BLOCK_STEPS."""
    return int(min(BLOCK_STEPS, max(1, BLOCK_BYTES // max(1, bytes_per_step))))


def local_path(target: Any) -> Path | None:
    """Of a store on a disk of this machine; None for an address or a Store."""
    return Path(target).resolve() if isinstance(target, str | Path) and "://" not in str(target) else None
