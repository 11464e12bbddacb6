"""Consecutive steps of a run, read from its store when they are first asked for, and once.

A step is part of a block, whose updates are replayed together from the optimizer's state that is stored with it. `Blocks`
hands out any consecutive steps of a block and keeps those that it read last, so that several passes over them read once.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice, pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .constants import wide
from .optim import MOMENTUM, Replay, Segments, carried, step_bounds
from .store import Passes
from .trajectory import Trajectory

Updates = list[tuple[Segments, Tensor]]


class Replayed(NamedTuple):
    """The steps of a block. state: the accumulators after the last, (P,) each. missed (n, P): what the accumulator that is
    linear in the gradients is after each step beyond what the coefficients make of it; None for nothing. momentum (n, P):
    that accumulator before each, where it is rounded."""

    updates: Updates
    state: dict[str, Tensor]
    missed: Tensor | None = None
    momentum: Tensor | None = None


class Block:
    """The steps first .. stop - 1 of one block, from its beginning on.

    after: the parameters at `stop`, where they are known already.
    """

    def __init__(self, trajectory: Trajectory, first: int, stop: int, after: Tensor | None = None) -> None:
        self.trajectory, self.first, self.stop = trajectory, first, stop
        self._after = after

    def read(self, name: str) -> Any:
        """The rows of an array of the store that belong to the block."""
        return self.trajectory.reader.read(name, slice(self.first, self.stop))

    def tensor(self, name: str) -> Tensor:
        """The same, of vectors (P,), in the type that they are computed with."""
        return _widened(self.trajectory.reader.tensor(name, slice(self.first, self.stop)))

    @cached_property
    def theta(self) -> Tensor:
        return _widened(self.trajectory.states(self.first, self.stop, self._after))

    @property
    def before(self) -> Tensor | None:
        """The parameters before the first step, (P,), where they were read: those after the block before."""
        return self.theta[0].to(self.trajectory.dtype, copy=True) if "theta" in self.__dict__ else None

    @cached_property
    def gradient(self) -> Tensor:
        return self.tensor("gradient")

    @cached_property
    def penalty(self) -> Tensor | None:
        return self.tensor("penalty") if "penalty" in self.trajectory.reader else None

    @cached_property
    def examples(self) -> Tensor:
        return self.gradient if self.penalty is None else self.gradient - self.penalty

    @cached_property
    def hyper(self) -> np.ndarray:
        return self.read("hyper")

    @cached_property
    def facts(self) -> dict[str, np.ndarray]:
        """What is small: where the inputs stand, the generators' states."""
        drawn = ("random",) if "random" in self.trajectory.reader else ()
        return {name: self.read(name) for name in ("index", "row", *drawn)}

    @cached_property
    def passes(self) -> Passes:
        return self.trajectory.reader.passes(slice(self.first, self.stop))

    @cached_property
    def state(self) -> dict[str, Tensor]:
        return {key: _widened(value) for key, value in self.trajectory.accumulators(self.first).items()}

    @cached_property
    def replayed(self) -> Replayed:
        if self.trajectory.rules.rounds:
            return self._rounded()
        replay = self._replay()
        updates = [self._step(replay, n) for n in range(self.stop - self.first)]
        return Replayed(updates, replay.state)

    def _rounded(self) -> Replayed:
        """Each step from the accumulators that the optimizer had, which rounded them to few bits: over several steps they
        are others than the rule's."""
        updates, missed, momentum = [], [], []
        for n, (before, after) in enumerate(pairwise(self._realised())):
            replay = Replay(self.trajectory.rules, self.trajectory.layout, before)
            updates.append(self._step(replay, n))
            linear = carried(updates[-1][0], before[MOMENTUM], self.gradient[n], self.theta[n])
            missed.append(after[MOMENTUM] - linear)
            momentum.append(before[MOMENTUM])
        return Replayed(updates, after, torch.stack(missed), torch.stack(momentum))

    def _realised(self) -> Iterator[dict[str, Tensor]]:
        """The accumulators before every step and after the last, (P,) each: torch's own, run again; where the store has
        them, those that it has."""
        trajectory, low = self.trajectory, self.trajectory.dtype
        rerun = trajectory.rerun(self.first)
        yield rerun.state(wide(low))
        for n in range(self.stop - self.first):
            rerun.step(self.hyper[n], self.gradient[n].to(low))
            rerun.put(self.theta[n + 1].to(low))  # the same, on the same kind of machine
            last = self.first + n + 1
            if trajectory.begins(last):
                rerun = trajectory.rerun(last)
            yield rerun.state(wide(low))

    def state_at(self, step: int) -> dict[str, Tensor]:
        """The accumulators before a step, (P,) each."""
        return next(islice(self._before_each(), step - self.first, None))

    @cached_property
    def states(self) -> list[dict[str, Tensor]]:
        """The accumulators before each step, (P,) each."""
        return list(islice(self._before_each(), self.stop - self.first))

    def _before_each(self) -> Iterator[dict[str, Tensor]]:
        if self.trajectory.rules.rounds:
            yield from self._realised()
            return
        replay = self._replay()
        for n in range(self.stop - self.first):
            yield replay.state
            self._step(replay, n)
        yield replay.state

    def _replay(self) -> Replay:
        return Replay(self.trajectory.rules, self.trajectory.layout, self.state)

    def _step(self, replay: Replay, n: int) -> tuple[Segments, Tensor]:
        return replay.step(self.hyper[n], self.gradient[n], self.theta[n], self.theta[n + 1])


