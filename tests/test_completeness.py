"""initial + every term = final: all optimizers, all models, all captures, both precisions."""

from pathlib import Path

import numpy as np
import pytest
import torch
from cases import FEW, MODELS, OPTIMIZERS, covering, few_first
from torch import nn
from training import train
from zarr.storage import MemoryStore

import attrib
from attrib.checks.intake import CAPTURES

# of the largest term: float64 rounding over a few thousand operations; float32 replay against float32 training
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


# an optimizer whose update looks at the shape of a tensor meets every model, the others one in turn
SHAPED = [name for name in OPTIMIZERS if "muon" in name or "adafactor" in name]
ROWS = few_first(OPTIMIZERS, MODELS, TOLERANCE, CAPTURES, few=FEW)
SHAPES = covering(SHAPED, MODELS, TOLERANCE, CAPTURES, whole=2)


@pytest.mark.parametrize(
    ("optimizer", "model", "dtype", "capture"),
    [*ROWS, *(pytest.param(*row, marks=pytest.mark.slow) for row in SHAPES if row not in ROWS)],
    ids=str,
)
def test_terms_add_up(optimizer: str, model: str, dtype: torch.dtype, capture: str) -> None:
    ledger = train(MemoryStore(), OPTIMIZERS[optimizer], model, capture, dtype).attribute().check(TOLERANCE[dtype])
    assert float(abs(ledger.final - ledger.initial).min()) > 1e-4  # something was learned: the check is not vacuous


# every model, and every type, with an optimizer of either sort: a capture holds what the layers give, whatever becomes of it
KINDS = ("sgd nesterov decay", "adamw amsgrad", "muon + adamw")


@pytest.mark.parametrize(("model", "dtype", "optimizer"), few_first(MODELS, TOLERANCE, KINDS, few=("mlp",)), ids=str)
def test_terms_add_up_and_all_captures_agree(model: str, dtype: torch.dtype, optimizer: str) -> None:
    results = []
    for capture in CAPTURES:
        result = train(MemoryStore(), OPTIMIZERS[optimizer], model, capture, dtype).attribute()
        result.check(TOLERANCE[dtype])
        results.append(result)
    first, *others = (r.by("step", "example", "group").values for r in results)
    for other in others:
        assert np.abs(first - other).max() <= TOLERANCE[dtype] * np.abs(first).sum()


@pytest.mark.parametrize("path", [attrib.GaussLegendre(16), attrib.Midpoint(30)])
def test_quadrature_is_complete_as_far_as_its_nodes_reach(path: attrib.path.Path) -> None:
    trained = train(MemoryStore(), OPTIMIZERS["adamw"], "gpt")
    trained.attribute(path=path).check(1e-4)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_one_compute_type_for_everything(dtype: torch.dtype) -> None:
    trained = train(MemoryStore(), OPTIMIZERS["adamw"], "cnn", dtype=torch.float32)
    trained.attribute(dtype=dtype).check(1e-5)


def test_any_callable_is_a_measurement() -> None:
    trained = train(MemoryStore(), OPTIMIZERS["sgd momentum"])

    def spectrum(model: nn.Module) -> torch.Tensor:
        return torch.stack([model.hidden.weight.square().sum(), model.output.bias.sum()])

    result = trained.attribute(spectrum)
    result.check(1e-10)
    assert np.abs(result.by("group").sel(group="embedding.weight")).max() < 1e-12 * np.abs(result.by()).max() + 1e-12


def test_dropout_is_replayed_with_its_own_random_numbers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 3)).double()
    x, y = torch.randn(8, 4).double(), torch.randint(0, 3, (8,))
    loss = MODELS["mlp"].loss
    for capture in CAPTURES:
        with attrib.record(
            torch.optim.AdamW(model.parameters()), model, loss, tmp_path / capture, capture, check_every=1
        ) as recorder:
            for _ in range(5):
                recorder.zero_grad()
                loss(model, x, y).mean().backward()
                recorder.step(torch.arange(8), x, y)
        model.eval()
        before = torch.get_rng_state()
        result = attrib.attribute(
            attrib.open_run(tmp_path / capture), model, attrib.measure.loss(x[:2], y[:2]), loss=loss, progress=False
        )
        assert torch.equal(before, torch.get_rng_state())
        assert not model.training
        result.check(1e-10)
        model.train()


def test_parameters_without_gradient_stand_still(tmp_path: Path) -> None:
    """Tensors that a step skips (p.grad None) keep their own age, as in torch."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.Linear(3, 2), "b": nn.Linear(3, 2)}).double()

    def loss(m: nn.ModuleDict, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (m["a" if y[0] == 0 else "b"](x) ** 2).sum(1)

    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    with attrib.record(optimizer, model, loss, tmp_path / "run", check_every=1) as recorder:
        for step in range(6):
            x, y = torch.randn(4, 3).double(), torch.full((4,), int(step in (1, 4)))
            recorder.zero_grad()
            loss(model, x, y).sum().backward()
            recorder.step(torch.arange(4), x, y)
    x = torch.randn(2, 3).double()
    result = attrib.attribute(
        attrib.open_run(tmp_path / "run"), model, lambda m: m["a"](x)[:, 0] + m["b"](x)[:, 1], loss=loss, progress=False
    )
    result.check(1e-10)
    assert float(np.abs(result.by("step", "group").sel(step=0, group="b.weight")).max()) == 0.0
