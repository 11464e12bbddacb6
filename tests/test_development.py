"""The trajectory toolkit against cases computed by hand: curves, lines, basins, vestiges, what-ifs, curvature."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from attrib.kernels import lines
from cases import OPTIMIZERS
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from training import Trained, flat, train

import attrib
from attrib import errors
from attrib.intervention import Drop, Freeze, Suppress, Transplant
from attrib.path import Measured
from attrib.studies.development import planted


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
    with pytest.raises(IndexError, match=r"no such states: got \[7\]"):
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


def test_runs_that_differ_in_what_is_not_trained_have_no_line(tmp_path: Path) -> None:
    def recorded(name: str, shift: float) -> attrib.Run:
        torch.manual_seed(0)
        model = nn.Sequential(nn.BatchNorm1d(3).eval(), nn.Linear(3, 2)).double()
        model[0].running_mean.fill_(shift)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        x = torch.randn(4, 3, dtype=torch.float64)
        with attrib.record(optimizer, model, lambda m, x: m(x).square().sum(1), tmp_path / name) as recorder:
            for _ in range(2):
                recorder.zero_grad()
                model(x).square().sum(1).mean().backward()
                recorder.step(torch.arange(4), x)
        made.append(model)
        return attrib.open_run(tmp_path / name)

    made: list[nn.Module] = []
    one, other = recorded("one", 0.0), recorded("other", 1.0)
    with pytest.raises(errors.ModelMismatchError, match=r"no line of parameters joins them.*running_mean"):
        attrib.interpolate(one, 0, other, 2, made[0], lambda m: m[1].weight.sum()[None])


def test_lines_that_there_are_not_are_refused(tmp_path: Path) -> None:
    one, other = train(tmp_path / "one", OPTIMIZERS["sgd"]), train(tmp_path / "two", OPTIMIZERS["sgd"], model="cnn")
    with pytest.raises(errors.ModelMismatchError, match="one architecture"):
        attrib.interpolate(one.run, 0, other.run, 0, one.model, one.measurement())
    with pytest.raises(ValueError, match="at least 3"):
        attrib.interpolate(one.run, 0, one.run, 6, one.model, one.measurement(), points=2)
    with pytest.raises(ValueError, match="no line"):
        attrib.barrier(xr.DataArray(np.zeros((4, 2)), dims=("state", "query")))


# basins


def test_connectivity_is_every_line_by_itself(tmp_path: Path) -> None:
    one, two = (train(tmp_path / kind, OPTIMIZERS[kind]) for kind in ("adamw", "sgd momentum"))
    measurement = attrib.measure.loss(*(d[:3] for d in one.data), names=["a", "b", "c"])
    points = {"start": (one.run, 0), "end": (one.run, 6), "other": (two.run, 5)}
    before = flat(one.model)
    found = attrib.connectivity(points, one.model, measurement, positions=5, progress=False)
    np.testing.assert_array_equal(flat(one.model), before)
    assert found["barrier"].dims == ("point", "other", "query")
    assert found["gap"].attrs["units"] == "nats"
    assert list(found["query"].values) == ["a", "b", "c"]
    for a, (run_a, s) in points.items():
        for b, (run_b, t) in points.items():
            line = attrib.interpolate(run_a, s, run_b, t, one.model, measurement, points=5)
            for name, function in (("barrier", attrib.barrier), ("gap", attrib.convexity_gap)):
                # the line is walked from either end: rounding of its points, in float64
                np.testing.assert_allclose(found[name].sel(point=a, other=b), function(line), atol=1e-12)
        curve = attrib.evaluate(run_a, one.model, measurement, [s])[0]
        np.testing.assert_allclose(found["loss"].sel(point=a), curve, rtol=1e-12)


def barriers_of(rows: list[list[float]]) -> xr.DataArray:
    names = [f"p{k}" for k in range(len(rows))]
    return xr.DataArray(rows, {"point": names, "other": names})


def test_clusters_hold_no_barrier_above_the_height_and_runs_settle_into_their_last() -> None:
    nan = 9.0
    rows = [
        [0, nan, nan, nan, nan],
        [nan, 0, 1, 3, nan],
        [nan, 1, 0, 1, nan],
        [nan, 3, 1, 0, nan],
        [nan, nan, nan, nan, 0],
    ]
    labels = attrib.clusters(barriers_of(rows), 2.0)
    assert labels.values.tolist() in ([0, 1, 1, 2, 3], [0, 1, 2, 2, 3])  # not p1 to p3: 3 apart
    assert attrib.clusters(barriers_of(rows), 3.0).values.tolist() == [0, 1, 1, 1, 2]
    assert attrib.clusters(barriers_of(rows), 0.5).values.tolist() == [0, 1, 2, 3, 4]
    run = xr.DataArray([0, 1, 0, 2, 2, 2], {"state": [0, 10, 20, 30, 40, 50]})
    assert attrib.settled(run) == 30
    assert attrib.settled(run[:3]) == 20
    assert attrib.settled(run[3:]) == 30


@given(seed=st.integers(0, 10**6), n=st.integers(2, 9), height=st.floats(0, 2))
def test_no_two_states_of_a_cluster_are_further_apart_than_the_height(seed: int, n: int, height: float) -> None:
    values = np.random.default_rng(seed).uniform(0, 2, (n, n))
    values = np.triu(values, 1) + np.triu(values, 1).T
    labels = attrib.clusters(barriers_of(values.tolist()), height).values
    same = labels[:, None] == labels
    assert (values[same] <= height).all()
    assert labels[0] == 0
    assert set(labels) == set(range(labels.max() + 1))


def test_matrices_that_are_none_are_refused(tmp_path: Path) -> None:
    one, other = train(tmp_path / "one", OPTIMIZERS["sgd"]), train(tmp_path / "two", OPTIMIZERS["sgd"], model="cnn")
    measurement = one.measurement()
    with pytest.raises(ValueError, match="symmetric"):
        attrib.clusters(barriers_of([[0, 1], [2, 0]]), 1.0)
    with pytest.raises(ValueError, match="height -1"):
        attrib.clusters(barriers_of([[0, 1], [1, 0]]), -1.0)
    with pytest.raises(ValueError, match="no lines"):
        attrib.connectivity({"a": (one.run, 0)}, one.model, measurement)
    with pytest.raises(errors.ModelMismatchError, match="one architecture"):
        attrib.connectivity({"a": (one.run, 0), "b": (other.run, 0)}, one.model, measurement)


# what if


def retrained(trained: Trained, start: int, change: Any, until: int) -> dict[int, np.ndarray]:
    arguments = {"model": trained.model, "loss": trained.case.loss, "until": until}
    states = attrib.retrain(trained.run, start, change, **arguments)
    return {state: trained.measurement(3)(model).detach().numpy() for state, model in states}


def test_what_if_measures_each_changed_training_beside_the_untouched(tmp_path: Path) -> None:
    trained = train(tmp_path / "run", OPTIMIZERS["adamw"], batch=12, steps=6, examples=12)
    cases = {
        "frozen": (Freeze("hidden.*", slice(3, None)), 3),
        "dropped": ([Drop([1, 2], slice(4, 6)), Suppress("output.*", 0.3, slice(2, 4))], 2),
        "grown": (Transplant("hidden.*", trained.run, 6), 1),
    }
    before, state = flat(trained.model), torch.get_rng_state()
    found = attrib.what_if(
        trained.run, {name: change for name, (change, _) in cases.items()}, trained.measurement(3), model=trained.model,
        loss=trained.case.loss, states=[6, 0, 2, 4], start=1, progress=False,
    )  # fmt: skip
    np.testing.assert_array_equal(flat(trained.model), before)
    assert torch.equal(torch.get_rng_state(), state)
    assert found.dims == ("change", "state", "query")
    assert found["change"].values.tolist() == ["untouched", *cases]
    assert found["state"].values.tolist() == [0, 2, 4, 6]
    untouched = attrib.evaluate(trained.run, trained.model, trained.measurement(3), [0, 2, 4, 6])
    np.testing.assert_array_equal(found.sel(change="untouched"), untouched)
    for name, (change, start) in cases.items():
        states = retrained(trained, start, change, 6)
        for at in (0, 2, 4, 6):
            expected = untouched.sel(state=at) if at < start else states[at]
            np.testing.assert_allclose(found.sel(change=name, state=at), expected, rtol=1e-10)
        assert not np.allclose(found.sel(change=name)[-1], untouched[-1], rtol=1e-6)


def test_what_if_ends_before_a_later_window_and_refuses_no_states(tmp_path: Path) -> None:
    trained = train(tmp_path / "run", OPTIMIZERS["adamw"])
    arguments = {"model": trained.model, "loss": trained.case.loss, "progress": False}
    change = [Freeze("hidden.*", slice(1, 2)), Freeze("output.*", slice(5, None))]
    found = attrib.what_if(trained.run, {"both": change}, trained.measurement(3), states=[3], **arguments)
    states = retrained(trained, 1, change, 6)
    np.testing.assert_allclose(found.sel(change="both", state=3), states[3], rtol=1e-10)
    with pytest.raises(errors.ReplayError, match=r"no such states: got \[\]"):
        attrib.what_if(trained.run, {"both": change}, trained.measurement(3), states=[], **arguments)
    for none in ([], [-1]):
        with pytest.raises(IndexError, match="no such states"):
            attrib.evaluate(trained.run, trained.model, trained.measurement(3), none)


def test_what_if_goes_on_beyond_the_record(tmp_path: Path) -> None:
    trained = train(tmp_path / "run", OPTIMIZERS["adamw"], batch=13, examples=12)
    batch = (torch.arange(12), *trained.data)
    arguments = {"model": trained.model, "loss": trained.case.loss, "batches": lambda step: batch, "progress": False}
    found = attrib.what_if(
        trained.run, {"frozen": Freeze("hidden.*", slice(7, None))}, trained.measurement(3), states=[6, 9], **arguments
    )
    del arguments["progress"]
    states = dict(attrib.retrain(trained.run, 6, until=9, **arguments))
    with torch.no_grad():
        np.testing.assert_allclose(
            found.sel(change="untouched", state=9), trained.measurement(3)(states[9]), rtol=1e-10
        )
    assert (found.sel(change="untouched", state=9) != found.sel(change="frozen", state=9)).all()
    np.testing.assert_array_equal(found.sel(change="untouched", state=6), found.sel(change="frozen", state=6))
    with pytest.raises(ValueError, match="nothing to compare"):
        attrib.what_if(trained.run, {}, trained.measurement(3), **arguments)
    with pytest.raises(errors.ReplayError, match="no such states"):
        attrib.what_if(trained.run, {"a": Freeze("hidden.*")}, trained.measurement(3), states=[-1], **arguments)


@pytest.mark.parametrize("to", [None, 2])
def test_ablation_puts_one_group_back_and_no_other(to: int | None, tmp_path: Path) -> None:
    trained = train(tmp_path / "run", OPTIMIZERS["adamw"])
    groups = {"first": ["embedding.*", "hidden.bias"], "rest": ["hidden.weight", "output.*"]}
    found = attrib.ablate(trained.run, trained.model, trained.measurement(3), groups, state=5, to=to)
    for name, patterns in groups.items():
        mixed = trained.run.parameters(5)
        for tensor in mixed:
            if any(tensor.startswith(p.rstrip("*")) for p in patterns):
                mixed[tensor] = torch.zeros_like(mixed[tensor]) if to is None else trained.run.parameters(to)[tensor]
        values = []
        for parameters in (mixed, trained.run.parameters(5)):
            x, y = (d[:3] for d in trained.data)
            with torch.no_grad():
                outputs = torch.func.functional_call(trained.model, parameters, (x,))
            values.append(outputs.log_softmax(-1)[torch.arange(3), y].numpy())
        np.testing.assert_allclose(found.sel(group=name), values[0] - values[1], rtol=1e-9)
    assert attrib.ablate(trained.run, trained.model, trained.measurement(), to=6).values.tolist() == [[0.0, 0.0]] * 5
    with pytest.raises(ValueError, match="names no parameter"):
        attrib.ablate(trained.run, trained.model, trained.measurement(), {"x": ["nothing.*"]})


# vestiges


def result_of(timeline: np.ndarray) -> attrib.Result:
    """(steps, groups) -> a result with that timeline and nothing else."""
    labels = {"query": [0], "update_step": np.arange(len(timeline)) + 10, "group": list("abcd")[: timeline.shape[1]]}
    return attrib.Result(xr.Dataset({"timeline": (tuple(labels), timeline[None])}, labels))


def test_what_was_built_up_and_torn_down_is_vestigial() -> None:
    found = attrib.vestiges(result_of(np.array([[2.0, 1.0, 0.01, 0.0], [1.0, 1.0, -0.01, 0.0], [-2.5, 1.0, 0.0, 0.0]])))
    assert found["gross"].values.tolist() == [5.5, 3.0, 0.02, 0.0]
    harm = attrib.vestiges(result_of(np.array([[-5.0, 4.0], [0.0, 1.0], [6.0, -7.0]])))
    assert harm["vestigial"].values.tolist() == [False, True]  # the first only ever harmed, and then helped
    assert harm["height"].values.tolist() == [1.0, 5.0]
    np.testing.assert_allclose(harm["left"], [1.0, -0.4])
    np.testing.assert_allclose(found["net"], [0.5, 3.0, 0.0, 0.0], atol=1e-15)
    assert found["height"].values.tolist() == [3.0, 3.0, 0.01, 0.0]
    np.testing.assert_allclose(found["left"], [1 / 6, 1.0, 0.0, np.nan], atol=1e-12)
    assert found["step"].values.tolist()[:3] == [11, 12, 10]
    assert found["vestigial"].values.tolist() == [True, False, False, False]  # c is too small to have been anything
    np.testing.assert_allclose(found["running"].sel(group="a"), [2, 3, 0.5])
    with pytest.raises(IndexError, match="got 1"):
        attrib.vestiges(result_of(np.zeros((3, 2))), 1)


@pytest.mark.slow  # 300 steps, and as many changed
@pytest.mark.parametrize("seed", [0, 1])
def test_planted_vestigial_layer_is_found_and_confirmed_by_freezing(seed: int, tmp_path: Path) -> None:
    turn, steps = 150, 300
    model = planted.train(tmp_path / "run", steps, turn, seed)
    run, asked = attrib.open_run(tmp_path / "run"), planted.signed_output(seed)
    result = attrib.attribute(run, model, asked, loss=planted.loss, groups=planted.GROUPS, progress=False)
    result.check(1e-5)
    found = attrib.vestiges(result)
    assert found["vestigial"].to_series().to_dict() == {"early": True, "late": False}
    assert int(found["step"].sel(group="early")) == turn - 1
    whole = float(attrib.evaluate(run, model, asked, [steps])[0, 0])
    without = attrib.ablate(run, model, asked, planted.GROUPS)[:, 0]
    assert abs(float(without.sel(group="early"))) < 0.01 * whole
    assert float(without.sel(group="late")) < -0.9 * whole
    changes = {
        "early": Freeze("early.*"),
        "early from the turn": Freeze("early.*", slice(turn, None)),
        "late": Freeze("late.*"),
    }
    changed = attrib.what_if(run, changes, asked, model=model, loss=planted.loss, states=[turn, steps], progress=False)
    effect = (changed - changed.sel(change="untouched"))[..., 0]
    assert float(effect.sel(change="early", state=turn)) < -0.9 * float(changed[0, 0, 0])  # all there was by then
    for name in ("early", "early from the turn"):
        assert abs(float(effect.sel(change=name, state=steps))) < 0.15 * whole  # not needed for the end
    assert float(effect.sel(change="late", state=steps)) < -0.9 * whole


# similarity and curvature


def test_similarity_is_the_cosine_over_the_labels_in_common() -> None:
    def made(values: list[list[float]], ids: list[int]) -> attrib.Result:
        labels = {"query": [0, 1], "example": ids}
        return attrib.Result(xr.Dataset({"contribution_example": (tuple(labels), np.array(values))}, labels))

    one = made([[1.0, 0.0, 2.0], [1.0, 2.0, 3.0]], [3, 4, 5])
    two = made([[7.0, 0.0, 4.0], [9.0, 1.0, 10.0]], [9, 4, 5])
    found = attrib.similarity({"one": one, "two": two}, "example")
    assert found.dims == ("query", "run", "other")
    np.testing.assert_allclose(found.sel(run="one", other="two"), [1.0, 32 / np.sqrt(13 * 101)])
    np.testing.assert_allclose(found.sel(run="one", other="one"), 1)
    three = made([[5.0, 1.0, 3.0], [1.0, 2.0, 30.0]], [3, 4, 5])
    ranks = attrib.similarity({"one": one, "three": three}, "example", kind="rank")
    np.testing.assert_allclose(ranks.sel(run="one", other="three"), [0.5, 1.0])
    flat_ = attrib.similarity({"one": one, "none": made([[0.0] * 3] * 2, [3, 4, 5])}, "example")
    assert np.isnan(flat_.sel(run="one", other="none")).all()
    with pytest.raises(ValueError, match="share no labels"):
        attrib.similarity({"one": one, "far": made([[1.0], [1.0]], [77])}, "example")
    with pytest.raises(ValueError, match="got kind 'angle'"):
        attrib.similarity({"one": one, "two": two}, "example", kind="angle")
    with pytest.raises(ValueError, match="same queries"):
        attrib.similarity({"one": one, "half": two.select([0])}, "example")
    with pytest.raises(errors.KeptAxesError):
        attrib.similarity({"one": one, "two": two}, "group")


def test_curvature_knows_attention(tmp_path: Path) -> None:
    trained = train(tmp_path / "run", OPTIMIZERS["adamw"], model="gpt", steps=2)
    x, y = (d[:4] for d in trained.data)
    found = attrib.curvature(trained.run, trained.model, trained.case.loss, (x, y), [1], progress=False)
    along = torch.from_numpy(found["vector"].values[0, 0])
    theta, h = trained.run.vector(1), 1e-3

    def mean_loss(at: torch.Tensor) -> float:
        parameters = trained.run.layout.unflatten(at)
        with torch.no_grad():
            return float(
                trained.case.loss(lambda z: torch.func.functional_call(trained.model, parameters, (z,)), x, y).mean()
            )

    second = (mean_loss(theta + h * along) - 2 * mean_loss(theta) + mean_loss(theta - h * along)) / h**2
    assert float(found["eigenvalue"][0, 0]) == pytest.approx(second, rel=1e-3)  # of the fourth derivative, h^2


def test_curvature_is_that_of_the_whole_hessian(tmp_path: Path) -> None:
    trained = train(tmp_path / "run", OPTIMIZERS["sgd momentum"])
    run, batch = trained.run, trained.data
    before = flat(trained.model)
    found = attrib.curvature(run, trained.model, trained.case.loss, batch, [0, 6], count=3, progress=False)
    np.testing.assert_array_equal(flat(trained.model), before)
    for state in (0, 6):

        def mean_loss(theta: torch.Tensor) -> torch.Tensor:
            parameters = run.layout.unflatten(theta)
            outputs = torch.func.functional_call(trained.model, parameters, (batch[0],))
            return nn.functional.cross_entropy(outputs, batch[1])

        hessian = torch.autograd.functional.hessian(mean_loss, run.vector(state)).numpy()
        expected = np.linalg.eigvalsh(hessian)[::-1][:3]
        np.testing.assert_allclose(found["eigenvalue"].sel(state=state), expected, rtol=1e-4)
        vectors = found["vector"].sel(state=state).values
        np.testing.assert_allclose(vectors @ vectors.T, np.eye(3), atol=1e-8)
        np.testing.assert_allclose(
            hessian @ vectors.T, vectors.T * expected, atol=2e-2 * expected[0]
        )  # of 1e-4, its root
    with pytest.raises(ValueError, match="too many eigenvalues"):
        attrib.curvature(run, trained.model, trained.case.loss, batch, count=10**6)
    with pytest.raises(IndexError, match="got step 9"):
        attrib.curvature(run, trained.model, trained.case.loss, batch, [9], progress=False)


# who moved what


DECAYED = {"sgd decay": lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.2)}  # no momentum


# fast are one without momentum and decay, and one with both and adaptive
@pytest.mark.parametrize(
    "kind",
    ["sgd", "adamw"]
    + [pytest.param(k, marks=pytest.mark.slow) for k in ("sgd decay", "sgd momentum dampening decay", "adam decay")],
)
def test_moves_are_the_steps_changes_over_their_examples(kind: str, tmp_path: Path) -> None:
    trained = train(tmp_path / "run", {**OPTIMIZERS, **DECAYED}[kind])
    measurement = trained.measurement(3)
    curve = attrib.evaluate(trained.run, trained.model, measurement).values
    arguments = {"loss": trained.case.loss}
    whole = trained.attribute(measurement, keep=("step", "example"))
    total = 0.0
    for move in attrib.moves(trained.run, trained.model, measurement, lead=6, **arguments):
        np.testing.assert_allclose(move.change, curve[move.step + 1] - curve[move.step], atol=1e-12)
        assert not move.inherited.any()  # nothing is before the first step
        terms = move.contributions.sum(1) + move.decay + move.inherited
        np.testing.assert_allclose(terms, move.change, atol=1e-12)  # rounding of float64
        absent = ~np.isin(trained.run.examples, np.concatenate([trained.run.index(s) for s in range(move.step + 1)]))
        assert not move.contributions[:, absent].any()
        np.testing.assert_allclose(move.change, whole.timeline()[:, move.step].sum("group"), atol=1e-12)
        total = total + move.contributions
    np.testing.assert_allclose(total, whole.by("example"), atol=1e-12)
    without = list(attrib.moves(trained.run, trained.model, measurement, range(3, 5), **arguments))
    assert [move.step for move in without] == [3, 4]
    for move in without:
        terms = move.contributions.sum(1) + move.decay + move.inherited
        np.testing.assert_allclose(terms, move.change, atol=1e-12)
        assert bool(move.inherited.any()) == (kind not in ("sgd", "sgd decay"))
        assert bool(move.decay.any()) == ("decay" in kind or kind == "adamw")


def test_moves_of_momentum_are_the_double_sum(tmp_path: Path) -> None:
    trained = train(tmp_path / "run", OPTIMIZERS["sgd momentum"])
    run, step = trained.run, 4
    measurement = trained.measurement(1)
    (move,) = attrib.moves(run, trained.model, measurement, range(step, step + 1), loss=trained.case.loss, lead=2)
    bar = attrib.Secant().bind(Measured(trained.model, measurement, run.layout, torch.float64, run.vector(0)))
    gradient = bar(run.vector(step), run.vector(step + 1)).gradient[0].numpy()
    expected = np.zeros(len(run.examples))
    for r in (2, 3, 4):  # the lead and the step itself
        index, x, y = trained.batches[r]
        for i, xi, yi in zip(index.tolist(), x, y, strict=True):
            parameters = {n: t.requires_grad_() for n, t in run.parameters(r).items()}
            outputs = torch.func.functional_call(trained.model, parameters, (xi[None],))
            share = torch.autograd.grad(
                nn.functional.cross_entropy(outputs, yi[None]) / len(index), [*parameters.values()]
            )
            flat_share = torch.cat([s.reshape(-1) for s in share]).numpy()
            expected[np.searchsorted(run.examples, i)] += -0.1 * 0.9 ** (step - r) * gradient @ flat_share
    np.testing.assert_allclose(move.contributions[0], expected, atol=1e-12)


def test_moves_outside_the_run_are_refused(tmp_path: Path) -> None:
    trained = train(tmp_path / "run", OPTIMIZERS["sgd"])
    for steps, lead in ((range(3, 9), 0), (range(0, 6, 2), 0), (range(3, 3), 0), (range(2), -1)):
        with pytest.raises(ValueError, match="not in the run"):
            attrib.moves(trained.run, trained.model, trained.measurement(), steps, loss=trained.case.loss, lead=lead)