def _widened(t: Tensor) -> Tensor:
    return t.to(wide(t.dtype))


class RecordedPass(NamedTuple):
    """One of the passes of a step. slots: which of the step's examples are its own; kind, rows (b,), shared: where its
    inputs stand; scale: from an example's gradient to its share, NaN where it has to be fitted; factor_scale: from its
    stored factors to it; random: the generators' state before the pass, or None."""

    slots: slice
    kind: int
    rows: np.ndarray
    shared: int
    scale: float
    factor_scale: float
    random: Tensor | None

    @property
    def size(self) -> int:
        return len(self.rows)

    def same_inputs(self, other: "RecordedPass") -> bool:
        return (self.kind, self.shared) == (other.kind, other.shared) and np.array_equal(self.rows, other.rows)


class RecordedStep(NamedTuple):
    """One of them. theta, examples (P,): before it, and what of its gradient is the examples'; ids (B,), as the store has
    them (`Run.numbers`); active: the parameters that had a gradient."""

    number: int
    theta: Tensor
    examples: Tensor
    ids: np.ndarray
    passes: tuple[RecordedPass, ...]
    active: frozenset[str]


@dataclass(frozen=True)
class Steps:
    """Consecutive steps of one block, a `RecordedStep` each.

    block: what they are part of. range: their numbers in the run.
    """

    block: Block
    range: range

    def __len__(self) -> int:
        return len(self.range)

    def __iter__(self) -> Iterator[RecordedStep]:
        return (self[n] for n in range(len(self)))

    def __getitem__(self, n: int) -> RecordedStep:
        number = self.range[n]
        at, facts = number - self.block.first, self.block.facts
        ids, rows = (facts[name][at] for name in ("index", "row"))
        on = self.block.hyper[at][:, -1]
        return RecordedStep(
            number=number,
            theta=self.block.theta[at],
            examples=self.block.examples[at],
            ids=ids[ids >= 0],
            passes=passes_of(self.block.passes, at, rows, facts.get("random")),
            active=frozenset(n for n, moves in zip(self.block.trajectory.layout.names, on, strict=True) if moves),
        )

    @property
    def start(self) -> int:
        return self.range.start

    @property
    def theta(self) -> Tensor:
        """(n + 1, P): the states from the first step's on."""
        return self.block.theta[self._at.start : self._at.stop + 1]

    @property
    def buffers(self) -> Tensor:
        """(n + 1, E): the floating buffers that training changes, from the first step on; E = 0 where there are none."""
        buffers = self.block.trajectory.buffers
        return buffers.vectors(self.start, self.range.stop) if buffers else torch.zeros(len(self) + 1, 0)

    @property
    def gradient(self) -> Tensor:
        """(n, P), as the optimizer saw it."""
        return self.block.gradient[self._at]

    @property
    def penalty(self) -> Tensor | None:
        """(n, P): what of the gradient was no example's; None where the loop had no penalty."""
        return None if self.block.penalty is None else self.block.penalty[self._at]

    @property
    def examples(self) -> Tensor:
        """(n, P): what of the gradient is the examples'."""
        return self.block.examples[self._at]

    @property
    def updates(self) -> Updates:
        """Of each step the frozen coefficients and the update that they give, (P,)."""
        return self.block.replayed.updates[self._at]

    @property
    def missed(self) -> Tensor | None:
        """(n, P): what the accumulator that is linear in the gradients is after each step beyond what the coefficients make
        of it; None for nothing."""
        missed = self.block.replayed.missed
        return None if missed is None else missed[self._at]

    @property
    def state(self) -> dict[str, Tensor]:
        """The accumulators before the first step, (P,) each: as stored where that begins a block, else as replayed."""
        begins = self.start == self.block.first and not self.block.trajectory.rules.rounds
        return self.block.state if begins else self.block.state_at(self.start)

    @property
    def momentum(self) -> Tensor:
        """(P,): the accumulator that is linear in the gradients, before the first step."""
        return self.state[MOMENTUM]

    def state_before(self, n: int) -> dict[str, Tensor]:
        """The accumulators before the n-th step, (P,) each."""
        return self.block.states[self._at.start + n]

    @property
    def state_after(self) -> dict[str, Tensor]:
        """The accumulators after the last step of the block, as replayed."""
        return self.block.replayed.state

    def bounds(self, n: int) -> tuple[Tensor | None, Tensor | None]:
        """On the n-th update, see `step_bounds`."""
        (segments, update), momentum = self.updates[n], self.block.replayed.momentum
        before = None if momentum is None else momentum[self._at][n]
        return step_bounds(
            self.block.trajectory.rules, segments, update, before, self.gradient[n], self.theta[n : n + 2]
        )

    @property
    def _at(self) -> slice:
        return slice(self.range.start - self.block.first, self.range.stop - self.block.first)


