"""Influences of loops that do more than the mean: weights, penalties, clipping; and of what is trained again for them."""

import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from cases import MODELS, OPTIMIZERS
from test_difference import evaluated
from test_influence import influence
from torch import Tensor, nn
from training import Trained

import attrib
from attrib.errors import ReplayError, StoreExistsError
from attrib.intervention import Intervention, Penalty, Reweight


@pytest.fixture
def trained(tmp_path: Path) -> Callable[..., Trained]:
    return partial(evaluated, tmp_path)


def replayed(t: Trained, changes: list[Intervention], store: Path) -> attrib.Run:
    return attrib.replay(t.run, 0, changes, model=t.model, loss=t.case.loss, store=store, progress=False)


def order_four(ends: Callable[[float], np.ndarray], e: float = 1e-4) -> np.ndarray:
    """The slope by central differences whose error is of order e^4 and eps / e."""
    return (8 * (ends(e) - ends(-e)) - (ends(2 * e) - ends(-2 * e))) / (12 * e)


def slope(t: Trained, weights: Mapping[Any, float], example: Any, *others: Intervention) -> np.ndarray:
    """(Q,): of the measurement by one of the weights, the others as they are."""

    def end(e: float) -> np.ndarray:
        change = Reweight({**weights, example: weights.get(example, 1.0) + e})
        for _, model in attrib.retrain(t.run, 0, [change, *others], model=t.model, loss=t.case.loss):
            last = model
        return t.measurement()(last.eval()).detach().numpy()

    return order_four(end)


def assert_slope(found: attrib.Influence, example: Any, want: np.ndarray) -> None:
    """1e-6 of the largest: what is left of e^4 and of eps / e = 1e-12, amplified by Adam's root."""
    each = found.by("example")
    np.testing.assert_allclose(each.sel(example=example), want, rtol=1e-6, atol=1e-6 * np.abs(each.values).max())


@pytest.mark.parametrize("optimizer", ["sgd momentum", "adamw amsgrad"])
def test_of_a_run_with_weights_it_is_the_slope_there(
    trained: Callable[..., Trained], tmp_path: Path, optimizer: str
) -> None:
    t = trained(optimizer)
    weights = dict(zip(t.run.examples.tolist(), np.linspace(0.0, 1.7, len(t.run.examples)), strict=True))
    found = influence(t._replace(run=replayed(t, [Reweight(weights)], tmp_path / "weighted")))
    found.check(1e-10)
    assert float(found.dataset["batch_identity"].max()) < 1e-10
    assert float(found.dataset["split_identity"].max()) < 1e-8
    for example in t.run.examples[:4:3].tolist():  # the first has weight 0
        assert_slope(found, example, slope(t, weights, example))
    first, last = t.run.examples[[0, -1]].tolist()
    fixed = found.without("fixed")
    assert (fixed.sel(example=first) == 0).all()  # nothing is lost of what weighs nothing
    np.testing.assert_allclose(fixed.sel(example=last), -1.7 * found.by("example").sel(example=last), rtol=1e-12)


def test_scales_that_were_not_recorded_are_fitted_to_the_weighted_losses(
    trained: Callable[..., Trained], tmp_path: Path
) -> None:
    """A factor beside the mean leaves all but the checked steps to be fitted."""
    t = trained("sgd momentum")
    weights = dict(zip(t.run.examples.tolist(), np.linspace(0.2, 1.7, len(t.run.examples)), strict=True))
    options: dict[str, Any] = {"model": t.model, "loss": t.case.loss, "store": tmp_path / "w", "progress": False}

    def backward(losses: Tensor, model: nn.Module) -> None:
        (0.3 * losses.mean()).backward()

    run = attrib.replay(t.run, 0, Reweight(weights), backward=backward, **options)
    assert np.isnan(run.scales(4)).all()
    example = int(t.run.examples[3])
    found = influence(t._replace(run=run))
    found.check(1e-10)

    def end(e: float) -> np.ndarray:
        change = Reweight({**weights, example: weights[example] + e})
        for _, model in attrib.retrain(t.run, 0, change, model=t.model, loss=t.case.loss, backward=backward):
            last = model
        return t.measurement()(last.eval()).detach().numpy()

    assert_slope(found, example, order_four(end))


