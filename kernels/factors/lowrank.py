"""Sensitivities of many queries that differ in few directions within each row of a matrix.

    U_q[o] = sum_{r of row o} over[r, q] along[r]        U (Q, o, i), R pairs in all
    <U_q, d a^T> = sum_r over[r, q] d[row r] <along[r], a>

Two products of R (i + Q) operations in place of Q o i. A step adds to a row of U one vector over the inputs, times a number
for each query, for every position that the queries share, and what optimizers do entry by entry keeps that form: a row has
at most as many pairs as steps and positions follow, and fewer where all but some are less than rounding.

Pairs are taken off by Gram-Schmidt, always for the query that is furthest off its bound, and what is left is held in
float64, so that the bound is kept however the pairs came about. With w_i^2 = sum_q U_q[o, i]^2, since a preconditioner makes
columns of very different sizes, and those the largest that are met least:

    || what is left of U_q[o] / w ||  <=  eps / 2 || U_q[o] / w ||                       eps of float32

That is what rounding U to float32 does, as other products do: it moves <U_q[o], a> by up to eps / 2 sum_i |U_q[o, i] a_i|,
at most eps / 2 ||U_q[o] / w|| ||w a|| (Cauchy, Schwarz), and so much is what leaving the rest out may do.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import base

HALF_EPS = float(torch.finfo(torch.float32).eps) / 2
AT_LEAST = 256  # columns of a matrix product: fewer, and packing its other side is felt
READING, TAKING = 64, 20  # multiplications in the time of reading an entry of U, and of taking a pair off an entry


class LowRank(NamedTuple):
    """over (R, Q), along (R, i): the first pair of every row that has one, the second of those that have two, and so on.
    rows (o,) int64, those with most first, so that layers[k] says how many of them, and which, have a pair k. turned: of the
    columns of U, in place of its rows."""

    rows: Tensor
    layers: tuple[int, ...]
    over: Tensor
    along: Tensor
    turned: bool

    def contract(self, left: Tensor, right: Tensor) -> Tensor:
        """(B, n, o), (B, n, i) -> sum over the n positions of left^T U_q right, (Q, B) float64."""
        if self.turned:
            left, right = right, left
        (count, positions), pairs = left.shape[:2], len(self.over)
        out = left.new_zeros(self.over.shape[1], count)
        if not pairs:
            return out.double()
        at_once = max(AT_LEAST // positions, 1, base.SLICE_BYTES // (left.element_size() * positions * pairs))
        for some in base.slices(count, at_once):
            products = self.along @ right[some].flatten(0, 1).T
            factors = left[some].flatten(0, 1).T.contiguous()[self.rows]
            for layer in products.split(self.layers):
                layer *= factors[: len(layer)]
            if positions > 1:
                products = products.view(pairs, -1, positions).sum(2)
            torch.mm(self.over.T, products, out=out[:, some])
        return out.double()


def low_rank(directions: Tensor, reached: float, count: float, instead: float) -> LowRank | None:
    """U (Q, o, i) float64 on the CPU as pairs of its rows, or else of its columns; None where they take more multiplications
    than `instead`, with `reached` positions in all of `count` examples, or where U is not finite."""
    for turned in (False, True):
        some = directions.transpose(1, 2) if turned else directions
        queries, outputs, inputs = some.shape
        most = min(most_pairs(queries, reached, count, outputs, inputs, instead), outputs * min(queries, inputs))
        if most < outputs:  # less than one a row
            continue
        from ..pairs import take_pairs  # numba, whose loading takes longer than small models do

        rows, over = np.empty(most, np.int64), np.empty((most, queries), np.float32)
        along = np.empty((most, inputs), np.float32)
        pairs = take_pairs(some.numpy(), HALF_EPS**2, rows, over, along)
        if pairs >= 0:
            return _layered(rows[:pairs], over[:pairs], along[:pairs], outputs, turned)
    return None


def _layered(rows: np.ndarray, over: np.ndarray, along: np.ndarray, outputs: int, turned: bool) -> LowRank:
    """rows (R,): of each pair; those of a row one after the other."""
    ranks = np.bincount(rows, minlength=outputs)
    most_first = np.argsort(-ranks, kind="stable")
    first = np.r_[True, rows[1:] != rows[:-1]].nonzero()[0] if len(rows) else rows
    layer = np.arange(len(rows)) - first.repeat(ranks[rows[first]])
    order = np.lexsort((np.argsort(most_first)[rows], layer))
    layers = tuple(int((ranks > k).sum()) for k in range(ranks.max(initial=0)))
    tensors = [torch.from_numpy(array) for array in (most_first, over[order], along[order])]
    return LowRank(tensors[0], layers, tensors[1], tensors[2], turned)


def most_pairs(queries: int, reached: float, count: float, outputs: int, inputs: int, instead: float) -> int:
    """That take as many multiplications as `instead`."""
    once = READING * queries * outputs * inputs
    each = reached * (inputs + 4 * base.TRAFFIC) + count * queries + TAKING * queries * inputs
    return int(max(0, instead - once) // each)
