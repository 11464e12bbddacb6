"""One sweep backwards through the steps of a run.

    store --> prepare (any worker) --> scan (in order, here) --> contract (any worker) --> Tally, summed

Which question is asked stands in the sensitivity; who does the work, in the pool. Nothing has the size of examples x
parameters.
"""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from .account import Account
from .errors import WorkerError
from .executor import Pool
from .run import Run
from .sensitivity import Adjoint, Products, Sensitivity, Traced, along_tensors
from .shares import Contributions, Shares, Split, drawn
from .steps import Blocks, RecordedStep, Steps
from .tally import Tally, total


@dataclass(frozen=True)
class Work:
    """What is done to the steps of a window, a piece at a time; pickles. split: whether that identity is checked. blocks: of
    the run that are kept at hand, so that pieces under way do not read them twice."""

    run: Run
    window: range
    sensitivity: Sensitivity
    shares: Shares
    account: Account
    split: bool = True
    blocks: int = 1

    def __reduce__(self) -> tuple[Any, ...]:
        return Work, (self.run, self.window, self.sensitivity, self.shares, self.account, self.split, self.blocks)

    @cached_property
    def _blocks(self) -> Blocks:
        return Blocks(self.run.trajectory, self.window.stop, self.blocks)

    @cached_property
    def _drawn(self) -> frozenset[int]:
        return drawn(self.window)

    @cached_property
    def _recorded(self) -> np.ndarray:
        """(T,): the gaps of the split that were found while recording."""
        return self.run.log("split_identity")

    def steps(self, piece: range) -> Steps:
        return self._blocks.at(piece)

    def pieces(self, length: int) -> list[range]:
        return self._blocks.ranges(self.window, length)

    def prepare(self, piece: range) -> Any:
        return self.sensitivity.prepare(self.steps(piece))

    def contract(self, piece: range, traced: Traced) -> list[Tally]:
        """Of each step a tally, the last first."""
        steps = self.steps(piece)
        products = self._products(steps, traced.sensitivity)
        terms = self.sensitivity.terms(steps, traced, products)
        each, splits = list(steps), {}
        contributed = self.shares.contract(each, traced.sensitivity, products.gradient)
        for n in reversed(range(len(each))):
            split = (
                self._split(each[n], traced.sensitivity[n], contributed[n], terms.seen_at(n)) if self.split else None
            )
            if split is not None:
                splits[each[n].number] = split
        tallies = self.account.tallies(each, contributed, products.gradient, terms, splits)
        return [replace(tally, coupled=True) for tally in tallies] if self.shares.coupled else tallies

    def summed(self, piece: range, traced: Traced) -> list[Tally]:
        """`contract`, as one tally: what comes back from a worker is as small as it can be."""
        tallies = self.contract(piece, traced)
        whole = total(tallies, piece, np.unique(np.concatenate([tally.examples for tally in tallies])))
        return [] if whole is None else [whole]

    def _products(self, steps: Steps, sensitivity: Tensor) -> Products:
        penalty = [] if steps.penalty is None else [steps.penalty]
        vectors = [t.to(sensitivity.device) for t in (steps.theta[:-1], steps.examples, *penalty)]
        layout = self.run.layout
        return Products(*along_tensors(layout, sensitivity, lambda part: [v[:, part].double() for v in vectors]))

    def _split(
        self, step: RecordedStep, sensitivity: Tensor, contributions: Contributions, seen: np.ndarray | float
    ) -> Split | None:
        """Of a drawn step; without a loss, what was recorded with it."""
        if not self.shares.has_loss:
            return Split(float(self._recorded[step.number]))
        return self.shares.split(step, sensitivity, contributions, seen) if step.number in self._drawn else None


class Passed(NamedTuple):
    """A piece that is done: its tallies, the last step first, and the adjoint before it."""

    piece: range
    adjoint: Adjoint
    tallies: list[Tally]


def sweep(work: Work, pool: Pool, asked: Callable[[], bool]) -> Iterator[Passed]:
    """The pieces of the window, the last first, each when it is done.

    At most `pool.ahead` pieces are prepared before they can be scanned, and as many contracted after. Asked to stop, those
    that were scanned are finished: what was yielded is whole.

    Raises:
        WorkerError: a worker died. What the work itself raises, as it is.
    """
    pieces = work.pieces(pool.length)
    adjoint, upcoming = work.sensitivity.begin(), iter(pieces)
    prepared: deque[Any] = deque()
    contracted: deque[tuple[range, Adjoint, Any]] = deque()

    def done() -> Passed:
        piece, before, tallies = contracted.popleft()
        return Passed(piece, before, tallies.result())

    try:
        for piece in pieces:
            if asked() and piece is not pieces[0]:
                break
            prepared += [pool.prepare(piece) for piece in islice(upcoming, pool.ahead - len(prepared))]
            traced, adjoint = work.sensitivity.scan(work.steps(piece), prepared.popleft().result(), adjoint)
            contracted.append((piece, adjoint, pool.contract(piece, traced)))
            del traced  # of many queries it is as large as all that the next steps need
            if len(contracted) >= pool.ahead:
                yield done()
        while contracted:
            yield done()
    finally:
        for future in (*prepared, *(future for *_, future in contracted)):
            future.cancel()


class Sums(NamedTuple):
    """What a sweep comes to: the tally of the steps that were done and what was inherited there, (Q, K), None for nothing;
    and the error that cut it short."""

    tally: Tally | None
    inherited: np.ndarray | None
    died: WorkerError | None


def summed_sweep(work: Work, pool: Pool, heard: Callable[[Tally], Tally], asked: Callable[[], bool]) -> Sums:
    """The sum of all pieces, each `heard` of on its way."""
    first, adjoint, died = work.window.stop, work.sensitivity.begin(), None

    def tallies() -> Iterator[Tally]:
        nonlocal first, adjoint, died
        try:
            for piece, before, tallies in sweep(work, pool, asked):
                yield from map(heard, tallies)
                first, adjoint = piece.start, before
        except WorkerError as error:
            died = error

    whole = total(tallies(), work.window, work.run.numbers)
    if whole is None:
        return Sums(None, None, died)
    inherited = work.sensitivity.inherited(work.steps(range(first, first + 1)), adjoint)
    return Sums(whole.since(first), inherited, died)
