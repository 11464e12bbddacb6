"""Speed-ups compared: with what was not reached in the steps given, and what those steps leave undecided."""

from collections.abc import Sequence

import numpy as np

from ..verdicts import span
from .tables import Tables

LEAST = 1.1  # a speed-up, for the one of two to be called faster


def times(speeds: Sequence[float] | np.ndarray) -> str:
    """Speed-ups: what was not reached is slower than all others."""
    return span(speeds, 1, -np.inf)


def speeds_of(t: Tables, condition: str) -> np.ndarray:
    return np.array([t.speed_up(run, 0.0, trial)[0] for run, trial in t.trials(condition)])


Cell = tuple[str, float, float]  # layers, taken from, put into


def cells_of(t: Tables) -> list[Cell]:
    s = t.setting
    return [(name, i, j) for name in s.sets for i in s.sources for j in s.targets if j < i]


def at(key: Cell) -> dict[str, object]:
    return dict(zip(("layers", "taken from", "put into"), key, strict=True))


def gain(t: Tables, key: Cell) -> bool | None:
    """Whether the median speed-up is a tenth or more; None where the steps given do not tell."""
    cell = t.reinsertions.sel(at(key))
    low, high = (cell["speed_up"].fillna(end).median("seed") for end in (0.0, cell["bound"]))
    return True if low > LEAST else False if high <= LEAST else None


def counted(gains: Sequence[bool | None]) -> list[str]:
    counts = {
        "gain": gains.count(True),
        "do not": gains.count(False),
        "undecided, given too few steps": gains.count(None),
    }
    return [f"{n} {name}" for name, n in counts.items() if n or name == "gain"]


def ends(t: Tables) -> tuple[Cell, Cell]:
    """Best and worst; not reached is worse than any."""
    cells = cells_of(t)
    values = [float(t.reinsertions["speed_up"].sel(at(key)).fillna(-1.0).median()) for key in cells]
    return cells[int(np.argmax(values))], cells[int(np.argmin(values))]


def told(key: Cell, t: Tables) -> str:
    name, source, target = key
    return f"{name} from {source:g} into {target:g}, {times(t.reinsertions['speed_up'].sel(at(key)).values)}"


def beats(t: Tables, own: str, other: str, targets: Sequence[float]) -> np.ndarray:
    """(target, seed): 1 where the one is faster than the other by a tenth or more, 0 where not, NaN where there was no
    trial or too few steps to tell."""
    found = [t.controls.sel(condition=name).sel({"put into": list(targets)}) for name in (own, other)]
    low = [f["speed_up"].fillna(0.0).values for f in found]
    high = [f["speed_up"].fillna(f["bound"]).values for f in found]
    answer = np.where(low[0] > LEAST * high[1], 1.0, np.where(high[0] <= LEAST * low[1], 0.0, np.nan))
    return np.where(np.isnan(high[0]) | np.isnan(high[1]), np.nan, answer)


def by_seed(answers: Sequence[np.ndarray]) -> list[bool]:
    """Of each seed, whether most of its decided comparisons are won; (target, seed) each."""
    columns = np.concatenate(answers).T
    return [bool(np.nanmean(c) > 0.5) for c in columns if not np.isnan(c).all()]
