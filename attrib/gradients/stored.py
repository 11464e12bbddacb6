"""Factors as named arrays and back, for capture="factors".

    factors/<number>/<n>/left, right | inputs, delta | index, rows | values           (B, ...) each

The number is that of the parameter among those of the header, by name: a name may be longer than a file's, and hold slashes.
A factor that is larger than the gradient it stands for is written out instead. Which parameter has which factors is the same
at every step of a run, and stands in its header.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from ..errors import LossError
from ..kernels.factors import KINDS, Dense, Factor, kind_of

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
    numbers = _numbers(described)
    for name, several in found.items():
        kinds, now = [d["kind"] for d in described[name]], [kind_of(factor) for factor in several]
        if len(kinds) != len(now) or any(k not in ("dense", n) for k, n in zip(kinds, now, strict=True)):
            raise LossError(
                f"the parameter is used in other calls than at the first step: got {now}, expected "
                f'{kinds}, at {name!r}. Record with capture="replay". The step was refused.'
            )
        for n, (kind, factor) in enumerate(zip(kinds, several, strict=True)):
            kept = Dense(factor.rows()) if kind == "dense" else factor
            out.update({f"factors/{numbers[name]}/{n}/{key}": tensor for key, tensor in kept.tensors().items()})
    return out


def from_tensors(
    described: Described, read: Callable[[str], Tensor], names: Sequence[str] | None = None
) -> dict[str, list[Factor]]:
    """The factors again, of all parameters or of those in `names`, from a function that reads an array by its name."""
    numbers = _numbers(described)
    return {
        name: [
            KINDS[d["kind"]].restored(partial(_read, read, numbers[name], n), d) for n, d in enumerate(described[name])
        ]
        for name in (described if names is None else names)
    }


def parameter_of(described: Described, array: str) -> str:
    """The name of the parameter whose factors stand in an array."""
    return sorted(described)[int(array.split("/")[1])]


def _numbers(described: Described) -> dict[str, int]:
    return {name: number for number, name in enumerate(sorted(described))}


def _read(read: Callable[[str], Tensor], number: int, n: int, key: str) -> Tensor:
    return read(f"factors/{number}/{n}/{key}")


def _describe(factor: Factor) -> dict[str, Any]:
    tensors = list(factor.tensors().values())
    written_out = factor.examples * factor.entries * tensors[-1].itemsize
    if written_out <= sum(t.nbytes for t in tensors):
        return {"kind": "dense"}
    return {"kind": kind_of(factor), **factor.constants()}
