"""The measurement of an averaged copy of the model, explained on the path of the average."""

import itertools
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import oracles
import pytest
import torch
from cases import MODELS, OPTIMIZERS, covered, crossed
from test_oracle import CASES, decompose, to_run_order
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from training import Trained, train
from zarr.storage import MemoryStore

import attrib
from attrib.errors import MeasurementError
from attrib.measure import Ema, Swa, averaged
from attrib.path import limit_bound

STEPS = 7


class Kept(NamedTuple):
    """average: as attrib has it. copy: torch's; first, every: the states that it is updated with."""

    average: Any
    copy: Callable[[nn.Module], AveragedModel]
    first: int
    every: int = 1


def ema(model: nn.Module) -> AveragedModel:
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.7))


KEPT = {
    "ema": Kept(Ema(0.7), ema, 1),
    "ema late, every second": Kept(Ema(0.7, start=2, every=2), ema, 2, 2),
    "swa": Kept(Swa(3), AveragedModel, 3),
    "swa every second": Kept(Swa(2, every=2), AveragedModel, 2, 2),
}


def trained_with(
    kept: Kept, optimizer: str, model: str, dtype: torch.dtype, **options: Any
) -> tuple[Trained, AveragedModel]:
    """A run, and torch's own average of the states that it went through."""
    trained = train(MemoryStore(), OPTIMIZERS[optimizer], model, dtype=dtype, steps=STEPS, block=3, **options)
    last = trained.run.parameters(STEPS)
    copy = kept.copy(trained.model)
    for state in range(kept.first, STEPS + 1, kept.every):
        trained.run.load(trained.model, state)
        copy.update_parameters(trained.model)
    trained.run.load(trained.model, STEPS)
    assert all(torch.equal(p, last[name]) for name, p in trained.model.named_parameters())
    return trained, copy


WAYS = (KEPT, MODELS, (torch.float64, torch.float32), ("sgd nesterov decay", "adamw amsgrad", "sgd"))
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}  # as for the model itself, see test_completeness


@pytest.mark.parametrize(("kept", "model", "dtype", "optimizer"), covered(*WAYS), ids=str)
def test_terms_add_up_to_the_measurement_of_torchs_average(
    kept: str, model: str, dtype: torch.dtype, optimizer: str, caplog: pytest.LogCaptureFixture
) -> None:
    trained, copy = trained_with(KEPT[kept], optimizer, model, dtype)
    measurement = trained.measurement()
    options = {"loss": trained.case.loss, "progress": False}
    result = attrib.attribute(trained.run, copy.module, averaged(measurement, KEPT[kept].average), **options)
    ledger = result.check(TOLERANCE[dtype])
    with torch.no_grad():
        own, plain = (measurement(model).double().numpy() for model in (copy.module, trained.model))
    # torch's average is rounded at every update, the measurement of it in its type
    np.testing.assert_allclose(ledger.final, own, rtol=100 * torch.finfo(dtype).eps, atol=100 * torch.finfo(dtype).eps)
    assert ledger.identities["split"] <= {torch.float64: 1e-10, torch.float32: 1e-3}[dtype]
    assert ledger.identities["limit"] <= limit_bound(torch.float64)  # the measurement is in float64
    assert not caplog.messages  # the model that is passed is the average: nothing to warn of
    assert abs(plain - own).min() > 1e-6  # it is another model


def weights_of(average: Any) -> np.ndarray:
    """(T + 1, T + 1): a_t = sum_s weights[t, s] theta_s, written out."""
    rows = [np.eye(STEPS + 1)[0]]
    for t in range(1, STEPS + 1):
        if isinstance(average, Ema):
            if t <= average.start:
                rows.append(np.eye(STEPS + 1)[t])
            elif (t - average.start) % average.every:
                rows.append(rows[-1])
            else:
                rows.append(average.decay * rows[-1] + (1 - average.decay) * np.eye(STEPS + 1)[t])
        else:
            states = np.arange(min(average.start, t), t + 1, average.every)
            rows.append(np.eye(STEPS + 1)[states].mean(0))
    return np.array(rows)


