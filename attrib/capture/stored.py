"""The arrays of a step's shares, as a run stores them."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from torch import Tensor

from ..batch import Batch
from ..errors import BatchError
from ..gradients import describe, parameter_of, to_tensors
from ..layout import Layout
from .records import Arrays, Factors, Settled


def joined(passes: Sequence[Arrays]) -> Arrays:
    """Of all passes of a step, one behind the other."""
    if len(passes) == 1:
        return passes[0]
    return {name: np.concatenate([arrays[name] for arrays in passes]) for name in passes[0]}


def gradient_arrays(layout: Layout, found: Factors, scale: float, batch: Batch) -> Arrays:
    """The shares themselves, (B, P)."""
    dtype = _array(next(f for factors in found.values() for f in factors).total()[:0]).dtype
    rows = np.zeros((batch.size, layout.size), dtype=dtype)
    for name, part in layout.slices():
        for factor in found[name]:
            rows[:, part] += _array(factor.rows())
    rows *= scale
    return {"gradients": rows}


def factor_arrays(found: Factors, batch: Batch, settled: Settled, step: int) -> tuple[Arrays, Settled]:
    """The factors as named arrays, of one kind and shape over a run: those of the first step.

    Raises:
        BatchError: another shape. LossError: another kind.
    """
    described = describe(found) if settled.described is None else settled.described
    tensors = to_tensors(found, described)
    shapes = {name: tuple(t.shape[1:]) for name, t in tensors.items()}
    first = settled.shapes or shapes
    for name, shape in shapes.items():
        if shape != first[name]:
            raise BatchError(
                f"the factors of an example have another shape than at the first step: got {shape}, expected "
                f"{first[name]}, at {parameter_of(described, name)!r}, array {name}, step "
                f"{step}. Pad batches to one length, or record with "
                f'capture="replay" or "gradients". The step was refused.'
            )
    return _own(tensors, batch), replace(settled, described=described, shapes=first)


def _own(tensors: dict[str, Tensor], batch: Batch) -> Arrays:
    """As arrays; copies where they share the batch's memory, which the caller may fill again before they are written."""
    inputs = {b.untyped_storage().data_ptr() for b in batch.tensors}
    return {n: _array(t.clone() if t.untyped_storage().data_ptr() in inputs else t) for n, t in tensors.items()}


def _array(t: Tensor) -> np.ndarray:
    return t.detach().cpu().numpy()
