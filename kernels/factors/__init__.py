"""The gradient of a weight, example by example, in the form that a layer gives it, without writing it out.

    Outer        g_i = sum_t left[i, t] right[i, t]^T       a matrix met at t = 1 .. n positions: linear layer, product
    Convolution  the same over patches of the input         which need not be cut out for a few queries
    Lookup       g_i = sum_t values[i, t] at index[i, t]    rows of a table: embedding
    Dense        g_i itself                                 norms, biases, whatever is small or has no shorter form

What each can do is said once, in `base.Factor`. Lossless: nothing is approximated. A new kind is one file with one class,
and one row of KINDS. Source: Goodfellow 2015 (arXiv 1510.01799).
"""

from .base import Factor
from .convolution import Convolution
from .dense import Dense
from .lookup import Lookup
from .lowrank import LowRank
from .outer import Outer

__all__ = ["KINDS", "Convolution", "Dense", "Factor", "Lookup", "LowRank", "Outer", "kind_of"]

KINDS: dict[str, type[Factor]] = {"outer": Outer, "convolution": Convolution, "lookup": Lookup, "dense": Dense}


def kind_of(factor: Factor) -> str:
    """The name that its kind has in the store."""
    return next(name for name, kind in KINDS.items() if type(factor) is kind)
