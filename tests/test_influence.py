"""Derivatives by the weights of examples: against retraining, a tangent, and the limit of differences."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_adjoint import DERIVED
from test_difference import CASES, FEW, between, evaluated
from torch import Tensor, nn
from training import Trained

import attrib
from attrib.errors import BatchIdentityError, InfluenceError, ReplayError
from attrib.intervention import Reweight
from attrib.shares import Shares


@pytest.fixture
def trained(tmp_path: Path) -> Callable[..., Trained]:
    return partial(evaluated, tmp_path)


def influence(t: Trained, **options: Any) -> attrib.Influence:
    options = {"loss": t.case.loss, "progress": False, **options}
    return attrib.influence(t.run, t.model, t.measurement(), **options)


def final(t: Trained, weights: dict[Any, float], steps: slice | None = None, **options: Any) -> np.ndarray:
    """(Q,): the measurement after training again with other weights."""
    change = Reweight(weights, steps)
    for _, model in attrib.retrain(t.run, 0, change, model=t.model, loss=t.case.loss, **options):
        last = model
    return t.measurement()(last.eval()).detach().numpy()


def slope(t: Trained, example: Any, e: float = 1e-4, steps: slice | None = None, **options: Any) -> np.ndarray:
    """(Q,): by central differences of order four, whose error is of order e^4 and eps / e."""
    near, far = (
        final(t, {example: 1 + k * e}, steps, **options) - final(t, {example: 1 - k * e}, steps, **options)
        for k in (1, 2)
    )
    return (8 * near - far) / (12 * e)


@pytest.mark.parametrize("optimizer", [n if n in FEW else pytest.param(n, marks=pytest.mark.slow) for n in DERIVED])
def test_it_is_the_slope_of_the_measurement_by_an_examples_weight(
    trained: Callable[..., Trained], optimizer: str
) -> None:
    t = trained(optimizer)
    found = influence(t)
    assert "tangent" in found.check(1e-10)
    each = found.by("example")
    for example in t.run.examples[: 2 if optimizer in FEW else 1].tolist():
        want = slope(t, example)
        # Adam's root is rough where a gradient is small beside its size: the slope itself varies over the difference
        np.testing.assert_allclose(each.sel(example=example), want, rtol=1e-6, atol=1e-6 * np.abs(each.values).max())


@pytest.mark.parametrize("model", CASES)
def test_a_tangent_carried_forwards_agrees(trained: Callable[..., Trained], model: str) -> None:
    t = trained("adamw", model, clip=0.5)
    found = influence(t)
    assert float(found.dataset["split_identity"].max()) < 1e-8
    found.check(1e-10)


@pytest.mark.parametrize("kind", ["exact", "gauss-newton"])
@pytest.mark.parametrize("model", CASES)
def test_without_groups_they_come_with_the_curvature_and_are_those_by_group_summed(
    trained: Callable[..., Trained], model: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    t = trained("adamw", model, clip=0.5)
    want = influence(t, curvature=kind)
    products = []
    monkeypatch.setattr(Shares, "products", lambda *asked: products.append(asked))
    found = influence(t, curvature=kind, keep=("step", "example"))
    assert not products
    axes = "step", "example"
    size = np.abs(want.by(*axes)).max()
    np.testing.assert_allclose(found.by(*axes), want.by(*axes), rtol=1e-9, atol=1e-11 * float(size))
    assert float(found.dataset["batch_identity"].max()) < 1e-10
    found.check(1e-10)


@pytest.mark.parametrize("optimizer", ["sgd momentum", "adam decay", "adamw amsgrad"])
def test_each_step_and_group_has_its_own(trained: Callable[..., Trained], optimizer: str) -> None:
    """A step: the slope by a weight at that step alone. A group: what a change of that step's gradient there does."""
    t = trained(optimizer, steps=4)
    found = influence(t)
    example, step = t.run.index(1)[0], 1
    want = slope(t, int(example), steps=slice(step, step + 1))
    np.testing.assert_allclose(found.by("step", "example").sel(step=step, example=example), want, rtol=1e-6, atol=1e-9)
    each = found.by("step", "example", "group").sel(step=step, example=example)
    for group in t.run.groups[:3]:
        np.testing.assert_allclose(
            each.sel(group=group), slope_of_group(t, int(example), step, group), rtol=1e-5, atol=1e-8
        )


def slope_of_group(t: Trained, example: int, step: int, group: str) -> np.ndarray:
    """By central differences of runs by hand, in which a step's gradient is changed in one tensor by an example's."""
    ends = []
    for sign in (1e-4, -1e-4):
        model = t.case.build().double()
        t.run.load(model, step)
        optimizer = t.run.optimizer(model, step)
        for number in range(step, t.run.steps):
            index, x, y = t.batches[number]
            optimizer.zero_grad()
            losses = t.case.loss(model, x, y)
            losses.mean().backward(retain_graph=True)
            if number == step:
                parameter = dict(model.named_parameters())[group]
                (own,) = torch.autograd.grad(losses[index.tolist().index(example)], parameter)
                assert parameter.grad is not None
                parameter.grad += sign / len(index) * own
            optimizer.step()
        ends.append(t.measurement()(model.eval()).detach().numpy())
    return (ends[0] - ends[1]) / 2e-4


