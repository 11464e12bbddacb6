"""Whose rows are whose at every site, where the examples of a batch may see each other.

What a row depends on says little there: through the statistics of a batch every row depends on every example. So it is read
where nothing is coupled: batch normalisation goes by fixed statistics for the time of the reading, those that the batch at
hand has, and what couples behind the last site (a contrastive loss, a balancing term) does not matter. The examples are
replaced by their neighbours, for each binary digit of their numbers those that have it and those that do not, and no row of
another may change. Of any two examples one is among some of these without the other: so a row that changes with another's
content is found out, whichever it is.

A site that cannot be read so, and that the objective depends on, has no row shares: that is an error.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..batch import Batch
from ..errors import LossError
from ..generators import random_state
from .assignment import Trace, calls_of, differs
from .batchwise import Batchwise, candidates
from .functions import FUNCTIONS
from .sites import Site
from .terms import Reached, names_of

Follow = Callable[[Batch], Trace]  # a batch -> its forward pass, with the values at the sites


class FixedStatistics(TorchFunctionMode):
    """While active, batch normalisation by the statistics of a batch goes by fixed ones: those that each call, in order, had
    in the first pass. `again` begins another pass."""

    def __init__(self) -> None:
        super().__init__()
        self._known: list[tuple[Tensor, Tensor]] = []
        self._calls = 0

    def again(self) -> "FixedStatistics":
        self._calls = 0
        return self

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.batch_norm:
            return func(*args, **kwargs)
        bound = FUNCTIONS[func].bind(args, kwargs)
        if bound.get("training"):
            x, weight = bound["input"].detach(), bound.get("weight")
            mean, variance = (t.to((x if weight is None else weight).dtype) for t in self._statistics(x))
            bound = {**bound, "running_mean": mean, "running_var": variance, "training": False}
        return func(**bound)

    def _statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Of each channel, (C,) each."""
        if self._calls == len(self._known):
            rows = x.transpose(0, 1).flatten(1)
            self._known.append((rows.mean(1), rows.var(1, correction=0)))
        self._calls += 1
        return self._known[self._calls - 1]


@dataclass(frozen=True)
class Owners:
    """Whose rows are whose at the sites of one kind of pass. readings: None where that cannot be read. calls: what the sites
    are. volatile: whether it depends on the content of the batch, so that it is read anew in each. slow: parameters whose
    shares by sites are not those of the truth."""

    readings: tuple[Batchwise | None, ...]
    calls: tuple[Any, ...]
    volatile: bool
    slow: frozenset[str] = frozenset()

    def reached(self, trace: Trace, deltas: Sequence[Tensor | None]) -> Reached:
        """The sites that the objective depends on, each with its reading and the gradient of its output.

        Raises:
            LossError: of one of them it is not known whose rows are whose.
        """
        check_split(trace)
        found: Reached = []
        for site, reading, delta in zip(trace.sites, self.readings, deltas, strict=True):
            if delta is None:
                continue
            if reading is None:
                raise LossError(
                    f"there are no row shares here: got rows that are not of one example each, in a call of "
                    f"{_called(site)} with output {tuple(site.shape)}, at parameter {min(names_of(site))!r}. Examples meet "
                    f"before it, by something else than batch normalisation, or are put into another order by what they "
                    f"hold. {_ADVICE}"
                )
            found.append((site, reading, delta))
        return found


_ADVICE = (
    "Let parameters meet the data before examples meet each other (scale embeddings, not the matrix of their pairs), or use "
    'shares="example", of a loss that returns one number per example.'
)


def check_split(trace: Trace) -> None:
    """Raise LossError for parameters at calls whose rows cannot be told apart."""
    if trace.unsplit:
        raise LossError(
            f"there are no row shares here: got a call that selects rows by what they hold, or writes in place, expected "
            f"one whose output has as many rows for every example, at parameter {min(trace.unsplit)!r}. {_ADVICE}"
        )


def owners_of(follow: Follow, batch: Batch, trace: Trace, start: Tensor) -> Owners:
    """Of a trace of the batch. follow: makes passes in which nothing is coupled; start: the generators' state before."""
    calls = calls_of(trace)
    volatile = None in trace.read or any(site.placed or site.mixed for site in trace.sites)
    if batch.size == 1:
        return Owners(tuple(Batchwise(0) if site.shape else None for site in trace.sites), calls, volatile)
    with random_state(start):
        plain = follow(batch)
    fits = [candidates(site.shape, batch.size) for site in trace.sites]
    alike = calls_of(plain) == calls
    for others in _replacements(batch.size) if alike else ():
        with random_state(start):
            changed = follow(batch.take(_neighbours(others)))
        for n, before in enumerate(plain.sites):
            after = changed.sites[n] if n < len(changed.sites) else None
            fits[n] = (
                [] if after is None else [r for r in fits[n] if _stays(r, before, after, ~others, trace.precision)]
            )
    readings = tuple(fit[0] if alike and len(fit) == 1 else None for fit in fits)
    return Owners(readings, calls, volatile)


def _replacements(size: int) -> Iterator[Tensor]:
    """(B,) each: of the examples those that have a binary digit in their number, and those that do not."""
    for digit in range((size - 1).bit_length()):
        has = (torch.arange(size) >> digit) % 2 == 1
        yield has
        yield ~has


def _neighbours(others: Tensor) -> Tensor:
    """(B,): their own numbers, those of the next instead of some."""
    own = torch.arange(len(others))
    return torch.where(others, own.roll(-1), own)


def _stays(reading: Batchwise, before: Site, after: Site, kept: Tensor, precision: torch.dtype) -> bool:
    """Whether nothing changed in the rows of the examples that were kept."""
    if before.shape != after.shape or before.value is None or after.value is None:
        return False
    moved = reading.split(differs(after.value, before.value, precision), len(kept))
    return not bool(moved[kept.to(moved.device)].any())


def _called(site: Site) -> str:
    return str(getattr(site.call.function, "__name__", site.call.function))
