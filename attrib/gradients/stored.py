"""Factors as named arrays and back, for capture="factors".

    factors/<parameter>/<n>/left, right | inputs, delta | index, rows | values        (B, ...) each

A factor that is larger than the gradient it stands for is written out instead. Which parameter has which factors is the same
at every step of a run, and stands in its header.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..errors import LossError
from ..kernels import factors
from ..kernels.convolution import Geometry
from ..kernels.factors import Convolution, Dense, Factor, Lookup, Outer

KINDS: dict[str, type[Any]] = {"outer": Outer, "convolution": Convolution, "lookup": Lookup, "dense": Dense}
TENSORS = {
    "outer": ("left", "right"),
    "convolution": ("inputs", "delta"),
    "lookup": ("index", "rows"),
    "dense": ("values",),
}

Described = dict[str, list[dict[str, Any]]]  # parameter -> kind and constants of each of its factors


def describe(found: dict[str, list[Factor]]) -> Described:
    """What stands in the header of the run: the shorter of the factor and the gradient itself."""
    return {name: [_describe(factor) for factor in several] for name, several in found.items()}


def to_tensors(found: dict[str, list[Factor]], described: Described) -> dict[str, Tensor]:
    """Array name -> (B, ...).

    Raises:
        LossError: the loss meets its parameters in other calls than at the first step.
    """
    out: dict[str, Tensor] = {}
    for name, several in found.items():
        kinds = [d["kind"] for d in described[name]]
        if len(kinds) != len(several) or any(k not in ("dense", _kind(f)) for k, f in zip(kinds, several, strict=True)):
            raise LossError(
                f"the parameter is used in other calls than at the first step: got {[_kind(f) for f in several]}, expected "
                f'{kinds}, at {name!r}. Record with capture="replay". The step was refused.'
            )
        for n, (kind, factor) in enumerate(zip(kinds, several, strict=True)):
            kept = Dense(factors.rows(factor)) if kind == "dense" else factor
            out.update({f"factors/{name}/{n}/{key}": getattr(kept, key) for key in TENSORS[kind]})
    return out


def from_tensors(described: Described, read: Callable[[str], Tensor]) -> dict[str, list[Factor]]:
    """The factors again, from a function that reads an array by its name."""
    return {
        name: [
            KINDS[d["kind"]](*(read(f"factors/{name}/{n}/{key}") for key in TENSORS[d["kind"]]), *_constants(d))
            for n, d in enumerate(several)
        ]
        for name, several in described.items()
    }


def _kind(factor: Factor) -> str:
    return next(kind for kind, cls in KINDS.items() if type(factor) is cls)


def _describe(factor: Factor) -> dict[str, Any]:
    kind = _kind(factor)
    tensors = [getattr(factor, key) for key in TENSORS[kind]]
    written_out = factors.examples(factor) * factors.entries(factor) * tensors[-1].itemsize
    if kind == "dense" or written_out <= sum(t.nbytes for t in tensors):
        return {"kind": "dense"}
    if isinstance(factor, Lookup):
        return {"kind": kind, "height": factor.height}
    return {"kind": kind, "geometry": list(factor.geometry)} if isinstance(factor, Convolution) else {"kind": kind}


def _constants(described: dict[str, Any]) -> tuple[Any, ...]:
    if described["kind"] == "convolution":
        kernel, stride, padding, dilation, groups = described["geometry"]
        pairs = tuple((before, after) for before, after in padding)
        return (Geometry(tuple(kernel), tuple(stride), pairs, tuple(dilation), groups),)
    return (described["height"],) if described["kind"] == "lookup" else ()
