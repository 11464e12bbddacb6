"""The arrays of a run. T steps, P parameters, K parameter tensors, H numbers a step and tensor, R distinct inputs.

    theta        [state, parameter]            parameters that step s started from; row T: the final ones. Bits preserved.
                                               With states_every=k: those of every k-th step, and the final ones
    gradient     [step, parameter]             p.grad as the optimizer saw it
    penalty      [step, parameter]             what of it was a penalty's and no example's, where the loop had one
    state/*      [frame, parameter]            the optimizer's accumulators before the first step of each block, or before
                                               every k-th step: "momentum" is linear in the gradients, the others are called
                                               as torch calls them; zeros where a tensor's rule has none, smaller ones first
    hyper        [step, tensor, hyper]         the numbers that the step of each tensor depended on, by the names that its
                                               optimizer has in the header's "optimizers", zeros behind them; the last says
                                               whether it took part
    index        [step, slot]                  ids of the training examples, -1 where the batch was smaller; of ids that are
                                               strings the numbers that stand for them
    ids/*        [id, bound], [utf8]           which strings these are: see `ids`
    row          [step, slot]                  where the inputs of the slot stand in the table of examples/ of the step
    facts        [step, fact]                  numbers of a step, float64, named in the array's attribute "facts":
        loss, ..._identity, remainder          mean loss, the identities, and what p.grad holds beyond the shares relative to
                                               |p.grad| where it may, NaN where not checked
        seconds                                of training, NaN for the first step
    passes       [step, pass, pass_fact]       of each pass that the gradient of a step was made of, float64, likewise:
        size                                   examples: those of the first pass stand in the first slots; 0 beyond the last
        kind                                   which table of examples/ holds its inputs
        shared                                 which row of shared/ holds what its examples share, -1 for nothing
        scale                                  share = scale * gradient of the example's loss (reduction, clipping); NaN
                                               where it is to be fitted to p.grad when it is asked for
        factor_scale                           share = factor_scale * stored factor, of which the reduction may be
                                               part already
    examples/*/* [row, ...]                    the inputs: a table per form (header "forms"), an array per tensor in it
    shared/*/*   [row, ...]                    tensors and numbers of a batch that all of its examples share
    gradients    [step, slot, parameter]       per-example shares, with capture="gradients"
    factors/*/*/* [step, slot, ...]            the same as factors of the layers, with capture="factors"
    random       [step, pass, byte]            state of torch's generator before the forward pass, where the loss uses it;
                                               of Python's and numpy's global ones behind it, where it uses those
    theta, gradient and state/* are of the parameters' type, the header's "dtype"; where numpy lacks it, integers of its
    width. penalty and shares are of float32 where that is less.
    constants/*                                buffers and frozen parameters, by their number in the header's "constants"; of
                                               a type that numpy lacks as integers of its width (its "digests" say which)
    initial/*    [entry]                       the buffers that training changes (the header's "buffers"), of a type one
                                               behind the other, as they were before the first step
    buffers/*    [step, entry]                 the same after each step; of a type that numpy lacks as integers
    digests      [chunk]                       of all chunks of full blocks, see `seal`

While a run is recorded its arrays are longer than what is in them (`chunks`); how many of their rows count the header says,
and when the run is closed they have no others. Every chunk has a digest, and all but those of vectors, (row, parameter), a
checksum that any reader of Zarr sees to.

In the header, with the counts of what is committed, stands the state of all generators after the last step, `generators`.

Everything about one step can be rebuilt from these: the coefficients of the update follow from the gradients and the last
state, so they are not stored a second time.
"""

from typing import Any, NamedTuple

import zarr
from zarr.abc.store import Store
from zarr.codecs import BloscCodec, Crc32cCodec, TransposeCodec
from zarr.storage import StorePath

FORMAT = 4
BLOCK_BYTES = 64 << 20  # of what a block's steps hold: one block is written while the next fills up
BLOCK_STEPS = 256
CHUNK_BYTES = 2 << 20
COMMIT_SECONDS = 3.0  # a block that takes longer to fill is committed as it grows
COMMIT_SHARE = 0.02  # of the time, at most, goes into that
DIGESTS = "digests"  # the array, see `seal`
STATE_BYTES = 64 << 20  # of a chunk of parameters or gradients, which are read whole: those of a block