def passes_of(passes: Passes, n: int, rows: np.ndarray, random: np.ndarray | None) -> tuple[RecordedPass, ...]:
    """Those of the n-th of some steps. rows (B,): where its inputs stand; random: of these steps (n, M, bytes)."""
    states = [None] * passes.values.shape[1] if random is None else list(torch.from_numpy(random[n]))
    return tuple(
        RecordedPass(p.slots, p.kind, rows[p.slots], p.shared, p.scale, p.factor_scale, state)
        for p, state in zip(passes.of_step(n), states, strict=False)
    )


class Blocks:
    """The steps of a run below `stop`, a block at a time; the last `kept` that were read stay at hand."""

    def __init__(self, trajectory: Trajectory, stop: int, kept: int = 1) -> None:
        self._trajectory, self._stop, self._kept = trajectory, stop, kept
        self._known: dict[int, Block] = {}  # by first step, the last one read at the end

    def at(self, steps: range) -> Steps:
        """Consecutive steps of one block."""
        size = self._trajectory.block
        first = steps.start - steps.start % size
        if first not in self._known:
            following = self._known.get(first + size)
            after = None if following is None else following.before
            while len(self._known) >= self._kept:
                del self._known[next(iter(self._known))]
            self._known[first] = Block(self._trajectory, first, min(first + size, self._stop), after)
        return Steps(self._known[first], steps)

    def ranges(self, steps: range, length: int) -> list[range]:
        """The steps in pieces of at most `length` that lie in one block each, the last first: blocks are cut from behind."""
        size, found = self._trajectory.block, []
        for first in reversed(range(steps.start - steps.start % size, steps.stop, size)):
            low, high = max(first, steps.start), min(first + size, steps.stop)
            found += [range(max(low, stop - length), stop) for stop in range(high, low, -length)]
        return found