def test_it_is_taken_at_a_uniform_weight(
    trained: Callable[..., Trained], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    t, places = trained("sgd momentum"), tmp_path / "places"
    places.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(places))
    found = influence(t, weights=0.8)
    found.check(1e-10)
    assert not list(places.iterdir())  # what it was trained again in is gone
    assert found.dataset.attrs["run"] == str(t.run.reader.target)
    uniform, example = dict.fromkeys(t.run.examples.tolist(), 0.8), int(t.run.examples[3])
    assert_slope(found, example, slope(t, uniform, example))
    left = slope_to(t, uniform, example)
    predicted = found.predict([[], [example]], mean="fixed").values
    np.testing.assert_allclose(predicted, left, rtol=1e-6)
    kept = influence(t, weights=0.8, store=tmp_path / "kept")
    assert attrib.open_run(tmp_path / "kept").steps == t.run.steps
    np.testing.assert_array_equal(kept.by("example"), found.by("example"))
    with pytest.raises(StoreExistsError):
        influence(t, weights=0.8, store=tmp_path / "kept")


def slope_to(t: Trained, uniform: dict[Any, float], example: Any) -> np.ndarray:
    """(2, Q): from the uniform weights, to first order, to all at 1; and to all but one, which is at 0."""

    def end(to: dict[Any, float], e: float) -> np.ndarray:
        weights = {i: w + e * (to[i] - w) for i, w in uniform.items()}
        for _, model in attrib.retrain(t.run, 0, Reweight(weights), model=t.model, loss=t.case.loss):
            last = model
        return t.measurement()(last.eval()).detach().numpy()

    ones = dict.fromkeys(uniform, 1.0)
    aims = (ones, {**ones, example: 0.0})
    return np.stack([end(to, 0.0) + order_four(partial(end, to)) for to in aims])


def test_a_penalty_bends_it_too(trained: Callable[..., Trained], tmp_path: Path) -> None:
    t, example = trained("adamw"), 0

    def penalty(model: nn.Module) -> Tensor:
        return torch.stack([p.pow(4).sum() for p in model.parameters()]).sum()

    change = Penalty(penalty, 0.3)  # its weight is found from the record
    example = int(t.run.examples[3])
    there = t._replace(run=replayed(t, [change], tmp_path / "penalised"))
    found = influence(there, penalty=penalty)
    found.check(1e-10)
    assert_slope(found, example, slope(t, {}, example, change))
    with pytest.raises(ReplayError, match=r"got a run with a penalty, .* Pass penalty="):
        influence(there)
    with pytest.raises(ReplayError, match=r"the penalty is not the one .* at step 4\. Pass penalty="):
        influence(there, penalty=lambda m: next(m.parameters()).square().sum())
    with pytest.raises(ReplayError, match="got penalty= and a run that was recorded without one"):
        influence(t, penalty=penalty)


class Clipped(NamedTuple):
    """A loop by hand, of two batches a step. parts: their weights; none: one batch a step, and a factor."""

    clip: float | None
    parts: tuple[float, float] | None = None
    factor: float = 1.0
    steps: int = 5

    def train(self, store: Path | None = None, example: int = -1, weight: float = 1.0) -> tuple[nn.Module, Any]:
        """Recorded, or with another weight of an example."""
        torch.manual_seed(0)
        case = MODELS["mlp"]
        model, (x, y) = case.build().double(), case.data(12)
        optimizer: Any = OPTIMIZERS["sgd momentum"](list(model.parameters()))
        recorder = optimizer if store is None else attrib.record(optimizer, model, case.loss, store)
        for _ in range(self.steps):
            recorder.zero_grad()
            index = torch.randperm(12)[:9]
            sizes = [9] if self.parts is None else [5, 4]
            factors = (self.factor / 9,) if self.parts is None else self.parts
            for i, factor in zip(index.split(sizes), factors, strict=True):
                if store is not None:
                    recorder.batch(i, x[i], y[i])
                weights = torch.ones(len(i)).double()
                weights[i == example] = weight
                (factor * (weights * case.loss(model, x[i], y[i])).sum()).backward()
            if self.clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), self.clip)
            recorder.step()
        if store is not None:
            recorder.close()
        return model.eval(), attrib.measure.log_prob(x[:2], y[:2])

    def slope(self, example: int) -> np.ndarray:
        def end(e: float) -> np.ndarray:
            model, measurement = self.train(None, example, 1 + e)
            return measurement(model).detach().numpy()

        return order_four(end)

    def ask(self, store: Path, **options: Any) -> attrib.Influence:
        model, measurement = self.train(store)
        run = attrib.open_run(store)
        return attrib.influence(run, model, measurement, loss=MODELS["mlp"].loss, progress=False, **options)


