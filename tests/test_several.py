"""Steps that are taken together: the contributions that they have one by one."""

from pathlib import Path
from typing import Any

import numpy as np
import oracles
import pytest
import torch
from cases import LAYERS
from test_gradients import layout_of, loss
from torch import Tensor, nn

import attrib
from attrib.batch import Batch
from attrib.gradients import ExampleGradients
from attrib.gradients.several import LEAST, MOST, at_once


@pytest.mark.parametrize("common", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_steps_taken_together_have_the_shares_of_single_examples(name: str, common: bool) -> None:
    torch.manual_seed(0)
    build, shape = LAYERS[name]
    model = build().double()
    layout, theta = layout_of(model)
    queries = 1 if "embedding" in name else 2  # several of a table go by what is looked up
    thetas = torch.stack([theta * (1 + 0.03 * n) for n in range(3)])
    inputs = [torch.randn(5, *shape, dtype=torch.float64) for _ in range(1 if common else 3)]
    directions = torch.randn(3, queries, layout.size, dtype=torch.float64)
    shares = ExampleGradients(loss, model, layout, torch.float64)
    together = shares.contract_steps(thetas, [Batch.of((x,)) for x in inputs], directions)
    assert together is not None
    for n, (t, u) in enumerate(zip(thetas, directions, strict=True)):
        x = inputs[0 if common else n]
        gradients = oracles.single_gradients(model, t.numpy(), loss, (x,))
        products = u.numpy()[:, None] * gradients[None]
        want = np.stack([products[..., part].sum(-1) for _, part in layout.slices()], -1)
        # sums of at most a few hundred float64 terms
        np.testing.assert_allclose(
            together[1][n], want, rtol=1e-10, atol=1e-10 * np.abs(products).sum(-1).max(), err_msg=f"step {n}"
        )
        torch.testing.assert_close(together[0][n], shares.contract(t, (x,), u)[0])


def test_so_many_steps_are_taken_together_as_stay_near_the_cache() -> None:
    assert at_once(1.0, 100) == MOST
    assert at_once(1.0, LEAST + 1) == LEAST  # a power of two
    assert at_once(1.0, LEAST - 1) == 1
    assert at_once(1e9, 100) == 1


def cross_entropy(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(x), y, reduction="none")


def network(kind: str) -> nn.Module:
    torch.manual_seed(0)
    between = {"dropout": nn.Dropout(0.5), "batch norm": nn.BatchNorm1d(8)}.get(kind, nn.ReLU())
    return nn.Sequential(nn.Linear(6, 8), between, nn.Linear(8, 3))


def recorded(folder: Path, model: nn.Module, kind: str, same: bool = False) -> attrib.Run:
    """24 steps, a shorter batch among them; of "passes" two batches each."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    with attrib.record(optimizer, model, cross_entropy, folder / "run.zarr", block=24) as recorder:
        for step in range(24):
            torch.manual_seed(0 if same else step)
            size = 4 if step == 5 and not same else 7
            recorder.zero_grad()
            for part in range(2 if kind == "passes" else 1):
                x, y = torch.randn(size, 6), torch.randint(0, 3, (size,))
                index = torch.arange(size) + 10 * part + (0 if same else 3 * step)
                recorder.batch(index, x, y)
                cross_entropy(model, x, y).mean().backward()
            recorder.step()
    return attrib.open_run(folder / "run.zarr")


@pytest.mark.parametrize("kind", ["plain", "same batch", "passes", "dropout", "batch norm"])
def test_a_run_has_the_same_account_by_several_steps_and_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    model = network(kind)
    run = recorded(tmp_path, model, kind, kind == "same batch")
    torch.manual_seed(9)
    measurement = attrib.measure.log_prob(torch.randn(3, 6), torch.tensor([0, 1, 2]))
    taken: list[int] = []
    contract = ExampleGradients.contract_steps

    def noted(self: Any, theta: Tensor, *given: Any) -> Any:
        found = contract(self, theta, *given)
        taken.append(0 if found is None else len(theta))
        return found

    monkeypatch.setattr(ExampleGradients, "contract_steps", noted)
    attrib.open_run(tmp_path / "run.zarr").load(model, run.steps)
    found = attrib.attribute(run, model.eval(), measurement, loss=cross_entropy, progress=False)
    assert taken == {"plain": [16, 16], "same batch": [16, 16]}.get(kind, [])
    monkeypatch.setattr("attrib.gradients.examples.at_once", lambda *given: 1)
    want = attrib.attribute(run, model, measurement, loss=cross_entropy, progress=False)
    assert len(taken) < 3
    found.check(1e-5)
    for name, values in want.dataset.items():
        if values.dtype.kind == "f" and not str(name).endswith("identity"):
            # float32 sums of 8 terms or fewer, in another order: a few roundings of each share
            bound = 1e-5 * float(np.abs(want.dataset["sizes"]).max())
            np.testing.assert_allclose(found.dataset[name], values, rtol=0, atol=bound, err_msg=str(name))


def test_steps_that_come_out_otherwise_together_are_taken_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vmap = torch.vmap

    def wrong(function: Any, *given: Any, **options: Any) -> Any:
        mapped = vmap(function, *given, **options)
        return lambda *inputs: tuple(t.roll(1, 0) for t in mapped(*inputs))  # each step has another's

    monkeypatch.setattr(torch, "vmap", wrong)
    model, thetas = network("plain"), []
    layout, theta = layout_of(model)
    thetas = torch.stack([theta * (1 + 0.1 * n) for n in range(3)])
    batches = [Batch.of((torch.randn(5, 6), torch.arange(5) % 3)) for _ in range(3)]
    shares = ExampleGradients(cross_entropy, model, layout, torch.float32)
    assert shares.contract_steps(thetas, batches, torch.randn(3, 1, layout.size)) is None


def test_what_an_adapter_tells_nothing_of_at_its_start_is_learnt_late(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its second matrix is zero before the first step, and what it returns does not tell whose is which row."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 3, bias=False), nn.Linear(3, 4, bias=False)).double()
    nn.init.zeros_(model[1].weight)
    x, y = torch.randn(6, 6, 6, dtype=torch.float64), torch.randint(0, 4, (6, 6))  # as many positions as examples

    def loss(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(model(x).movedim(-1, 1), y, reduction="none").mean(1)

    with attrib.record(torch.optim.SGD(model.parameters(), lr=0.1), model, loss, tmp_path / "run") as recorder:
        for _ in range(20):
            recorder.zero_grad()
            loss(model, x, y).mean().backward()
            recorder.step(torch.arange(6), x, y)
    run = attrib.open_run(tmp_path / "run")
    caplog.clear()
    for steps in (slice(0, 20), slice(0, 12), slice(0, 4)):  # together, and one by one
        attrib.attribute(run, model, lambda m: -loss(m, x[:1], y[:1]), loss=loss, steps=steps, progress=False).check()
    assert "slow" not in caplog.text
