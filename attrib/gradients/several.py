"""Several steps at once: what is taped of one step is mapped over others of its kind, and taped again.

    f(theta, batch, U) -> tensors        of one step
    F = tape(vmap(tape(f)))              of n steps, their inputs one above the other

For small models a step costs the calls that it makes rather than their arithmetic, and n steps make as many as one. The same
sums, some in another order: what comes out differs by rounding of the compute type, and is compared with f at the first
and the last of the steps that F is made on.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..program import KINDS, Taped, taped

log = logging.getLogger("attrib")

LEAST = 8  # steps: for fewer the graph is not worth making
MOST = 16
BYTES = 16 << 20  # of what the steps that are taken together hold at once, to stay near the cache

Function = Callable[[Sequence[Tensor]], tuple[Tensor, ...]]


class NotTogetherError(Exception):
    """Of a function that cannot be taken over several steps: why."""


def at_once(bytes_of_one: float, most: int) -> int:
    """How many of `most` steps: a power of two, so that there are few graphs; 1 for steps better taken one by one."""
    count = MOST
    while count * bytes_of_one > BYTES or count > most:
        count //= 2
    return count if count >= LEAST else 1


class Several:
    """Graphs of several steps, by kind."""

    def __init__(self) -> None:
        self._known: dict[Any, Taped | None] = {}

    def __call__(self, kind: Any, function: Function, inputs: Sequence[Tensor], common: int) -> list[Tensor] | None:
        """function: of the tensors of one step. inputs: (n, ...) of n steps, the last `common` of them the same for all,
        (...); the first tells the compute type. What it gives, (n, ...) each; None where it cannot be had so."""
        if kind not in self._known:
            if len(self._known) >= KINDS:
                return None
            self._known[kind] = _together(function, inputs, common)
        graph = self._known[kind]
        return None if graph is None else graph(inputs)


def _together(function: Function, inputs: Sequence[Tensor], common: int) -> Taped | None:
    own = len(inputs) - common

    def of(n: int) -> list[Tensor]:
        return [t[n] for t in inputs[:own]] + list(inputs[own:])

    try:
        last, single = function(of(-1)), taped(function, of(-1))
        if single is None or single.read:
            return None
        # gradients are added up in place, which cannot be mapped where the first of them is the same for all steps
        pure = torch.func.functionalize(single.once, remove="mutations")
        over = torch.vmap(pure, (*[0] * own, *[None] * common))
        with _silent():
            several = taped(lambda given: over(*given), inputs)
        found = None if several is None else several(inputs)
    except (NotTogetherError, NotImplementedError, RuntimeError) as error:
        log.debug("steps are taken one by one: %s", error)
        return None
    if found is None:
        return None
    eps = torch.finfo(inputs[0].dtype).eps
    for n, want in ((-1, last), (0, function(of(0)))):
        if not all(_alike(mine[n], theirs, eps) for mine, theirs in zip(found, want, strict=True)):
            log.debug("steps that are taken together have other numbers: they are taken one by one")
            return None
    return several


@contextmanager
def _silent() -> Iterator[None]:
    """Within it `vmap` does not say where it goes through an operation step by step: that is no slower than it was."""
    functorch: Any = torch._C._functorch
    functorch._set_vmap_fallback_warning_enabled(False)
    try:
        yield
    finally:
        functorch._set_vmap_fallback_warning_enabled(True)


def _alike(found: Tensor, want: Tensor, eps: float) -> bool:
    """To rounding: of each part along the first dimension, and of all of it, where a part is rounding alone."""
    if found.shape != want.shape or not want.numel():
        return found.shape == want.shape
    off, size = ((t if t.dim() > 1 else t[None]).flatten(1).abs().amax(1) for t in (found - want, want))
    return bool((off <= eps**0.5 * size + eps**0.75 * size.max()).all())
