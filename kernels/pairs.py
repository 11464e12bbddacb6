"""Rows of a matrix for many queries, as sums of few products of a number for each query and a vector over the inputs.

    U_q[o] = sum over pairs of row o  over[q] along  +  what is left,  || left / w || <= bound || U_q[o] / w ||

Gram-Schmidt on what is left, beginning with the query that is furthest off its bound, row by row: why so, and w, in
`factors.lowrank`. What is left is updated as it is, so that it is known whatever rounding made of the pairs.
"""

import numba
import numpy as np

LOOKS = 8  # rows that stand so far apart are taken one after the other: the first ones tell of the rest


@numba.njit(fastmath={"reassoc", "contract"}, cache=True)
def take_pairs(directions, bound, rows, over, along):  # pragma: no cover - compiled
    """U (Q, o, i) float64; bound: the square of how much of a query may be left of a row. Writes the row of each pair (m,)
    and its two vectors, (m, Q) and (m, i). How many there are; -1 where there is no room for all, or seems to be none, and
    where U is not finite."""
    queries, outputs, inputs = directions.shape
    left, squares, allowed = np.empty((queries, inputs)), np.empty(queries), np.empty(queries)
    column, direction = np.empty(inputs), np.empty(inputs)
    count, done = 0, 0
    for first in range(LOOKS):
        for o in range(first, outputs, LOOKS):
            column[:] = 0.0
            for q in range(queries):
                for i in range(inputs):
                    left[q, i] = directions[q, o, i]
                    column[i] += left[q, i] * left[q, i]
            for i in range(inputs):
                if not np.isfinite(column[i]):
                    return -1
                column[i] = np.sqrt(column[i])
                direction[i] = 1 / column[i] if column[i] > 0 else 0.0
            for q in range(queries):
                total = 0.0
                for i in range(inputs):
                    left[q, i] *= direction[i]
                    total += left[q, i] * left[q, i]
                squares[q], allowed[q] = total, bound * total
            done += 1
            while True:
                furthest, ratio = -1, 1.0
                for q in range(queries):
                    if squares[q] > ratio * allowed[q]:
                        furthest, ratio = q, squares[q] / allowed[q]
                if furthest < 0:
                    break
                if count == len(rows) or count * outputs > len(rows) * (done + outputs // LOOKS):
                    return -1
                scale = 1 / np.sqrt(squares[furthest])
                for i in range(inputs):
                    direction[i] = left[furthest, i] * scale
                for q in range(queries):
                    dot, total = 0.0, 0.0
                    for i in range(inputs):
                        dot += left[q, i] * direction[i]
                    for i in range(inputs):
                        left[q, i] -= dot * direction[i]
                        total += left[q, i] * left[q, i]
                    over[count, q], squares[q] = dot, total
                rows[count] = o
                for i in range(inputs):
                    along[count, i] = direction[i] * column[i]
                count += 1
    return count
