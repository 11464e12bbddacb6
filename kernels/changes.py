"""When a series changes: the change points of its mean, tested against shuffled noise, and the onset of a bend.

    r_i       rows of a segment of n, each column in units of its standard deviation
    gain(k) = k (n - k) / n |mean(r_1..k) - mean(r_k+1..n)|^2      what a split after k takes off the sum of squares
    p       = (1 + number of shuffles with max_k gain >= the observed one) / (1 + shuffles)

Segments first: binary segmentation, as long as a split takes off a share `worth` of all squares, and more than the best of T
splits of noise would. Then each change is tested between its neighbours, and the one with the largest p above `level` is
taken out, until none is left; what remains gets a bootstrap interval.

The noise baseline. Neighbouring rows of a training run are alike, so shuffling rows as they are would call noise a change.
What is left around the means of the segments is prewhitened, e_t = r_t - phi r_{t-1}, the e are shuffled (rows whole:
columns move together), and coloured again. phi is judged after the segments are taken off, as jumps and trends would
otherwise pass for persistence and hide every change; `persistence` corrects for what taking them off costs.

Exactness: series of AR(1) noise of T = 100 with a false alarm, in %, at level 0.01 (at 0.05), of 200 each:
    phi             0            0.3          0.5          0.7          0.9
    1 column        0.5 (2.5)    0.0 (4.5)    0.5 (4.5)    0.5 (4.0)    1.0 (7.5)
    3 columns       0.5 (3.5)    1.0 (5.0)    0.0 (3.0)    0.0 (2.0)    1.0 (5.5)
    6 columns       0.5 (2.0)    1.0 (2.0)    0.5 (4.0)    0.5 (1.0)    0.5 (1.0)

What it cannot do: a smooth bend is reported as steps, as many as are worth it. Only means are compared, a change of the
spread alone is not looked for. Each test is at the level by itself.

Source: Scott and Knott 1974 (binary segmentation of means); Matteson and James 2014 (hierarchical division with a
permutation test); Davison and Hinkley 1997, 8.2 (resampling prewhitened noise); Bai 1997 (locating again between
neighbours).
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np

LARGEST_PHI = 0.95
CHUNK = 2**19  # numbers of a batch of surrogate series


class Change(NamedTuple):
    """row: the first after the change. low, high: interval of `row`. p_value: of the test that accepted it. explained:
    share of the sum of squares between its neighbouring changes that the split takes away."""

    row: int
    low: int
    high: int
    p_value: float
    explained: float


class Found(NamedTuple):
    """changes: in order. refused: the smallest p value of a split that was not accepted; nan where there was none."""

    changes: tuple[Change, ...]
    refused: float


def onset(values: np.ndarray, width: int) -> int:
    """Where a curve bends up the most: the first t that maximises [f(t + D) - f(t)] - [f(t) - f(t - D)].

    Args:
        values: (T,), in any unit.
        width: D, in entries; D <= t < T - D.

    Raises:
        ValueError: fewer than 2 D + 1 values, D below 1, or values that are not finite.

    >>> onset(np.array([0.0, 0.0, 0.0, 0.0, 1.0, 2.0, 3.0]), 2)
    3
    """
    values = np.asarray(values, float)
    if values.ndim != 1 or width < 1 or len(values) < 2 * width + 1:
        raise ValueError(
            f"the curve is too short for the width: got shape {values.shape} and width {width}, expected (T,) with "
            f"T >= 2 * width + 1 and width >= 1. Choose a smaller width."
        )
    _check_finite(values[:, None])
    middle = values[width : len(values) - width]
    return width + int(np.argmax((values[2 * width :] - middle) - (middle - values[: -2 * width])))


def find_changes(
    series: np.ndarray,
    *,
    worth: float = 0.05,
    permutations: int = 999,
    level: float = 0.01,
    smallest: int = 5,
    interval: float = 0.9,
    seed: int = 0,
) -> Found:
    """Change points of the means of a series, each with a p value and an interval; nothing where the noise explains all.

    Args:
        series: (T, G), finite, in any units; columns are weighed alike, constant ones not at all.
        worth: share of the sum of squares of the whole series that a split takes off at least.
        permutations: shuffles per test, and draws per interval; p values are multiples of 1 / (1 + permutations).
        level: a split is accepted at p <= level.
        smallest: rows a segment has at least.
        interval: share of the draws between `low` and `high`.
        seed: of `np.random.default_rng`; the same seed gives the same answer.

    Raises:
        ValueError: no (T, G), T < 2 * smallest, entries that are not finite, or options out of range.

    >>> noise = np.random.default_rng(0).normal(size=(60, 2))
    >>> noise[35:] += 3
    >>> [change.row for change in find_changes(noise, permutations=199).changes]
    [35]
    """
    series = np.asarray(series, float)
    _check(series, worth, permutations, level, smallest, interval)
    scaled, random = _scaled(series), np.random.default_rng(seed)
    cuts = _divided(scaled, worth, smallest)
    refused: list[float] = []
    while True:
        cuts = _located_again(scaled, cuts, smallest)
        phi = persistence(scaled - _means(scaled, cuts), len(cuts) + 1)
        tests = [Test(scaled, left, cut, right, phi, smallest) for left, cut, right in _triples(cuts, len(scaled))]
        p_values = [test.p_value(permutations, random) for test in tests]
        if not tests or max(p_values) <= level:
            break
        refused.append(max(p_values))
        del cuts[int(np.argmax(p_values))]
    changes = []
    for test, p_value in zip(tests, p_values, strict=True):
        low, high = test.interval(permutations, interval, random)
        changes.append(Change(test.cut, low, high, p_value, test.explained))
    return Found(tuple(changes), min(refused, default=float("nan")))


class Test:
    """One split of the rows left .. right - 1 before `cut`, and the noise around the means of both sides."""

    def __init__(self, series: np.ndarray, left: int, cut: int, right: int, phi: np.ndarray, smallest: int) -> None:
        self.left, self.cut, self.phi, self.smallest = left, cut, phi, smallest
        self.rows = series[left:right]
        self.step = _means(self.rows, [cut - left])
        self.innovations = _innovations(self.rows - self.step, phi)
        self.gain = float(gains(self.rows, smallest).max())

    @property
    def explained(self) -> float:
        return self.gain / max(float(((self.rows - self.rows.mean(0)) ** 2).sum()), 1e-300)

    def p_value(self, permutations: int, random: np.random.Generator) -> float:
        if self.gain < 1e-18:  # constant rows: what is left is rounding
            return 1.0
        reached = 0
        for count in _batches(permutations, self.rows.size):
            orders = np.argsort(random.random((count, len(self.rows))), axis=1)
            noise = _coloured(self.innovations[orders], self.phi)
            reached += int((gains(noise, self.smallest).max(-1) >= self.gain * (1 - 1e-9)).sum())
        return (1 + reached) / (1 + permutations)

    def interval(self, draws: int, share: float, random: np.random.Generator) -> tuple[int, int]:
        """Where the split is found again when the noise of both sides is drawn anew, each side from its own."""
        cut, n = self.cut - self.left, len(self.rows)
        found = []
        for count in _batches(draws, self.rows.size):
            drawn = [random.integers(0, cut, (count, cut)), random.integers(cut, n, (count, n - cut))]
            series = self.step + _coloured(self.innovations[np.concatenate(drawn, axis=1)], self.phi)
            found.append(self.smallest + gains(series, self.smallest).argmax(-1))
        tail, everything = (1 - share) / 2, np.concatenate(found)
        low = int(np.quantile(everything, tail, method="lower"))
        high = int(np.quantile(everything, 1 - tail, method="higher"))
        return self.left + min(low, cut), self.left + max(high, cut)


def gains(rows: np.ndarray, smallest: int) -> np.ndarray:
    """(..., n, G) -> (..., n - 2 smallest + 1): what splits after smallest, ..., n - smallest rows take off the sum of
    squares, k (n - k) / n |mean1 - mean2|^2."""
    n = rows.shape[-2]
    first = np.arange(smallest, n - smallest + 1)
    sums = np.cumsum(rows - rows.mean(-2, keepdims=True), axis=-2)[..., smallest - 1 : n - smallest, :]
    squares: np.ndarray = np.einsum("...kg,...kg->...k", sums, sums)
    squares *= n / (first * (n - first))
    return squares


def persistence(residual: np.ndarray, segments: int) -> np.ndarray:
    """(T, G) -> (G,): lag-one autocorrelation of what is left around the means of so many segments, on the safe side; in
    [0, 0.95].

    Each mean that is taken off lowers it by (1 + 3 phi) / T in expectation (Kendall 1954), which is added again, and 2 / G
    standard errors with it: too small a phi means false alarms, the more so the fewer columns have a say.
    """
    (rows, columns), squares = residual.shape, (residual**2).sum(0)
    varies = squares > 1e-24 * rows  # less is rounding: nothing persists
    found = (residual[1:] * residual[:-1]).sum(0) / np.where(varies, squares, 1.0)
    phi = np.clip((found + segments / rows) / max(1 - 3 * segments / rows, 0.1), 0.0, 1.0)
    return np.where(varies, np.minimum(phi + 2 / columns * np.sqrt((1 - phi**2) / rows), LARGEST_PHI), 0.0)


def _scaled(series: np.ndarray) -> np.ndarray:
    centred = series - series.mean(0)
    spread = centred.std(0)
    varies = spread > 1e-12 * np.abs(series).max(0)
    return np.where(varies, centred / np.where(varies, spread, 1.0), 0.0)


def _divided(series: np.ndarray, worth: float, smallest: int) -> list[int]:
    """Cuts, by the largest gain, as long as they are worth it, and more than the best of T splits of noise takes off:
    (G + 1) log T of its variance (Schwarz 1978). The best in any case."""
    rows, columns = series.shape
    least = max(worth * float((series**2).sum()), (columns + 1) * np.log(rows))
    cuts: list[int] = []
    while True:
        best = [
            (float(found.max()), left + smallest + int(found.argmax()))
            for left, right in pairwise([0, *sorted(cuts), len(series)])
            if right - left >= 2 * smallest
            for found in [gains(series[left:right], smallest)]
        ]
        if not best or (cuts and max(best)[0] < least):
            return sorted(cuts)
        cuts.append(max(best)[1])


def _located_again(series: np.ndarray, cuts: list[int], smallest: int) -> list[int]:
    """Each cut at the best split between its neighbours: the first ones were found without the later ones."""
    bounds = [0, *cuts, len(series)]
    for n in range(1, len(bounds) - 1):
        left, right = bounds[n - 1], bounds[n + 1]
        bounds[n] = left + smallest + int(np.argmax(gains(series[left:right], smallest)))
    return bounds[1:-1]


def _triples(cuts: list[int], rows: int) -> Iterator[tuple[int, int, int]]:
    bounds = [0, *cuts, rows]
    return zip(bounds, bounds[1:], bounds[2:], strict=False)


def _means(series: np.ndarray, cuts: list[int]) -> np.ndarray:
    """Of each row, the mean of its segment."""
    parts = [series[a:b] for a, b in pairwise([0, *cuts, len(series)])]
    return np.concatenate([np.broadcast_to(part.mean(0), part.shape) for part in parts])


def _innovations(rows: np.ndarray, phi: np.ndarray) -> np.ndarray:
    """e_t = r_t - phi r_{t-1}; the first row is scaled to the variance of the others."""
    return np.concatenate([rows[:1] * np.sqrt(1 - phi**2), rows[1:] - phi * rows[:-1]])


def _coloured(innovations: np.ndarray, phi: np.ndarray) -> np.ndarray:
    """(N, n, G) -> (N, n, G): the inverse of `_innovations`, in place."""
    series = innovations
    series[:, 0] /= np.sqrt(1 - phi**2)
    if phi.any():
        for t in range(1, series.shape[1]):
            series[:, t] += phi * series[:, t - 1]
    return series


def _batches(count: int, size: int) -> list[int]:
    most = max(1, CHUNK // size)
    return [min(most, count - done) for done in range(0, count, most)]


def _check_finite(series: np.ndarray) -> None:
    if not np.isfinite(series).all():
        row, column = np.argwhere(~np.isfinite(series))[0]
        raise ValueError(
            f"the series is not finite: got {series[row, column]}, expected numbers, at row {row}, column {column}. "
            f"Choose a window of the run without them."
        )


def _check(series: np.ndarray, worth: float, permutations: int, level: float, smallest: int, interval: float) -> None:
    if series.ndim != 2 or series.shape[1] < 1 or smallest < 1 or len(series) < max(3, 2 * smallest):
        raise ValueError(
            f"the series is too short: got shape {series.shape}, expected (T, G) with T >= {max(3, 2 * smallest)}, for "
            f"two segments of smallest={smallest} rows. Give more rows."
        )
    for name, value, fits, wanted in (
        ("permutations", permutations, permutations >= 1, "at least 1"),
        ("level", level, 0 < level < 1, "between 0 and 1"),
        ("interval", interval, 0 < interval < 1, "between 0 and 1"),
        ("worth", worth, 0 <= worth < 1, "0 to 1"),
    ):
        if not fits:
            raise ValueError(f"{name} is out of range: got {value}, expected {wanted}. Change {name}=.")
    _check_finite(series)