CLIPPED = {  # whether it has to be said
    "all, batches weighted": (Clipped(0.1, (0.3, 0.05)), True),
    "some, batches weighted": (Clipped(1.4, (0.3, 0.05)), True),
    "all, a factor beside": (Clipped(0.05, factor=0.3), True),
    "some, a factor beside": (Clipped(0.2, factor=0.3), False),
    "all, a mean": (Clipped(0.1), False),
}


@pytest.mark.parametrize("case", CLIPPED)
def test_clipping_that_the_record_does_not_tell_is_said_or_refused(tmp_path: Path, case: str) -> None:
    loop, must = CLIPPED[case]
    if must:
        with pytest.raises(
            ReplayError, match=r"cannot be told whether gradients were clipped: got .* Pass clip=, the max"
        ):
            loop.ask(tmp_path / "unsaid")
    said = {"clip": loop.clip} if must else {}
    found = loop.ask(tmp_path / "run", **said)
    found.check(1e-10)
    for example in (0, 5):
        assert_slope(found, example, loop.slope(example))
    norms = np.linalg.norm(attrib.open_run(tmp_path / "run").reader.read("gradient"), axis=1)
    clipped = np.abs(norms - loop.clip) < 1e-5  # or the case is none
    assert clipped.all() if case.startswith("all") else (clipped.any() and not clipped.all()), norms


def test_batches_that_were_not_clipped_are_said_to_be(tmp_path: Path) -> None:
    loop = Clipped(None, (0.3, 0.05))
    found = loop.ask(tmp_path / "run", clip=math.inf)
    found.check(1e-10)
    assert_slope(found, 5, loop.slope(5))


def test_a_threshold_that_is_not_the_run_s_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ReplayError, match=r"the run was not clipped so: got clip=0\.1, and a gradient of norm"):
        Clipped(None, (0.3, 0.05)).ask(tmp_path / "run", clip=0.1)
    with pytest.raises(ReplayError, match=r"is not that of clipping by norm: got .* expected 2 as at other steps"):
        Clipped(0.1).ask(tmp_path / "other", clip=2.0)


def test_what_was_foretold_is_held_against_retrainings(trained: Callable[..., Trained], tmp_path: Path) -> None:
    t = trained("sgd momentum", examples=20, batch=8)
    found = influence(t, retrainings=12)
    subsets = attrib.random_subsets(t.run, 0.05, 12)
    outcomes = attrib.retrain_subsets(t.run, subsets, t.measurement(), model=t.model, loss=t.case.loss, progress=False)
    score = attrib.lds(-found.without(), subsets, outcomes)
    for name, other in (("lds", "lds"), ("lds_low", "low"), ("lds_high", "high")):
        np.testing.assert_array_equal(found.dataset[name], score[other])
    mean = float(score["mean"])
    assert mean > 0.9  # a few small steps
    said = "of 12 retrainings without 0.05 of the examples, outcomes and predictions have a rank correlation of"
    assert f"{said} {mean:.2f} (" in found.said
    found.save(tmp_path / "found.zarr")
    assert attrib.open_result(tmp_path / "found.zarr").check() == found.check()
    at = influence(t, weights=0.8, retrainings=3)
    assert at.dataset.attrs["foretold"][:2] == [3, pytest.approx(0.2)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": 0.0}, "weights is no number above 0: got 0.0, expected one, such as 0.8"),
        ({"weights": "half"}, "weights is no number above 0: got 'half'"),
        ({"clip": -1.0}, "clip is no number above 0: got -1.0, expected one, such as the max_norm"),
        ({"retrainings": 2}, "retrainings are none: got 2, expected 0, or 3 or more"),
        ({"store": "place"}, "there is nothing to be stored: got store='place' without weights"),
        ({"curvature": "none"}, "unknown curvature: got 'none'"),
        ({"identities": "split"}, "identities are none: got 'split'"),
    ],
)
def test_what_is_asked_for_is_checked(trained: Callable[..., Trained], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        influence(trained("sgd momentum", steps=1), **options)


def test_a_run_with_weights_is_not_given_others(trained: Callable[..., Trained], tmp_path: Path) -> None:
    t = trained("sgd momentum")
    other = t._replace(run=replayed(t, [Reweight({int(t.run.examples[0]): 2.0})], tmp_path / "weighted"))
    with pytest.raises(ReplayError, match=r"got weights=0\.8 of a replay that gave losses weights"):
        influence(other, weights=0.8)
