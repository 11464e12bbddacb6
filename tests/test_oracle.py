"""Every single contribution against a double sum over steps with batch-size-one gradients."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import oracles
import oracles_optim as plain
import pytest
import torch
import xarray as xr
from cases import (
    ADADELTA,
    ADAFACTOR,
    ADAGRAD,
    ADAM,
    ADAMAX,
    ADAMW,
    ASGD,
    MODELS,
    MUON,
    NADAM,
    OPTIMIZERS,
    RADAM,
    RMSPROP,
    RPROP,
    SGD,
    covering,
    in_train_mode,
    matrices,
)
from torch import nn
from training import train
from zarr.storage import MemoryStore

import attrib


def muon_and_adamw(
    parameters: list[nn.Parameter], lr: float, adam_lr: float, match: bool = False, **options: Any
) -> Any:
    adjust = "match_rms_adamw" if match else None
    return matrices(parameters, partial(MUON, lr=lr, adjust_lr_fn=adjust, **options), partial(ADAMW, lr=adam_lr))


CASES: dict[str, tuple[Any, dict[str, Any], Any]] = {
    "sgd": (SGD, dict(lr=0.1), oracles.frozen_sgd),
    "momentum": (SGD, dict(lr=0.1, momentum=0.9, dampening=0.3, weight_decay=0.1), oracles.frozen_sgd),
    "nesterov": (SGD, dict(lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1), oracles.frozen_sgd),
    "adam": (ADAM, dict(lr=0.02, weight_decay=0.1), oracles.frozen_adam),
    "amsgrad": (ADAM, dict(lr=0.02, betas=(0.5, 0.6), amsgrad=True), oracles.frozen_adam),
    "adamw": (ADAMW, dict(lr=0.02, weight_decay=0.5, betas=(0.9, 0.98)), oracles.frozen_adam),
    "rmsprop": (RMSPROP, dict(lr=0.02, alpha=0.9, weight_decay=0.1), plain.frozen_rmsprop),
    "rmsprop centered": (RMSPROP, dict(lr=0.005, momentum=0.9, centered=True, weight_decay=0.1), plain.frozen_rmsprop),
    "adagrad": (
        ADAGRAD,
        dict(lr=0.1, lr_decay=0.2, initial_accumulator_value=0.1, weight_decay=0.1),
        plain.frozen_adagrad,
    ),
    "adadelta": (ADADELTA, dict(lr=1.0, eps=1e-4, weight_decay=0.1), plain.frozen_adadelta),
    "adamax": (ADAMAX, dict(lr=0.02, betas=(0.7, 0.8), weight_decay=0.1), plain.frozen_adamax),
    "nadam": (NADAM, dict(lr=0.02, weight_decay=0.1, momentum_decay=0.1), plain.frozen_nadam),
    "nadam decoupled": (NADAM, dict(lr=0.02, weight_decay=0.5, decoupled_weight_decay=True), plain.frozen_nadam),
    "radam": (RADAM, dict(lr=0.02, weight_decay=0.1), plain.frozen_radam),
    "radam decoupled": (RADAM, dict(lr=0.02, weight_decay=0.5, decoupled_weight_decay=True), plain.frozen_radam),
    "asgd": (ASGD, dict(lr=0.1, lambd=0.1, alpha=0.6, t0=2, weight_decay=0.1), plain.frozen_asgd),
    "rprop": (RPROP, dict(lr=0.01, etas=(0.3, 2.0), step_sizes=(0.005, 0.03)), plain.frozen_rprop),
    "adafactor": (ADAFACTOR, dict(lr=0.1, weight_decay=0.5), plain.frozen_adafactor),
    "muon": (muon_and_adamw, dict(lr=0.05, adam_lr=0.01, weight_decay=0.5), plain.frozen_muon_and_adamw),
    "muon matched": (
        muon_and_adamw,
        dict(lr=0.05, adam_lr=0.01, nesterov=False, momentum=0.8, match=True),
        plain.frozen_muon_and_adamw,
    ),
}

if "lion" in OPTIMIZERS:
    from lion_pytorch import Lion

    CASES["lion"] = (Lion, dict(lr=0.01, betas=(0.8, 0.9), weight_decay=0.5), plain.frozen_lion)

if "schedule-free sgd" in OPTIMIZERS:
    from schedulefree import AdamWScheduleFree, SGDScheduleFree

    CASES["schedule-free sgd"] = (
        lambda p, **o: in_train_mode(SGDScheduleFree(p, **o)),
        dict(lr=0.1, momentum=0.8, weight_decay=0.1, r=0.5, warmup_steps=2),
        plain.frozen_schedule_free_sgd,
    )
    CASES["schedule-free adamw"] = (
        lambda p, **o: in_train_mode(AdamWScheduleFree(p, **o)),
        dict(lr=0.02, weight_decay=0.5, betas=(0.8, 0.9)),
        plain.frozen_schedule_free_adamw,
    )


def decompose(trained, kind, options, freeze, bars) -> oracles.Decomposition:  # type: ignore[no-untyped-def]
    """The oracle's terms, shares being those of the mean loss."""
    case = trained.case
    model = case.build().double()
    shares = [
        oracles.single_gradients(model, theta, case.loss, (x, y)) / len(x)
        for theta, (_, x, y) in zip(trained.thetas, trained.batches, strict=False)
    ]
    extra: dict[str, Any] = {} if kind is not ADAMW else {"decoupled": True}
    if freeze not in (oracles.frozen_sgd, oracles.frozen_adam):
        extra["shapes"] = [tuple(p.shape) for p in model.parameters()]
    if freeze is plain.frozen_muon_and_adamw:
        extra["after"] = trained.thetas[-1]
    rest = {k: v for k, v in options.items() if k != "lr"}
    frozen = freeze([s.sum(0) for s in shares], trained.thetas[:-1], trained.rates, **rest, **extra)
    return oracles.contributions(frozen, bars, shares, trained.thetas)


