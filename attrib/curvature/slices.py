"""How much of a batch and how many directions are worked through at once, so that the passes hold what they may.

A pass there and back holds what the calls return and the gradients of it, and for every direction the tangents of both:
(2 + 2 q) times the bytes of the forward pass. A batch is cut where it draws no numbers and its first slices have the losses
that they have in it.
"""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..budget import PASSES
from ..constants import rounding
from ..generators import generators, random_state
from .point import Point

LEAST = 8  # examples of a slice, if the batch has them, before fewer directions go at once


class Plan(NamedTuple):
    """length: examples of a slice. together: directions at once. draws: whether passes may draw numbers. each: whether every
    example has a loss, else the batch has one."""

    length: int
    together: int
    draws: bool
    each: bool


@dataclass(frozen=True)
class Form:
    """bytes: that the calls return for an example. whole: whether the batch is not cut. draws: whether numbers are drawn.
    each: as in `Plan`."""

    bytes: float
    whole: bool
    draws: bool
    each: bool


class Slices:
    """Args: bytes of what the calls of a forward pass return for the examples of a slice."""

    def __init__(self, slices: int) -> None:
        self._room = PASSES * slices
        self._forms: dict[Any, Form] = {}
        self._cut: set[Any] = set()  # kinds of batches of which one was compared with its slices

    def of(self, point: Point, queries: int, coupled: bool) -> Plan:
        """Of a batch. coupled: whether its losses are known to depend on each other."""
        kind = point.moving, point.batch.kind
        if kind not in self._forms:
            self._forms[kind] = _form(point)
        form = replace(self._forms[kind], whole=True) if coupled else self._forms[kind]
        plan = self._plan(form, point.batch.size, queries)
        if plan.length < point.batch.size and kind not in self._cut:
            self._cut.add(kind)
            if not _alike(point, plan.length):
                self._forms[kind] = replace(form, whole=True)
                return self._plan(self._forms[kind], point.batch.size, queries)
        return plan

    def _plan(self, form: Form, size: int, queries: int) -> Plan:
        most = max(1, int(self._room // form.bytes))  # example passes
        least = size if form.whole else min(size, LEAST)
        together = min(queries, max(1, (most // least - 2) // 2))
        together = -(-queries // -(-queries // together))
        length = size if form.whole else min(size, max(1, most // (2 + 2 * together)))
        return Plan(length, together, form.draws, form.each)


class _Returned(TorchFunctionMode):
    """Counts the bytes that calls return of what the parameters reach."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else (out,):
            if isinstance(t, Tensor) and t.requires_grad:
                self.bytes += t.nbytes
        return out


def _form(point: Point) -> Form:
    start, returned = generators(), _Returned()
    with random_state(start):
        with returned:
            losses = point.values()
        drew = not torch.equal(start, generators())
    each = len(losses) == point.batch.size
    return Form(max(1.0, returned.bytes / point.batch.size), drew or not each, drew, each)


def _alike(point: Point, length: int) -> bool:
    """Whether the losses of the batch are those of its slices, which sum in another order."""
    with random_state(generators()):
        whole = point.values()
        try:
            parts = [replace(point, batch=part).values()[fresh:] for part, fresh in point.batch.cut(length)]
        except Exception:  # whatever a loss does that walks its batch in a way of its own
            return False
    found, loss = torch.cat(parts), point.loss
    bound = rounding(loss.precision) if loss.coarse else float(torch.finfo(whole.dtype).eps ** 0.75)
    return torch.allclose(found, whole, rtol=bound, atol=bound * float(whole.abs().max()))
