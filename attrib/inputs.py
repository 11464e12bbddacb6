"""A batch as a run stores it: arrays with a row per example, arrays that its examples share, and how they make a tree.

A type that numpy lacks is held as integers of its width, a number as an array of no dimension.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from .batch import NUMBERS, Batch, places, plain, tree_of
from .constants import to_array, to_tensor

Form = dict[str, Any]  # JSON: the tree, and of each leaf [role, type, shape of a row or of it all]

_HELD = {"float": np.float64, "int": np.int64, "bool": np.bool_}  # a Python number as


@dataclass(frozen=True, eq=False)
class Inputs:
    """form: what batches of one kind have in common. rows: (B, ...) each; shared: the others, numbers among them."""

    form: Form
    rows: tuple[np.ndarray, ...]
    shared: tuple[np.ndarray, ...]


def inputs_of(batch: Batch) -> Inputs:
    """Views of the batch's memory where that allows.

    Raises:
        TypeError: a leaf does not hold plain numbers. Its arguments: what, and where.
    """
    leaves: list[Any] = []
    rows: list[np.ndarray] = []
    shared: list[np.ndarray] = []
    for leaf, by_row, where in zip(batch.leaves, batch.rows, places(batch.tree), strict=True):
        if not isinstance(leaf, Tensor):
            name = next(kind.__name__ for kind in NUMBERS if isinstance(leaf, kind))
            try:
                shared.append(np.asarray(leaf, _HELD[name]))
            except OverflowError:
                raise TypeError(f"the integer {leaf}", where) from None
            leaves.append(["number", name, []])
            continue
        try:
            array = to_array(leaf)
        except TypeError as error:
            raise TypeError(str(error), where) from error
        (rows if by_row else shared).append(array)
        role, shape = ("rows", array.shape[1:]) if by_row else ("shared", array.shape)
        leaves.append([role, str(leaf.dtype).removeprefix("torch."), list(shape)])
    return Inputs({"tree": plain(batch.tree), "leaves": leaves}, tuple(rows), tuple(shared))


def batch_of(form: Form, rows: Sequence[np.ndarray], shared: Sequence[np.ndarray], size: int) -> Batch:
    """The inverse of `inputs_of`."""
    by_row, others = iter(rows), iter(shared)
    leaves: list[Any] = []
    for role, dtype, _ in form["leaves"]:
        array = next(by_row if role == "rows" else others)
        leaves.append(array.item() if role == "number" else to_tensor(array, dtype))
    roles = tuple(role == "rows" for role, *_ in form["leaves"])
    return Batch(size, tuple(leaves), roles, tree_of(form["tree"]))


def counts(form: Form) -> tuple[int, int]:
    """How many arrays have rows, and how many are shared."""
    by_row = sum(role == "rows" for role, *_ in form["leaves"])
    return by_row, len(form["leaves"]) - by_row
