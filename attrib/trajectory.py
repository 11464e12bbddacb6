"""The states of a run: read where each is stored; between key frames, made again by the optimizer that made them.

With `states_every=k` a run holds every k-th state (and the optimizer's accumulators there) and all gradients. A state in
between is torch's own optimizer run on from the key frame before it, bit for bit; every key frame met on the way is
compared.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

import torch
from torch import Tensor

from .buffers import Buffers, with_buffers
from .errors import ReplayError, StoreError
from .layout import Layout
from .optim import Rerun, Rules, resume
from .store import Reader

KEPT = 16  # states between two key frames that are kept to run on from, at most

Start = tuple[Tensor, dict[str, Tensor]]  # theta (P,) and the accumulators, (P,) each


class Trajectory:
    """theta of every state 0 .. T, and the accumulators before the first step of every block."""

    def __init__(self, reader: Reader, rules: Rules, layout: Layout) -> None:
        self.reader, self.rules, self.layout = reader, rules, layout
        self.block, self._every = int(reader.header["block"]), int(reader.header["states_every"])
        self.buffers = Buffers.of(reader)
        self.dtype: torch.dtype = getattr(torch, reader.header["dtype"])
        self._frame = max(self.block, self._every)
        blocks = self._frame // self.block
        self._spacing = -(-blocks // KEPT) * self.block
        self._starts: dict[int, Start] = {}  # of one frame: the first step of a block -> what it starts from

    def state(self, step: int) -> Tensor:
        """(P,)."""
        if self._every == 1:
            return self._read("theta", step)
        if step < self.reader.steps:
            return self.states(step, step)[0]
        return self._read("theta", -(-step // self._every)) if self.reader.complete else self.states(step - 1, step)[1]

    def whole(self, step: int) -> Tensor:
        """(P + E,): what a measurement depends on, the parameters and the floating buffers that training changes."""
        return self._whole(self.state(step), step)

    def _whole(self, theta: Tensor, step: int) -> Tensor:
        return with_buffers(theta, self.buffers.vectors(step, step)[0]) if self.buffers else theta

    def states(self, first: int, stop: int, last: Tensor | None = None) -> Tensor:
        """(stop - first + 1, P). last: the state at `stop`, where it is known already."""
        if self._every == 1:
            if last is None:
                return self.reader.tensor("theta", slice(first, stop + 1))
            read = self.reader.tensor("theta", slice(first, stop), more=1)
            read[-1] = last
            return read
        begin = first - first % self.block
        start = self._start(begin)
        found = [start[0], *self._steps(self._rerun(begin, start), begin, stop)]
        return torch.stack(found[first - begin :])

    def each(self, states: Iterable[int]) -> Iterator[Tensor]:
        """`whole` of each, in ascending order. Those of a block stand in the same chunks, or are made in one go: they are
        had together."""
        for _, block in groupby(states, lambda step: min(step, self.reader.steps - 1) // self.block):
            first, *others = block
            if not others:
                yield self.whole(first)
                continue
            several = self.states(first, others[-1])
            yield from (self._whole(several[step - first], step) for step in (first, *others))

    def accumulators(self, first: int) -> dict[str, Tensor]:
        """Before the first step of a block, (P,) each."""
        if self._every == 1:
            return self._stored(first)
        return self._start(first)[1]

    def optimizer(self, step: int, parameters: Sequence[Tensor]) -> torch.optim.Optimizer:
        """Torch's optimizer over `parameters` as it was before a step, 0 .. T."""
        if self.rules.read_off:
            raise ReplayError(
                f'the optimizer cannot be had again: got a run of {self.rules} with rule="frozen", whose state is not '
                f"recorded, only what it did, at {self.reader.target}. Use the parameters alone: run.load."
            )
        begin = min(step, self.reader.steps - 1) // self.block * self.block
        rerun = self._rerun(begin, self._start(begin))
        for _ in self._steps(rerun, begin, step):
            pass
        hyper = self.reader.read("hyper", step) if step < self.reader.steps else rerun.hyper()
        return resume(self.rules, self.layout, parameters, rerun.state(), hyper)

    def stored(self, step: int) -> Tensor | None:
        """(P,): the state that a step started from, where it stands in the store as it is."""
        last = self.reader.steps if self._every == 1 else int(self.reader.header["written_steps"]) - 1
        return None if step % self._every or step > last else self._read("theta", step // self._every)

    def _start(self, first: int) -> Start:
        """Of a block, from the nearest state that is kept."""
        frame = first - first % self._frame
        if frame not in self._starts:
            self._starts = {frame: (self._read("theta", frame // self._every), self._stored(frame))}
        at = max(step for step in self._starts if step <= first)
        while at < first:
            rerun = self._rerun(at, self._starts[at])
            until = min(first, at + self._spacing)
            for _ in self._steps(rerun, at, until):
                pass
            start = self.layout.flatten(rerun.parameters), rerun.state()
            if (until - frame) % self._spacing:
                return start
            self._starts[until] = start
            at = until
        return self._starts[first]

    def rerun(self, first: int) -> Rerun:
        """Torch's optimizer over copies of the parameters, as it was before the first step of a block."""
        start = (self.state(first), self._stored(first)) if self._every == 1 else self._start(first)
        return self._rerun(first, start)

    def begins(self, step: int) -> bool:
        """Whether the accumulators before a step stand in the store."""
        return step < self.reader.steps and step % self._frame == 0

    def _rerun(self, first: int, start: Start) -> Rerun:
        hyper = self.reader.read("hyper", min(first, self.reader.steps - 1))
        return Rerun(self.rules, self.layout, *start, hyper)

    def _steps(self, rerun: Rerun, first: int, stop: int) -> Iterator[Tensor]:
        """The states after the steps first .. stop - 1."""
        for lo in range(first, stop, self.block):
            hi = min(lo + self.block, stop)
            hyper = self.reader.read("hyper", slice(lo, hi))
            gradient = self.reader.tensor("gradient", slice(lo, hi))
            for n in range(hi - lo):
                theta = rerun.step(hyper[n], gradient[n])
                self._compare(theta, lo + n + 1)
                yield theta

    def _compare(self, theta: Tensor, step: int) -> None:
        ends = self.reader.complete and step == self.reader.steps
        if (step % self._every or step == self.reader.steps) and not ends:
            return
        if not torch.equal(theta, self._read("theta", -(-step // self._every))):
            versions = self.reader.header["versions"]
            raise StoreError(
                f"the states between two key frames cannot be made again here: got other bits than the stored state, at "
                f"step {step} of {self.reader.target}. The run was recorded with torch {versions['torch']}, this is torch "
                f"{torch.__version__}: read it with that version on a machine of that kind, or record with states_every=1."
            )

    def _stored(self, step: int) -> dict[str, Tensor]:
        return {key: self._read(f"state/{key}", step // self._frame) for key in self.rules.state}

    def _read(self, name: str, row: int) -> Tensor:
        return self.reader.tensor(name, row)
