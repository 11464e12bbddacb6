"""Batch norm in train mode, and other buffers that training changes: recorded, accounted for, replayed."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attrib

SIZE, STEPS = 8, 5


def cross_entropy(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y, reduction="none")


def small(seed: int = 0, act: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), act(), nn.Linear(6, 3)).double()


def data(n: int = 24) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 4, generator=generator).double(), torch.randint(0, 3, (n,), generator=generator)


X, Y = data()
MEASURED = attrib.measure.log_prob(X[:3], Y[:3])


class Trained:
    """A run of a model, with all that it held after every step; and between steps it is evaluated."""

    def __init__(self, store: Path, model: nn.Module | None = None, parts: int = 1, **options: Any) -> None:
        self.model, self.store = small() if model is None else model, store
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2)
        self.parts, self.states = parts, [self.state()]
        self.recorder = attrib.record(self.optimizer, self.model, cross_entropy, store, **options)

    def state(self) -> dict[str, Tensor]:
        return {name: t.clone() for name, t in self.model.state_dict().items()}

    def steps(self, first: int, stop: int) -> "Trained":
        for step in range(first, stop):
            self.model.train()
            index = torch.arange(SIZE) + SIZE * (step % 3)
            self.recorder.zero_grad()
            for part in index.chunk(self.parts):
                self.recorder.batch(part, X[part], Y[part])
                (cross_entropy(self.model, X[part], Y[part]).mean() / self.parts).backward()
            self.recorder.step()
            self.states.append(self.state())
            self.model.eval()
            self.model(X)
        return self

    def run(self) -> attrib.Run:
        self.recorder.close()
        return attrib.open_run(self.store)


@pytest.mark.parametrize(
    "options",
    [{}, {"states_every": 3, "block": 2}, {"capture": "gradients"}, {"capture": "factors"}, {"constants": "digest"}],
    ids=str,
)
def test_a_run_with_running_statistics_is_restored_and_complete(options: dict[str, Any], tmp_path: Path) -> None:
    trained = Trained(tmp_path / "run", parts=1 if options else 2, **options).steps(0, STEPS)
    run, model = trained.run(), small(3)
    for step, state in enumerate(trained.states):
        run.load(model, step)
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    result = attrib.attribute(run, model.eval(), MEASURED, loss=cross_entropy, progress=False)
    ledger = result.check(1e-10)
    values = [F.log_softmax(_loaded(state).eval()(X[:3]), 1).gather(1, Y[:3, None])[:, 0] for state in trained.states]
    # both are float64 passes over the same numbers, in another order
    np.testing.assert_allclose(result.curve, torch.stack(values, 1).detach(), rtol=0, atol=1e-13)
    assert float(np.abs(ledger.buffers).min()) > 1e-4
    total = result.by().values + sum(
        result.dataset[n].sum(result.dataset[n].dims[1:]).values for n in ("decay", "buffers")
    )
    np.testing.assert_allclose(total, result.final - result.initial, rtol=0, atol=1e-10)
    assert attrib.verify(run, progress=False, model=model.train(), loss=cross_entropy).failure is None


def _loaded(state: dict[str, Tensor]) -> nn.Module:
    model = small()
    model.load_state_dict(state)
    return model