@pytest.mark.parametrize("optimizer", ["sgd momentum", "adamw"])
def test_it_is_the_limit_of_differences(trained: Callable[..., Trained], tmp_path: Path, optimizer: str) -> None:
    t, e = trained(optimizer), 1e-4
    example = int(t.run.examples[3])
    found = influence(t).by("step", "example", "group").sel(example=example)
    gaps = []
    for n, size in enumerate((e, e / 10)):
        changed = attrib.replay(
            t.run,
            0,
            Reweight({example: 1 + size}),
            model=t.model,
            loss=t.case.loss,
            store=tmp_path / f"c{n}",
            progress=False,
        )
        terms = between(t, t.run, changed).by("step", "example", "group").sel(example=example) / size
        gaps.append(float(abs(terms - found).max() / abs(found).max()))
    assert gaps[0] < 1e-2
    assert gaps[1] < gaps[0] / 5  # of first order


def test_predictions_are_of_first_order_and_know_of_the_mean(trained: Callable[..., Trained]) -> None:
    t = trained("sgd momentum", examples=40, batch=41)
    found = influence(t)
    subset = t.run.examples[:1].tolist()
    predicted = found.predict([subset, []])
    np.testing.assert_allclose(predicted.values[1], found.final.values)
    example, size, e = subset[0], len(t.run.examples), 1e-3

    def moved(k: float) -> np.ndarray:  # a mean over the others, to first order: all weigh more by what the one loses
        return final(t, {i: 1 + k * e / size - (k * e if i == example else 0) for i in t.run.examples.tolist()})

    want = (8 * (moved(1) - moved(-1)) - (moved(2) - moved(-2))) / (12 * e)  # of order e^4
    np.testing.assert_allclose(predicted.values[0] - found.final.values, want, rtol=1e-6)
    fixed = found.predict([subset], mean="fixed").values[0]
    np.testing.assert_allclose(found.final.values - fixed, found.by("example").sel(example=example), rtol=1e-12)
    with pytest.raises(ValueError, match=r"no such train examples: got \[99\]"):
        found.predict([[99]])


def test_it_is_saved_and_opened_as_what_it_is(trained: Callable[..., Trained], tmp_path: Path) -> None:
    found = influence(trained("adamw"))
    found.save(tmp_path / "influence.zarr")
    again = attrib.open_result(tmp_path / "influence.zarr")
    assert isinstance(again, attrib.Influence)
    assert again.check() == found.check()
    assert list(again.top(2).columns) == ["query", "example", "influence"]


def test_a_wrong_loss_is_seen(trained: Callable[..., Trained]) -> None:
    t = trained("sgd momentum")

    def other(model: nn.Module, *batch: Tensor) -> Tensor:
        return t.case.loss(model, *batch) ** 2

    found = influence(t, loss=other)
    assert float(found.dataset["batch_identity"].max()) > 1e-3
    with pytest.raises(BatchIdentityError, match="do not sum to the recorded one"):
        found.check()


def test_derivatives_that_are_not_those_of_the_training_are_an_error(trained: Callable[..., Trained]) -> None:
    found = influence(trained("sgd momentum"))
    found.dataset["swept"] *= 1.001
    with pytest.raises(InfluenceError, match=r"not those of the training: got a gap of 0\.000999"):
        found.check()


def test_an_optimizer_without_an_adjoint_is_refused(trained: Callable[..., Trained]) -> None:
    with pytest.raises(ReplayError, match=r"was not derived: got RMSprop, expected SGD, Adam or AdamW"):
        influence(trained("rmsprop"))


def test_what_the_record_does_not_hold_is_refused(trained: Callable[..., Trained]) -> None:
    declared = trained("sgd momentum", name="declared", remainder="account")
    for call in (lambda: influence(declared), lambda: between(declared, declared.run, declared.run)):
        with pytest.raises(ReplayError, match=r"recorded with remainder=.account."):
            call()


def test_gauss_newton_is_the_hessian_where_outputs_are_linear(tmp_path: Path) -> None:
    """Of a linear model nothing is left out; of another, something is."""
    x, y = torch.randn(6, 3).double(), torch.randint(0, 2, (6,))

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(model(x), y, reduction="none")

    gaps = []
    for n, model in enumerate((nn.Linear(3, 2), nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))):
        model = model.double()
        recorder = attrib.record(torch.optim.SGD(model.parameters(), lr=0.5), model, loss, tmp_path / f"{n}")
        for _ in range(4):
            recorder.zero_grad()
            loss(model, x, y).mean().backward()
            recorder.step(torch.arange(6), x, y)
        recorder.close()
        run, query = attrib.open_run(tmp_path / f"{n}"), attrib.measure.log_prob(x[:1], y[:1])
        exact, other = (
            attrib.influence(run, model, query, loss=loss, curvature=kind, progress=False).by("example").values
            for kind in ("exact", "gauss-newton")
        )
        gaps.append(np.abs(exact - other).max() / np.abs(exact).max())
    assert gaps[0] < 1e-12 < 1e-4 < gaps[1]


def test_a_healthy_run_in_single_precision_passes_its_check(trained: Callable[..., Trained]) -> None:
    t = trained("adamw", "batch norm", dtype=torch.float32)
    influence(t).check()
    assert influence(t, identities=("split",)).check().startswith("tangent against sensitivity: not checked")
