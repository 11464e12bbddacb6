"""The arrays of a step's shares, as a run stores them."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from torch import Tensor

from ..errors import BatchError
from ..gradients import describe, parameter_of, to_tensors
from ..layout import Layout
from .records import Arrays, Factors, Settled, Step


def gradient_arrays(layout: Layout, found: Factors, scale: float, step: Step) -> Arrays:
    """The shares themselves, (B, P)."""
    rows = np.zeros((len(step.batch[0]), layout.size), dtype=_array(step.theta[:0]).dtype)
    for name, part in layout.slices():
        for factor in found[name]:
            rows[:, part] += _array(factor.rows())
    rows *= scale
    return {"gradients": rows}


def factor_arrays(found: Factors, step: Step, settled: Settled) -> tuple[Arrays, Settled]:
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
                f"{step.number}. Pad batches to one length, or record with "
                f'capture="replay" or "gradients". The step was refused.'
            )
    return _own(tensors, step.batch), replace(settled, described=described, shapes=first)


def _own(tensors: dict[str, Tensor], batch: Sequence[Tensor]) -> Arrays:
    """As arrays; copies where they share the batch's memory, which the caller may fill again before they are written."""
    inputs = {b.untyped_storage().data_ptr() for b in batch}
    return {n: _array(t.clone() if t.untyped_storage().data_ptr() in inputs else t) for n, t in tensors.items()}


def _array(t: Tensor) -> np.ndarray:
    return t.detach().cpu().numpy()
