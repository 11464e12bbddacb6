"""Measurements along trajectories and lines, barriers and convexity gaps against hand-computed cases."""

from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from attrib.kernels import lines
from cases import OPTIMIZERS
from hypothesis import given, settings
from hypothesis import strategies as st
from training import flat, train

import attrib
from attrib import errors


def test_barriers_and_gaps_of_curves_drawn_by_hand() -> None:
    convex = np.linspace(-1, 1, 5) ** 2
    bump = np.array([0.0, 2.0, 1.0])  # chord 0.5 in the middle
    steps = np.array([4.0, 3.0, 3.0, 0.0, 0.0])  # chord 4 - t: never above by more than 1
    assert lines.barriers(convex) == lines.convexity_gaps(convex) == 0
    assert lines.barriers(bump) == lines.convexity_gaps(bump) == 1.5
    assert lines.barriers(steps) == 1.0  # 3 against 2 in the middle
    assert lines.convexity_gaps(steps) == pytest.approx(
        5 / 3
    )  # from the first to the fourth: 3 against 4/3 at the third
    np.testing.assert_array_equal(lines.barriers(np.stack([convex[:3], bump])), [0.0, 1.5])


@given(seed=st.integers(0, 10**6), n=st.integers(3, 12))
@settings(max_examples=40, deadline=None)
def test_gap_is_the_worst_of_all_chords(seed: int, n: int) -> None:
    f = np.random.default_rng(seed).normal(size=n)
    worst = 0.0
    for i in range(n):
        for j in range(i + 2, n):
            for k in range(i + 1, j):
                worst = max(worst, f[k] - (f[i] * (j - k) + f[j] * (k - i)) / (j - i))
    assert lines.convexity_gaps(f) == pytest.approx(worst, abs=1e-12)  # rounding of sums of three terms of size 1
    assert lines.convexity_gaps(f) >= lines.barriers(f)


@pytest.mark.parametrize("states_every", [1, 4])
def test_measurement_at_every_state_is_that_of_the_model_loaded_there(states_every: int, tmp_path: Path) -> None:
    trained = train(tmp_path / "run", OPTIMIZERS["adamw"], states_every=states_every)
    before, measurement = flat(trained.model), trained.measurement(3)
    found = attrib.evaluate(trained.run, trained.model, measurement)
    assert found.dims == ("state", "query")
    assert found.attrs["units"] == "nats"
    some = attrib.evaluate(trained.run, trained.model, measurement, [6, 2])
    np.testing.assert_array_equal(some, found.sel(state=[6, 2]))
    np.testing.assert_array_equal(flat(trained.model), before)
    for state in range(7):
        trained.run.load(trained.model, state)
        with torch.no_grad():
            # by rows or as a whole: another order of sums in float64
            np.testing.assert_allclose(found.sel(state=state), measurement(trained.model), rtol=1e-12)
    with pytest.raises(IndexError, match="got step 7"):
        attrib.evaluate(trained.run, trained.model, measurement, [7])


def test_line_goes_straight_from_one_run_to_another(tmp_path: Path) -> None:
    one, two = (train(tmp_path / kind, OPTIMIZERS[kind]) for kind in ("adamw", "sgd momentum"))
    measurement = attrib.measure.loss(*(d[:3] for d in one.data))
    line = attrib.interpolate(one.run, 2, two.run, 6, one.model, measurement, points=5)
    for t, values in zip(np.linspace(0, 1, 5), line.values, strict=True):
        mixed = (1 - t) * one.run.vector(2) + t * two.run.vector(6)
        with torch.no_grad():
            expected = torch.func.functional_call(one.model, one.run.layout.unflatten(mixed), (one.data[0][:3],))
        expected = torch.nn.functional.cross_entropy(expected, one.data[1][:3], reduction="none")
        np.testing.assert_allclose(values, expected, rtol=1e-12)
    assert attrib.barrier(line).dims == ("query",)
    np.testing.assert_array_equal(attrib.barrier(line), lines.barriers(line.values.T))
    np.testing.assert_array_equal(attrib.convexity_gap(line.T), lines.convexity_gaps(line.values.T))


def test_lines_that_there_are_not_are_refused(tmp_path: Path) -> None:
    one, other = train(tmp_path / "one", OPTIMIZERS["sgd"]), train(tmp_path / "two", OPTIMIZERS["sgd"], model="cnn")
    with pytest.raises(errors.ModelMismatchError, match="one architecture"):
        attrib.interpolate(one.run, 0, other.run, 0, one.model, one.measurement())
    with pytest.raises(ValueError, match="at least 3"):
        attrib.interpolate(one.run, 0, one.run, 6, one.model, one.measurement(), points=2)
    with pytest.raises(ValueError, match="no line"):
        attrib.barrier(xr.DataArray(np.zeros((4, 2)), dims=("state", "query")))