@pytest.mark.parametrize(
    ("kept", "name"), crossed([*KEPT, "ema from the start"], ["momentum", "nesterov", "adamw", "amsgrad"])
)
def test_every_contribution_is_the_double_sum_with_the_weights_of_the_average(kept: str, name: str) -> None:
    average = KEPT[kept].average if kept in KEPT else Ema(0.6, start=0)
    kind, options, freeze = CASES[name]
    trained = train(MemoryStore(), lambda p: kind(p, **options), "mlp", steps=STEPS, block=3)
    x, w = np.polynomial.legendre.leggauss(3)
    nodes = list(zip((x + 1) / 2, w / 2, strict=True))
    weights, thetas = weights_of(average), np.array(trained.thetas)
    states, net = weights @ thetas, trained.case.build().double()
    bars = [oracles.path_integral(net, a, b, trained.measurement(), nodes) for a, b in itertools.pairwise(states)]
    # theta_s is theta_0 and the updates before s: a_{t+1} - a_t = sum_r share[t, r] Delta_r
    share = np.array([[(weights[t + 1] - weights[t])[r + 1 :].sum() for r in range(STEPS)] for t in range(STEPS)])
    pulled = [sum(share[t, r] * bars[t] for t in range(STEPS)) for r in range(STEPS)]
    expected = decompose(trained, kind, options, freeze, pulled)
    result = trained.attribute(averaged(trained.measurement(), average), path=attrib.GaussLegendre(3))
    cube = result.by("step", "example", "group")
    for step, (index, *_) in enumerate(trained.batches):
        want = to_run_order(trained, expected.contributions[step])
        got = cube.sel(step=step, example=index.numpy()).values
        np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-9 * np.abs(want).max())
    np.testing.assert_allclose(result.decay.sum("group"), expected.decay, rtol=1e-9, atol=1e-12)
    moved = np.array([bars[t] * (states[t + 1] - states[t]) for t in range(STEPS)]).swapaxes(0, 1)
    np.testing.assert_allclose(result.timeline(), to_run_order(trained, moved), rtol=1e-9, atol=1e-14)
    assert np.abs(result.inherited).max() == 0.0


@pytest.mark.parametrize("kept", ["ema", "swa every second"])
def test_a_window_starts_where_the_average_is(kept: str) -> None:
    average = KEPT[kept].average
    trained = train(MemoryStore(), OPTIMIZERS["adamw"], "mlp", steps=STEPS, block=3)
    measurement = averaged(trained.measurement(), average)
    whole, window = trained.attribute(measurement), trained.attribute(measurement, steps=slice(4, 6))
    window.check(1e-10)
    states = weights_of(average) @ np.array(trained.thetas)
    for state, value in ((4, window.initial), (6, window.final)):
        oracles.put(trained.model, states[state])
        np.testing.assert_allclose(value, trained.measurement()(trained.model).detach(), rtol=1e-12)
    np.testing.assert_allclose(window.timeline(), whole.timeline().isel(update_step=slice(4, 6)), rtol=1e-9, atol=1e-14)
    # with momentum from before, what the parameters are ahead of the average
    assert float(np.abs(window.inherited).sum()) > 1e-3 * float(window.dataset["gross"].sum())