def to_run_order(trained, values: np.ndarray) -> np.ndarray:  # type: ignore[no-untyped-def]
    """(..., P) in model order -> (..., K), summed over tensors in the run's order."""
    sizes = {n: p.numel() for n, p in trained.model.named_parameters()}
    ends = np.cumsum([0, *sizes.values()])
    sums = {n: values[..., a:b].sum(-1) for n, a, b in zip(sizes, ends[:-1], ends[1:], strict=True)}
    return np.stack([sums[n] for n in trained.run.groups], -1)


# those whose update looks at the shape of a tensor with every model, the others with one in turn
SHAPED = ("adafactor", "muon", "muon matched")
IN_TURN = covering(CASES, MODELS)
SHAPES = [row for row in covering(SHAPED, MODELS, whole=2) if row not in IN_TURN]


@pytest.mark.parametrize(("name", "model"), [*IN_TURN, *(pytest.param(*r, marks=pytest.mark.slow) for r in SHAPES)])
def test_every_contribution_is_the_double_sum(name: str, model: str, tmp_path: Path) -> None:
    kind, options, freeze = CASES[name]
    trained = train(
        MemoryStore(),
        lambda p: kind(p, **options),
        model,
        scheduler=lambda r: torch.optim.lr_scheduler.StepLR(r, 2, 0.7),
    )
    x, w = np.polynomial.legendre.leggauss(3)
    nodes = list(zip((x + 1) / 2, w / 2, strict=True))
    net = trained.case.build().double()
    buffers = dict(trained.model.named_buffers())
    for n, b in net.named_buffers():
        b.copy_(buffers[n])
    bars = [
        oracles.path_integral(net, a, b, trained.measurement(), nodes)
        for a, b in zip(trained.thetas[:-1], trained.thetas[1:], strict=True)
    ]
    expected = decompose(trained._replace(case=trained.case._replace(build=lambda: net)), kind, options, freeze, bars)
    result = trained.attribute(path=attrib.GaussLegendre(3), cube=str(tmp_path / "cube"))
    cube = xr.open_zarr(tmp_path / "cube", chunks=None, consolidated=False)
    for step, (index, *_) in enumerate(trained.batches):
        want = to_run_order(trained, expected.contributions[step])
        got = cube["contribution"].values[:, step, : len(index)]
        np.testing.assert_array_equal(cube["index"].values[step, : len(index)], index.numpy())
        # the same sums in another order, in float64
        np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-9 * np.abs(want).max())
    np.testing.assert_allclose(result.decay.sum("group"), expected.decay, rtol=1e-9, atol=1e-12)
    total = np.sum([c.sum((1, 2)) for c in expected.contributions], axis=0)
    np.testing.assert_allclose(result.by(), total, rtol=1e-9)


def test_secant_contributions_are_those_of_the_rule_written_by_hand(tmp_path: Path) -> None:
    """A ReLU network without biases, one query; Gbar from `relu_secant`, contributions from the double sum."""

    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 8, bias=False), nn.Linear(8, 3, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(torch.relu(self.first(x)))

    MODELS_CASE = MODELS["mlp"]._replace(build=Small, data=lambda n: (torch.randn(n, 4), torch.randint(0, 3, (n,))))
    kind, options, freeze = CASES["adamw"]
    MODELS["small"] = MODELS_CASE
    try:
        trained = train(tmp_path / "run", lambda p: kind(p, **options), "small")
    finally:
        del MODELS["small"]
    x, y = trained.data[0][0], int(trained.data[1][0])
    bars = []
    for a, b in zip(trained.thetas[:-1], trained.thetas[1:], strict=True):
        w1 = (a[:32].reshape(8, 4), b[:32].reshape(8, 4))
        w2 = (a[32:].reshape(3, 8), b[32:].reshape(3, 8))
        bars.append(np.concatenate([g.reshape(-1) for g in oracles.relu_secant(w1, w2, x.numpy(), y)])[None])
    expected = decompose(trained, kind, options, freeze, bars)
    result = trained.attribute(trained.measurement(1))
    cube = result.by("step", "example", "group")
    for step, (index, *_) in enumerate(trained.batches):
        want = to_run_order(trained, expected.contributions[step])
        # the hand-written rule takes plain difference quotients: eps / change, with changes of about 0.02
        got = cube.sel(step=step, example=index.numpy()).values
        np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-9 * np.abs(want).max())