LOGS = ("loss", "batch_identity", "step_identity", "split_identity", "remainder", "seconds")
FACTS = LOGS  # columns of `facts`
PASS_FACTS = ("size", "kind", "shared", "scale", "factor_scale")  # columns of `passes`

_EVERY_CHUNK: Any = {"write_empty_chunks": True}  # what is not there is lost, and not zeros

DIMENSIONS: dict[str, tuple[str, ...]] = {
    "theta": ("state", "parameter"),
    "gradient": ("step", "parameter"),
    "penalty": ("step", "parameter"),
    "hyper": ("step", "tensor", "hyper"),
    "index": ("step", "slot"),
    "row": ("step", "slot"),
    "facts": ("step", "fact"),
    "passes": ("step", "pass", "pass_fact"),
    "random": ("step", "pass", "byte"),
}

NAMES = {
    *DIMENSIONS,
    "state",
    "examples",
    "shared",
    "ids",
    "gradients",
    "factors",
    "constants",
    "initial",
    "buffers",
    DIGESTS,
}  # at the root of a run


class Lengths(NamedTuple):
    """Steps per block, between stored states, between stored accumulators."""

    block: int
    states_every: int
    frame: int

    def rows(self, steps: int, complete: bool) -> dict[str, int]:
        """Of arrays that grow with the steps, by their first dimension: how many belong to so many of them."""
        every = self.states_every
        states = steps + 1 if every == 1 else -(-steps // every) + complete
        return {"step": steps, "state": states, "frame": -(-steps // self.frame)}


def create(
    group: zarr.Group,
    name: str,
    shape: tuple[int, ...],
    chunks: tuple[int, ...],
    dtype: Any,
    dimensions: tuple[str, ...],
    fill: int = 0,
    states: bool = False,
    attributes: dict[str, Any] | None = None,
) -> zarr.Array:
    """An array with fast lossless compression and a checksum on every chunk.

    fill: what stands beyond its edge. states: rows (state, parameter) of a run that is not recorded any more; those of one
    parameter are stored side by side, of which a slower compressor leaves three quarters.
    """
    return group.create_array(
        name,
        shape=shape,
        chunks=tuple(max(1, c) for c in chunks),
        dtype=dtype,
        dimension_names=dimensions,
        fill_value=fill,
        filters=(TransposeCodec(order=(1, 0)),) if states else (),
        compressors=compressors("zstd" if states else "lz4"),
        config=_EVERY_CHUNK,
        attributes=attributes,
    )


def writable_array(store: Store, name: str) -> zarr.Array:
    """One that was created before, to be written to."""
    return zarr.open_array(store, path=name, mode="r+", zarr_format=3).with_config(_EVERY_CHUNK)


def continued(array: zarr.Array, store: Store, rows: int | None = None) -> zarr.Array:
    """One that is read through a store that checks it, to be written to in another. rows: of another length."""
    metadata: Any = array.metadata
    if rows is not None:
        metadata = metadata.update_shape((rows, *array.shape[1:]))
    return zarr.Array(zarr.AsyncArray(metadata, StorePath(store, array.path))).with_config(_EVERY_CHUNK)


def compressors(name: str = "lz4") -> tuple[Any, ...]:
    """Fast and lossless, and a checksum that any reader of Zarr sees to. Bits are sorted by their place: a tenth less of a
    gradient is left than of one whose bytes are, in less time."""
    codec: Any = {"cname": name, "clevel": 5 if name == "lz4" else 1, "shuffle": "bitshuffle"}
    return BloscCodec(**codec), Crc32cCodec()


def block_steps(bytes_per_step: int) -> int:
    """Steps of a block: as many as fit BLOCK_BYTES, at most BLOCK_STEPS."""
    return int(min(BLOCK_STEPS, max(1, BLOCK_BYTES // max(1, bytes_per_step))))