def test_without_momentum_a_window_inherits_what_the_parameters_are_ahead() -> None:
    """Of a measurement that is linear in the parameters: <direction, share of e_a that reaches the average>."""
    average = Ema(0.7)
    trained = train(MemoryStore(), OPTIMIZERS["sgd"], "mlp", steps=STEPS, block=3)

    def linear(model: nn.Module) -> torch.Tensor:
        return torch.stack([model.hidden.weight.sum()])

    result = trained.attribute(averaged(linear, average), steps=slice(4, 6))
    result.check(1e-10)
    ahead = trained.thetas[4] - weights_of(average)[4] @ np.array(trained.thetas)
    part = dict(zip(trained.run.groups, np.split(np.arange(len(ahead)), trained.run.layout.bounds[1:-1]), strict=True))
    expected = (1 - 0.7**2) * ahead[part["hidden.weight"]].sum()  # after two updates 0.7^2 of it are left
    np.testing.assert_allclose(result.inherited.sel(group="hidden.weight"), expected, rtol=1e-10)


def test_blocks_and_pieces_do_not_change_the_account() -> None:
    average = KEPT["ema late, every second"].average
    whole = train(MemoryStore(), OPTIMIZERS["adamw"], "mlp", steps=11, block=11)
    want = whole.attribute(averaged(whole.measurement(), average))
    for block in (1, 2, 4):
        trained = train(MemoryStore(), OPTIMIZERS["adamw"], "mlp", steps=11, block=block, states_every=block)
        got = trained.attribute(averaged(trained.measurement(), average))
        got.check(1e-10)
        np.testing.assert_allclose(
            got.by("step", "example", "group"), want.by("step", "example", "group"), rtol=1e-9, atol=1e-15
        )


@pytest.mark.slow  # a new process, which imports torch; fast, workers are held to one process in test_executor
def test_workers_give_the_same_account(tmp_path: Path) -> None:
    trained = train(tmp_path / "run", OPTIMIZERS["adamw"], "mlp", steps=STEPS, block=3)
    measurement = averaged(trained.measurement(), Ema(0.7))
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        got = trained.attribute(measurement, executor=pool)
    got.check(1e-10)
    want = trained.attribute(measurement)
    np.testing.assert_allclose(got.by("step", "example", "group"), want.by("step", "example", "group"), rtol=1e-12)


def test_moves_split_the_change_of_the_average(caplog: pytest.LogCaptureFixture) -> None:
    """Also without momentum: a gradient acts on the average at every later update."""
    trained = train(MemoryStore(), OPTIMIZERS["sgd"], "mlp", steps=STEPS, block=3)
    measurement = averaged(trained.measurement(), Ema(0.7))
    found = list(attrib.moves(trained.run, trained.model, measurement, range(2, 5), loss=trained.case.loss))
    assert len(found) == 3
    curve = trained.attribute(measurement).curve.values
    for move in found:
        np.testing.assert_allclose(move.change, np.diff(curve)[:, move.step], rtol=1e-9, atol=1e-14)
        terms = move.contributions.sum(1) + move.decay + move.inherited
        np.testing.assert_allclose(terms, move.change, rtol=1e-9, atol=1e-13)


def test_what_is_no_average_is_refused() -> None:
    measurement = attrib.measure.log_prob(torch.zeros(2, 2), torch.zeros(2, dtype=torch.int64))
    for average in (Ema, 0.9, None):
        with pytest.raises(MeasurementError, match="that is no average"):
            averaged(measurement, average)  # type: ignore[arg-type]
    with pytest.raises(MeasurementError, match="decay is no share"):
        Ema(1.5)
    with pytest.raises(MeasurementError, match="start is no count"):
        Swa(-1)
    trained = train(MemoryStore(), OPTIMIZERS["sgd"], "mlp", steps=2)
    with pytest.raises(MeasurementError, match=r"Pass its \.measurement"):
        attrib.evaluate(trained.run, trained.model, averaged(trained.measurement(), Ema(0.9)))


def test_another_model_than_the_average_is_said(caplog: pytest.LogCaptureFixture) -> None:
    trained, _ = trained_with(KEPT["ema"], "adamw", "mlp", torch.float64)
    with torch.no_grad():
        trained.model.hidden.weight += 1e-3
    trained.attribute(averaged(trained.measurement(), Ema(0.7)))
    assert any("the model holds other parameters" in message for message in caplog.messages)
