"""Change points: found where planted, not where there is only noise, and dated as well as they say."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from attrib.kernels import changes as kernel
from cases import OPTIMIZERS
from hypothesis import given
from hypothesis import strategies as st
from training import train

from attrib.phases import onset, phases


def noise(random: np.random.Generator, rows: int, columns: int, phi: float = 0.0) -> np.ndarray:
    """Stationary AR(1) of unit innovations, (rows, columns)."""
    series = random.standard_normal((rows, columns))
    series[0] /= np.sqrt(1 - phi**2)
    for t in range(1, rows):
        series[t] += phi * series[t - 1]
    return series


def planted(random: np.random.Generator, scale: float = 1.0) -> np.ndarray:
    """(100, 3): all columns change at 30, two of them at 65."""
    series = scale * noise(random, 100, 3)
    series[30:] += [3.0, -2.0, 2.5]
    series[65:, :2] += [-3.0, 4.0]
    return series


def timeline(values: np.ndarray, first: int = 0) -> xr.DataArray:
    steps, groups = values.shape
    labels = {"update_step": np.arange(first, first + steps), "group": [f"layer <{g}>" for g in range(groups)]}
    return xr.DataArray(values, labels, ("update_step", "group"))


def slow_best_split(rows: np.ndarray, smallest: int) -> tuple[int, float]:
    """By the definition: the split that leaves the least sum of squares within, and what it takes off."""

    def squares(part: np.ndarray) -> float:
        return float(((part - part.mean(0)) ** 2).sum())

    cuts = range(smallest, len(rows) - smallest + 1)
    taken = {cut: squares(rows) - squares(rows[:cut]) - squares(rows[cut:]) for cut in cuts}
    best = max(taken, key=taken.__getitem__)
    return best, taken[best]


@given(seed=st.integers(0, 10**6), n=st.integers(6, 30), columns=st.integers(1, 4), smallest=st.integers(1, 3))
def test_the_gain_of_a_split_is_what_it_takes_off_the_sum_of_squares(
    seed: int, n: int, columns: int, smallest: int
) -> None:
    rows = np.random.default_rng(seed).normal(5, 1, (n, columns))
    cut, taken = slow_best_split(rows, smallest)
    got = kernel.gains(rows, smallest)
    assert len(got) == n - 2 * smallest + 1
    assert smallest + int(got.argmax()) == cut
    assert got.max() == pytest.approx(taken, rel=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_planted_changes_are_found_where_they_are_and_no_others(seed: int) -> None:
    found = kernel.find_changes(planted(np.random.default_rng(seed)), permutations=199, seed=seed)
    assert [c.row for c in found.changes] == pytest.approx([30, 65], abs=1)  # steps of 3 to 5 sigma
    assert all(c.p_value == 1 / 200 for c in found.changes)  # no shuffle of 199 comes near
    assert np.isnan(found.refused)  # no other was worth a test


def test_steps_without_noise_are_found_exactly() -> None:
    found = kernel.find_changes(planted(np.random.default_rng(0), scale=0.0), permutations=199)
    assert [(c.row, c.low, c.high) for c in found.changes] == [(30, 30, 30), (65, 65, 65)]
    assert [c.explained for c in found.changes] == pytest.approx([1.0, 1.0])
    assert np.isnan(found.refused)


def test_what_a_change_explains_is_its_share_of_the_squares_between_its_neighbours() -> None:
    series = planted(np.random.default_rng(3))
    first, second = kernel.find_changes(series, permutations=199).changes
    scaled = (series - series.mean(0)) / series.std(0)
    for change, rows, left in ((first, scaled[: second.row], 0), (second, scaled[first.row :], first.row)):
        cut, taken = slow_best_split(rows, 5)
        assert change.row == left + cut
        assert change.explained == pytest.approx(taken / ((rows - rows.mean(0)) ** 2).sum())


# false alarms in 200 series are binomial: at most level + 3 sqrt(level (1 - level) / 200) = 0.096 of them at level 0.05
# each is 200 series of 99 shuffles: fast are one without persistence and one with
@pytest.mark.parametrize(
    ("columns", "phi"),
    [(1, 0.0), (4, 0.5)] + [pytest.param(*c, marks=pytest.mark.slow) for c in ((1, 0.3), (1, 0.5), (4, 0.0), (4, 0.7))],
)
def test_noise_gives_no_more_false_alarms_than_the_level(columns: int, phi: float) -> None:
    random, level, series = np.random.default_rng(1), 0.05, 200
    alarms = sum(
        bool(kernel.find_changes(noise(random, 100, columns, phi), permutations=99, level=level, seed=n).changes)
        for n in range(series)
    )
    assert alarms / series <= level + 3 * np.sqrt(level * (1 - level) / series)


def test_shuffling_alone_would_call_persistent_noise_a_change(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(1)
    monkeypatch.setattr(kernel, "persistence", lambda residual, segments: np.zeros(residual.shape[1]))
    found = [kernel.find_changes(noise(random, 100, 4, 0.5), permutations=99, level=0.05) for _ in range(40)]
    assert sum(bool(f.changes) for f in found) >= 20  # the control of the test above


@pytest.mark.parametrize("phi", [0.0, 0.3, 0.6])
def test_persistence_is_that_of_the_noise_around_the_means(phi: float) -> None:
    """Over many short series, each with the means of five segments taken off, on the safe side by 2 / G standard errors."""
    random, rows, columns = np.random.default_rng(0), 100, 400
    series = noise(random, rows, columns, phi) + 12.0 * (np.arange(rows)[:, None] // 20 % 2)
    residual = series - kernel._means(series, [20, 40, 60, 80])
    found = kernel.persistence(residual, 5).mean()
    # clipping at 0 lifts the mean where phi is 0, by half of E |N(0, 1 / T)|; the correction is of first order in 5 / T
    assert found == pytest.approx(phi + (phi == 0) * 0.4 / np.sqrt(rows), abs=0.05)
    assert kernel.persistence(residual[:, :1], 5)[0] > kernel.persistence(residual[:, :2], 5)[0] > 0


def test_splits_that_are_not_worth_it_are_not_made() -> None:
    series = planted(np.random.default_rng(0))
    first, second = kernel.find_changes(series, permutations=199).changes
    (only,) = kernel.find_changes(series, permutations=199, worth=0.45).changes
    assert min(abs(only.row - first.row), abs(only.row - second.row)) <= 1


def test_p_values_do_not_depend_on_how_many_shuffles_are_made_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    series = noise(np.random.default_rng(3), 40, 2)
    whole = kernel.find_changes(series, permutations=400).refused
    monkeypatch.setattr(kernel, "CHUNK", 1000)  # 12 series of 40 x 2
    # other shuffles: the difference of two p values has a standard deviation of sqrt(2 p (1 - p) / 400) <= 0.036
    assert kernel.find_changes(series, permutations=400).refused == pytest.approx(whole, abs=4 * 0.036)
    assert kernel._batches(400, 80) == [12] * 33 + [4]


def test_changes_are_located_again_between_their_neighbours() -> None:
    series = planted(np.random.default_rng(0), scale=0.0)
    assert kernel._located_again(series, [27, 66], 5) == [30, 65]


@given(scale=st.floats(1e-3, 1e3), sign=st.sampled_from([-1, 1]), shift=st.floats(-1e3, 1e3), column=st.integers(0, 2))
def test_units_and_level_of_a_column_do_not_matter(scale: float, sign: int, shift: float, column: int) -> None:
    series = planted(np.random.default_rng(2))
    want = kernel.find_changes(series, permutations=99)
    series[:, column] = sign * scale * series[:, column] + shift
    got = kernel.find_changes(series, permutations=99)
    assert [c[:4] for c in got.changes] == [c[:4] for c in want.changes]


def test_constant_columns_do_not_matter() -> None:
    series = planted(np.random.default_rng(2))
    constant = np.full((100, 2), 0.1)
    constant[40:] = np.nextafter(0.1, 1)  # but for rounding
    wider = np.concatenate([series, constant], axis=1)
    got, want = (kernel.find_changes(s, permutations=99) for s in (wider, series))
    assert [c[:4] for c in got.changes] == [c[:4] for c in want.changes]
    assert [c.explained for c in got.changes] == pytest.approx([c.explained for c in want.changes])
    assert kernel.find_changes(constant, permutations=99) == ((), 1.0)


@pytest.mark.parametrize(("phi", "size", "at"), [(0.0, 2.0, 20), (0.0, 1.5, 50), (0.5, 4.0, 50)])
def test_nine_intervals_of_ten_hold_the_planted_change(phi: float, size: float, at: int) -> None:
    random, held, found = np.random.default_rng(4), 0, 0
    for n in range(60):
        series = noise(random, 100, 1, phi)
        series[at:] += size
        changes = kernel.find_changes(series, permutations=99, level=0.02, seed=n).changes
        if len(changes) == 1:
            found += 1
            held += changes[0].low <= at <= changes[0].high
            assert changes[0].low <= changes[0].row <= changes[0].high
    assert found >= 30
    assert held / found >= 0.9 - 2 * np.sqrt(0.9 * 0.1 / found)  # binomial, 2 standard deviations below


def test_an_interval_is_wider_where_a_change_is_weaker() -> None:
    widths = []
    for size in (1.5, 5.0):
        series = noise(np.random.default_rng(6), 100, 1)
        series[50:] += size
        (change,) = kernel.find_changes(series, permutations=199).changes
        widths.append(change.high - change.low)
    assert widths[0] > widths[1] + 2


def test_an_interval_holds_the_share_that_was_asked_for() -> None:
    series = noise(np.random.default_rng(6), 100, 1)
    series[50:] += 1.5
    narrow, usual, wide = (kernel.find_changes(series, interval=share).changes[0] for share in (0.5, 0.9, 0.999))
    assert narrow.high - narrow.low < usual.high - usual.low < wide.high - wide.low


def test_the_noise_of_an_interval_is_that_of_each_side() -> None:
    series = noise(np.random.default_rng(0), 100, 1)
    series[:50] *= 0.01
    series[50:] += 1.5
    (change,) = kernel.find_changes(series, permutations=199).changes
    assert change.row - change.low <= 1  # nothing before the change looks like what comes after
    assert change.high - change.row >= 2


def test_colouring_undoes_prewhitening() -> None:
    rows, phi = noise(np.random.default_rng(0), 30, 3), np.array([0.0, 0.4, 0.9])
    again = kernel._coloured(kernel._innovations(rows, phi)[None], phi)[0]
    np.testing.assert_allclose(again, rows, rtol=1e-12, atol=1e-12)


@given(seed=st.integers(0, 10**6), width=st.integers(1, 6), extra=st.integers(1, 20))
def test_the_onset_is_the_first_largest_bend(seed: int, width: int, extra: int) -> None:
    values = np.random.default_rng(seed).integers(0, 4, 2 * width + extra).astype(float)
    best, where = -np.inf, -1
    for t in range(width, len(values) - width):
        bend = (values[t + width] - values[t]) - (values[t] - values[t - width])
        if bend > best:
            best, where = bend, t
    assert kernel.onset(values, width) == where
    assert onset(values, width, steps=range(100, 100 + len(values))) == 100 + where
    labelled = xr.DataArray(values, {"state": 7 * np.arange(len(values))}, ("state",))
    assert onset(labelled, width) == 7 * where


def test_the_onset_looks_a_twentieth_of_the_curve_ahead() -> None:
    curve = np.clip(np.arange(200.0) - 120, 0, 15)  # a rise that ends: with more width its end counts too
    assert onset(curve) == onset(curve, 10) == 120
    assert onset(curve, 40) == 95


def test_phases_are_dated_in_steps_and_sum_to_the_whole() -> None:
    random = np.random.default_rng(0)
    values = 0.5 * np.repeat(planted(random), 7, axis=0)[:-3]  # bins of 7 steps, the last one shorter
    found = phases(timeline(values, first=1000), permutations=199)
    kept = kernel.find_changes(planted(np.random.default_rng(0)), permutations=199).changes
    assert [c.step for c in found.changes] == [1000 + 7 * c.row for c in kept]
    assert found.bounds == (1000, *(c.step for c in found.changes), 1696)
    assert list(found.sums.index) == [
        (1000, found.bounds[1] - 1),
        (found.bounds[1], found.bounds[2] - 1),
        (found.bounds[2], 1696),
    ]
    borders = [b - 1000 for b in found.bounds[:-1]] + [697]
    want = [values[a:b].sum(0) for a, b in pairwise(borders)]
    np.testing.assert_allclose(found.sums.to_numpy(), want, rtol=1e-12)


def test_a_shorter_last_bin_is_no_change() -> None:
    values = 5 + 0.1 * noise(np.random.default_rng(1), 991, 2)  # 99 bins of 10 and one of a single step
    values[500:] += 0.2
    (change,) = phases(timeline(values), permutations=199).changes
    assert change.step == 500
    assert change.explained > 0.7  # 0.9 by its size; a last bin of a tenth of the sum would leave 0.02


def test_the_order_of_dimensions_does_not_matter() -> None:
    values = timeline(planted(np.random.default_rng(0)))
    assert str(phases(values.T, permutations=99)) == str(phases(values, permutations=99))


def test_phases_are_printed_with_what_they_rest_on() -> None:
    found = phases(timeline(planted(np.random.default_rng(0)), first=500), permutations=199)
    shown = str(found)
    for change in found.changes:
        (line,) = [row for row in shown.splitlines() if row.strip().startswith(f"{change.step} ")]
        for part in (f"{change.low} to {change.high}", "0.0050", f"{change.explained:.1%}"):
            assert part in line
    (line,) = [row for row in shown.splitlines() if row.startswith("layer <1>")]
    assert [float(v) for v in line.removeprefix("layer <1>").split()] == pytest.approx(
        found.sums["layer <1>"].tolist(), abs=1e-4
    )
    assert "layer &lt;1&gt;" in found._repr_html_()
    assert "<1>" not in found._repr_html_()


def test_the_groups_that_are_not_printed_are_summed() -> None:
    values = noise(np.random.default_rng(0), 60, 40)
    found = phases(timeline(values), permutations=19)
    rows = {
        line[:16].strip(): float(line.split()[-1]) for line in str(found).splitlines() if line.startswith(("l", "o"))
    }
    assert len(rows) == 13
    assert "other 28 groups" in rows
    assert sum(rows.values()) == pytest.approx(values.sum(), abs=1e-2)


def test_without_a_change_the_smallest_p_is_told() -> None:
    found = phases(timeline(noise(np.random.default_rng(0), 100, 3), first=10), permutations=199)
    assert found.changes == ()
    assert found.bounds == (10, 109)
    assert 0.01 < found.refused <= 1
    assert f"the smallest p was {found.refused:.4f}" in str(found)


def test_the_same_seed_gives_the_same_phases() -> None:
    values = timeline(noise(np.random.default_rng(0), 100, 3))
    first, again, other = (phases(values, permutations=499, seed=seed).refused for seed in (4, 4, 5))
    assert first == again != other


def test_phases_of_a_real_result_sum_to_what_the_measurement_changed(tmp_path: Path) -> None:
    trained = train(tmp_path / "run", OPTIMIZERS["sgd momentum dampening decay"], steps=20)
    result = trained.attribute(steps=slice(4, None))
    found = phases(result, 1, permutations=99)
    changed = float(result.final[1] - result.initial[1])
    assert found.sums.to_numpy().sum() == pytest.approx(changed, rel=1e-9)
    assert found.bounds[0] == 4
    assert found.bounds[-1] == 19
    assert str(found) == str(phases(result.timeline()[1], permutations=99)).replace(
        "from step to step", f"from step to step ({result.units})" if result.units else "from step to step"
    )
    assert 4 <= onset(result.curve[1]) <= 20


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        (np.zeros((7, 2)), {}, "too few bins to find changes: got 7"),
        (np.zeros((100, 2)), {"bins": 7}, "too few bins: got 7"),
        (np.full((20, 2), np.nan), {}, "got nan, expected numbers, at step 3, group layer <0>"),
        (np.zeros((20, 2)), {"level": 0.0}, "level is out of range: got 0.0"),
        (np.zeros((20, 2)), {"permutations": 0}, "permutations is out of range: got 0"),
    ],
)
def test_bad_timelines_are_refused(values: np.ndarray, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        phases(timeline(values, first=3), **options)


def test_a_query_that_is_not_there_is_refused() -> None:
    three = xr.concat([timeline(np.zeros((20, 2)))] * 3, "query")
    with pytest.raises(IndexError, match="got 3, expected 0 to 2"):
        phases(three, 3)
    with pytest.raises(ValueError, match="got group, expected one of steps"):
        phases(three[:, 0])


@pytest.mark.parametrize(
    ("values", "width", "message"),
    [
        (np.zeros(4), 2, "too short for the width: got shape .4,. and width 2"),
        (np.zeros(4), 0, "width >= 1"),
        (np.array([0.0, np.inf, 0.0]), 1, "got inf"),
        (np.zeros((4, 4)), 1, "the curve and its steps do not fit: got shape .4, 4."),
    ],
)
def test_bad_curves_have_no_onset(values: np.ndarray, width: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        onset(values, width)


def test_steps_of_another_length_are_refused() -> None:
    with pytest.raises(ValueError, match=r"got shape \(9,\) and 7 steps"):
        onset(np.zeros(9), 2, steps=range(7))


@pytest.mark.parametrize(
    ("shape", "options"),
    [((9, 1), {}), ((20,), {}), ((20, 0), {}), ((20, 1), {"worth": 1}), ((20, 1), {"interval": 1})],
)
def test_bad_series_are_refused(shape: tuple[int, ...], options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"got .*expected"):
        kernel.find_changes(np.zeros(shape), **options)
