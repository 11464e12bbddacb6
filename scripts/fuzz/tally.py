"""Trials of all kinds, in turn, and how often what came of what."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from random import Random
from typing import NamedTuple

GOOD = ("detected", "harmless", "right")


class Outcome(NamedTuple):
    """kind: what was done. verdict: what came of it. fault: what is wrong with that, empty where nothing is."""

    kind: str
    verdict: str
    fault: str = ""


Trial = Callable[[Random], Outcome]
Maker = Callable[[Path], Trial]  # in a folder of its own


@dataclass
class Tally:
    """counts: of each kind and verdict. faults: descriptions of all that should not be."""

    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    def note(self, outcome: Outcome) -> None:
        self.counts[outcome.kind, outcome.verdict] += 1
        if outcome.verdict not in GOOD:
            self.faults.append(f"{outcome.verdict}: {outcome.kind}: {outcome.fault}")

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(self.counts + other.counts, self.faults + other.faults)

    def __str__(self) -> str:
        """A kind a row, a verdict a column; the faults below."""
        kinds, verdicts = (sorted({key[n] for key in self.counts}) for n in (0, 1))
        width = max(map(len, (*kinds, "all")), default=0)
        rows = [("", verdicts), *((kind, [self.counts[kind, verdict] for verdict in verdicts]) for kind in kinds)]
        sums = [sum(self.counts[kind, verdict] for kind in kinds) for verdict in verdicts]
        lines = [
            name.ljust(width) + "".join(f"{value:>11}" for value in values) for name, values in [*rows, ("all", sums)]
        ]
        return "\n".join([*lines, *self.faults])


def campaign(makers: Sequence[Maker], count: int, seed: int, folder: Path) -> Tally:
    """So many trials, of each maker in turn; each is made, in an empty folder, when it is first wanted."""
    tally, rng = Tally(), Random(seed)
    order = rng.sample(makers, len(makers))

    @cache
    def made(n: int) -> Trial:
        (folder / str(n)).mkdir()
        return order[n](folder / str(n))

    for n in range(count):
        tally.note(made(n % len(order))(rng))
    return tally
