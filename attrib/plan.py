"""What a question will take, said before it is asked: disk, memory, time.

Accounting, an influence, or a difference: the latter two carry sensitivities to the parameters and the accumulators, and
multiply them with the curvature of every batch; a difference reads two runs.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil

import numpy as np
import torch

from .budget import Budget, Sizes, divide
from .layout import group_tensors
from .marginals import bytes_of, choose
from .optim import check_adjoints
from .run import Run

QUESTIONS = ("accounting", "influence", "difference")
OVERHEAD = 1e-3  # seconds a step that do not depend on the size of the model
PRODUCTS = 8  # vectors per query at work: V and H V in two types, what they are made of and summed into
SPREAD = 2  # measured 1.2 and 1.7 times of what is held, with glibc's allocator
PASSES = 1.5  # a step attributed for few queries, in the time of a step trained
CURVED = 3.5, 2.4  # a step of a counterfactual question beside that, for all queries and for each: in that time,
ENTRIES = 30, 35  # and operations on every parameter, float64
ALONG = 1.5  # the derivative of a batch's losses along a direction, or the gradient of one of them, in that time


@dataclass(frozen=True)
class Plan:
    """What a question will take, printed as a table. Made by `attrib.plan`.

    Args:
        steps, queries: T and Q.
        disk, disk_per_step: bytes of the store, and of a step.
        sweeps, at_once: times that the run is gone through, and the queries of each.
        peak: bytes in memory, beside the process as it stands.
        training, seconds: what the run took and what the answer should take here, within a factor of about two; NaN where
            the run does not say.
        buffers: bytes a step, before compression, of those that training changes.
        shares: what a share is in the run.
        groups: G.
        passes: what shares by example take beyond the usual at each step, where the losses of its batch depend on each
            other: one per query and group, or one per example where that is fewer; 0 where they do not.
        along: the seconds of these passes, part of `seconds` where shares are by example.
        question: that is asked.

    Example:
        >>> plan = attrib.plan(run, queries=100)
        >>> plan.steps, plan.sweeps, plan.at_once
        (12, 1, 100)
    """

    steps: int
    queries: int
    disk: int
    disk_per_step: float
    sweeps: int
    at_once: int
    peak: int
    training: float
    seconds: float
    buffers: int = 0
    shares: str = "example"
    groups: int = 0
    passes: int = 0
    along: float = 0.0
    question: str = "accounting"

    def __str__(self) -> str:
        lines = [
            f"question         {self.question}",
            f"steps            {self.steps}",
            f"disk             {_size(self.disk)}, {_size(self.disk_per_step)} a step",
            *([f"of that buffers  {_size(self.buffers)} a step, before compression"] if self.buffers else []),
            f"queries          {self.queries}" + (f", in {self.sweeps} sweeps" if self.sweeps > 1 else ""),
            f"peak memory      {_size(self.peak)}, beside Python, torch and the model",
        ]
        if not np.isnan(self.seconds):
            lines.append(f"training took    {self.training:.3g} s")
            lines.append(f"expected time    {self.seconds:.3g} s on this machine, within a factor of about two")
        return "\n".join([*lines, *self._definitions()])

    def _definitions(self) -> list[str]:
        """What shares cost by either definition where losses depend on each other, that of the run first."""
        if not self.passes:
            return []
        usual = self.seconds - (self.along if self.shares == "example" else 0.0)
        example, rows = ("" if np.isnan(s) else f", {s:.3g} s" for s in (usual + self.along, usual))
        costs = {
            "example": f"{self.passes} passes more a step: its losses depend on each other{example}; fewer with groups=",
            "rows": f"none more, for all queries and groups{rows}",
        }
        order = sorted(costs, key=lambda name: name != self.shares)
        return [f"shares by {name}".ljust(19) + costs[name] for name in order]


def plan(
    run: Run,
    queries: int = 1,
    memory: int | None = None,
    groups: Mapping[str, Sequence[str]] | None = None,
    question: str = "accounting",
) -> Plan:
    """What a question will take for so many queries over the whole run, with the default `keep`.

    Args:
        run: from `attrib.open_run`.
        queries: Q.
        memory, groups: as for `attrib.attribute`.
        question: "accounting", `attrib.attribute`; "influence"; or "difference", of the run and another like it.

    Returns:
        A `Plan`: bytes on disk and in memory, seconds on this machine, sweeps through the run.

    Raises:
        ValueError: `queries` is no count, there is no such question, or the memory does not hold one query.
        ReplayError: an optimizer whose derivative was not derived, for an influence or a difference.

    Example:
        >>> attrib.plan(run, queries=100).sweeps
        1
    """
    if question not in QUESTIONS:
        raise ValueError(f"unknown question: got {question!r}, expected one of {', '.join(map(repr, QUESTIONS))}.")
    if question != "accounting":
        check_adjoints(run.rules)
    if not isinstance(queries, int) or queries < 1:
        raise ValueError(f"queries is not a count: got {queries!r}, expected an integer of at least 1.")
    count = len(group_tensors(run.layout.names, groups)[0])
    lengths = {"step": run.steps, "example": len(run.numbers), "group": count}
    kept = bytes_of(choose(None, queries, lengths), queries, lengths)
    found = divide(sizes_of(run, kept, question), queries, memory)
    known = run.log("seconds")
    known = known[~np.isnan(known)]
    training = run.steps * float(np.median(known)) if len(known) else float("nan")
    disk = run.reader.nbytes_stored()
    coupled = run.capture == "replay" and run.header["settled"].get("coupled", False)
    passes = min(queries * count, int(run.header["slots"])) if coupled else 0
    along = ALONG * passes * training if passes else 0.0
    return Plan(
        steps=run.steps,
        queries=queries,
        disk=disk,
        disk_per_step=disk / run.steps,
        sweeps=ceil(queries / found.at_once),
        at_once=found.at_once,
        peak=found.peak,
        training=training,
        seconds=_expected(run, queries, found, training, question) + (along if run.definition == "example" else 0.0),
        buffers=run.trajectory.buffers.nbytes,
        shares=run.definition,
        groups=count,
        passes=passes,
        along=along,
        question=question,
    )


def sizes_of(run: Run, kept: int, question: str = "accounting") -> Sizes:
    """Of a question about a run; of a difference, of the run and another like it."""
    carried = 1 + len(run.rules.state)
    return Sizes(
        parameters=run.layout.size,
        tensors=len(run.groups),
        itemsize=run.compute.itemsize,
        batch=int(run.header["slots"]),
        block=int(run.header["block"]),
        accumulators=len(run.rules.state),
        kept=kept,
        vectors=4 if question == "accounting" else 2 * carried + PRODUCTS,
        sides=2 if question == "difference" else 1,
        spread=1 if question == "accounting" else SPREAD,
    )


def _expected(run: Run, queries: int, budget: Budget, training: float, question: str) -> float:
    """A training step's time for every sweep, and the products of every query with every example's gradient; of a
    counterfactual question, those with the curvature, and what the optimizer is pulled back by, entry by entry."""
    sweeps = ceil(queries / budget.at_once)
    if question != "accounting":
        entries, sides = run.steps * run.layout.size * _each(), 2 if question == "difference" else 1
        once = CURVED[0] * training + sides * ENTRIES[0] * entries
        return sweeps * once + queries * (CURVED[1] * training + ENTRIES[1] * entries)
    products = 2.0 * queries * int(run.header["slots"]) * run.layout.size / _speed(run.compute)
    return sweeps * (PASSES * training + OVERHEAD * run.steps) + run.steps * products


def _each() -> float:
    """Seconds that an operation entry by entry takes for each of float64, here and now."""
    a, best = torch.ones(1 << 20, dtype=torch.float64), float("inf")
    for _ in range(4):
        start = time.perf_counter()
        a * a
        best = min(best, time.perf_counter() - start)
    return best / len(a)


def _speed(dtype: torch.dtype) -> float:
    """Floating point operations a second of a matrix product, here and now."""
    a = torch.ones(768, 768, dtype=dtype)
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - start)
    return 2.0 * 768**3 / best


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"
