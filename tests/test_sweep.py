"""The trunk: any question, any way to cut the steps, one reading of the store."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import OPTIMIZERS, crossed
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from training import Trained, train

from attrib.account import Account
from attrib.executor import Serial
from attrib.optim import pullback
from attrib.path import Measured
from attrib.sensitivity import Adjoint, Products, Terms, Traced
from attrib.shares import Shares
from attrib.steps import Steps
from attrib.store import Reader
from attrib.sweep import Work, summed_sweep
from attrib.tally import Tally, total


@dataclass(frozen=True)
class Fixed:
    """A toy: one direction for all steps, so that a contribution is how far the example's gradient goes along it."""

    direction: Tensor  # (Q, P)
    at_once: int = 1

    def begin(self) -> Adjoint:
        return Adjoint(torch.zeros_like(self.direction))

    def prepare(self, steps: Steps) -> None:
        return None

    def scan(self, steps: Steps, prepared: None, adjoint: Adjoint) -> tuple[Traced, Adjoint]:
        return Traced(self.direction.expand(len(steps), -1, -1)), adjoint

    def terms(self, steps: Steps, traced: Traced, products: Products) -> Terms:
        return Terms(rows={"along": products.gradient})

    def inherited(self, steps: Steps, adjoint: Adjoint) -> np.ndarray:
        return np.zeros((len(self.direction), len(steps.block.trajectory.layout.names)))


@dataclass(frozen=True)
class Influence:
    """The derivative of the final measurement by the weight of each example's loss, for plain and momentum SGD: the adjoint
    is carried through the parameters, lambda <- (1 - decoupled) lambda + coupled U + H U."""

    query: Measured
    shares: Shares
    at_once: int = 1

    def begin(self) -> Adjoint:
        final = [self.query.gradient(self.query.example, row) for row in torch.eye(self.query.count).double()]
        return Adjoint(torch.zeros(self.query.count, self.query.layout.size).double(), torch.stack(final))

    def prepare(self, steps: Steps) -> None:
        return None

    def scan(self, steps: Steps, prepared: None, adjoint: Adjoint) -> tuple[Traced, Adjoint]:
        (step,), ((parts, _),) = steps, steps.updates
        assert adjoint.theta is not None
        sensitivity, state = pullback(parts, adjoint.state, adjoint.theta)
        theta = self.shares.curved(step, sensitivity).hessian
        for part in parts:
            at, k = part.entries, part.coefficients
            theta[:, at] += (1 - k.decoupled) * adjoint.theta[:, at] + k.coupled * sensitivity[:, at]
        return Traced(sensitivity[None]), Adjoint(state, theta)

    def terms(self, steps: Steps, traced: Traced, products: Products) -> Terms:
        return Terms()

    def inherited(self, steps: Steps, adjoint: Adjoint) -> np.ndarray:
        return np.zeros((self.query.count, len(self.query.layout.names)))


def work_of(trained: Trained, sensitivity: Any, shares: Shares, window: range) -> Work:
    names, itself = trained.run.groups, np.eye(len(trained.run.groups))
    return Work(
        trained.run, window, sensitivity, shares, Account(names, itself, (("step", "example", "group"),), False, 1e-6)
    )


def shares_of(trained: Trained) -> Shares:
    return Shares(
        trained.run, trained.model, trained.case.loss, torch.float64, 1 << 26, np.eye(len(trained.run.groups))
    )


def gradients(trained: Trained, step: int, weights: Tensor) -> np.ndarray:
    """(P,): of the losses of a step's batch, weighted, by autograd alone."""
    model = trained.case.build().double()
    trained.run.load(model, step)
    losses = trained.case.loss(model, *trained.batches[step][1:])
    found = torch.autograd.grad((losses * weights).sum() / len(losses), list(model.parameters()))
    return torch.cat([g.flatten() for g in found]).numpy()


def test_another_question_is_one_class(tmp_path: Path) -> None:
    trained = train(tmp_path / "run", OPTIMIZERS["adamw"], steps=6)
    direction = torch.randn(2, trained.run.layout.size, dtype=torch.float64)
    work = work_of(trained, Fixed(direction), shares_of(trained), range(1, 6))
    tally, inherited, _ = summed_sweep(work, Serial(work), lambda tally: tally, lambda: False)
    assert tally is not None
    assert inherited is not None
    assert tally.steps == range(1, 6)
    assert not inherited.any()
    for step in tally.steps:
        ids = trained.batches[step][0]
        for slot, i in enumerate(ids.tolist()):
            want = direction.numpy() @ gradients(trained, step, torch.eye(len(ids))[slot].double())
            at = np.flatnonzero(tally.examples == i)[0]
            got = tally.marginals["step", "example", "group"][:, step - 1, at].sum(-1)
            np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-13)
    along = tally.rows["along"].sum(-1)
    np.testing.assert_allclose(tally.marginals["step", "example", "group"].sum((2, 3)), along, rtol=1e-10, atol=1e-12)


RATES = {
    "sgd": {"lr": 0.1},
    "momentum and decay": {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.05},
    "nesterov": {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
}


@pytest.mark.parametrize(("rates", "model"), crossed(RATES, ["mlp", "gpt"]))
def test_influence_is_the_derivative_of_training_by_the_weight_of_an_example(
    rates: str, model: str, tmp_path: Path
) -> None:
    """Against central differences of training again: of order e^2 = 1e-10 and 1e-16 / e = 1e-11 off, times how much training
    amplifies, relative to the largest."""
    options = RATES[rates]
    trained = train(tmp_path / "run", lambda p: torch.optim.SGD(p, **options), model, steps=6, examples=8)
    measurement = trained.measurement(2)
    query = Measured(trained.model, measurement, trained.run.layout, torch.float64, trained.run.vector(6))
    shares = shares_of(trained)
    work = work_of(trained, Influence(query, shares), shares, range(6))
    tally = summed_sweep(work, Serial(work), lambda tally: tally, lambda: False).tally
    assert tally is not None
    found = tally.marginals["step", "example", "group"].sum((1, 3))

    def again(example: int, weight: float) -> np.ndarray:
        net = trained.case.build().double()
        trained.run.load(net, 0)
        optimizer = torch.optim.SGD(net.parameters(), **options)
        for index, x, y in trained.batches:
            optimizer.zero_grad()
            weights = torch.ones(len(index)).double() + (weight - 1) * (index == example)
            (weights * trained.case.loss(net, x, y)).mean().backward()
            optimizer.step()
        return measurement(net).detach().numpy()

    ids, e = tally.examples, 1e-5
    want = np.stack([(again(i, 1 + e) - again(i, 1 - e)) / (2 * e) for i in ids], 1)
    assert float(np.abs(found - want).max()) <= 1e-6 * float(np.abs(want).max())


@given(st.data())
def test_tallies_sum_however_they_are_cut(data: st.DataObject) -> None:
    """`+` is associative over neighbours, and the whole is that of all pieces at once."""
    random = np.random.default_rng(data.draw(st.integers(0, 2**31)))
    count = data.draw(st.integers(2, 6))
    pieces = []
    for step in range(count):
        ids = np.sort(random.choice(6, 4, replace=False))
        values = random.normal(size=(2, 1, 4, 3))
        marginals = {
            ("example",): values.sum((1, 3)),
            ("step", "example"): values.sum(3),
            ("step", "group"): values.sum(2),
        }
        rows, states = {"decay": random.normal(size=(2, 1, 3))}, {"curve": np.array([[step, step + 1.0]] * 2)}
        sums, gaps = {"gross": random.random(2)}, {"batch": random.random(1)}
        failures = {"split": f"at {step}"} if step % 2 else {}
        pieces.append(Tally(range(step, step + 1), ids, marginals, rows, states, sums, gaps, failures))
    ids = np.unique(np.concatenate([p.examples for p in pieces]))
    whole = total(reversed(pieces), range(count), ids)
    assert whole is not None
    cut = data.draw(st.integers(1, count - 1))
    halves = [pieces[:cut], pieces[cut:]]
    joined = [part[0] if len(part) == 1 else sum_of(part) for part in halves]
    for both in (joined[0] + joined[1], joined[1] + joined[0]):
        assert both.steps == whole.steps
        assert np.array_equal(both.examples, whole.examples)
        for name in ("marginals", "rows", "states", "sums", "gaps"):
            for key, values in getattr(whole, name).items():
                np.testing.assert_allclose(getattr(both, name)[key], values, rtol=1e-13, atol=1e-14)
        assert both.failures == whole.failures
    with pytest.raises(ValueError, match="no neighbours"):
        pieces[0] + replace(pieces[0], steps=range(5, 6))


def sum_of(pieces: list[Tally]) -> Tally:
    found = pieces[0]
    for piece in pieces[1:]:
        found = found + piece
    return found


def test_the_store_is_read_once_however_often_the_steps_are_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prepared and contracted, each array of each block once."""
    trained = train(tmp_path / "run", OPTIMIZERS["adamw"], steps=9, block=3)
    read, seen = Reader.read, []

    def noted(self: Reader, name: str, rows: Any = None, *more: Any) -> np.ndarray:
        seen.append((name, str(rows)))
        return read(self, name, rows, *more)

    monkeypatch.setattr(Reader, "read", noted)
    blocks = ("gradient", "hyper", "index", "row", "passes")
    trained.attribute()
    for name in blocks:
        of_blocks = [rows for known, rows in seen if known == name and rows != "slice(0, 9, None)"]
        assert sorted(of_blocks) == [f"slice({a}, {a + 3}, None)" for a in (0, 3, 6)], name


@pytest.mark.parametrize("length", [1, 2, 3, 100])
def test_pieces_are_the_steps_of_a_window_once_each_and_lie_in_one_block(length: int, tmp_path: Path) -> None:
    trained = train(tmp_path / "run", OPTIMIZERS["sgd"], steps=10, block=4)
    work = work_of(trained, Fixed(torch.zeros(1, 1)), shares_of(trained), range(2, 9))
    pieces = work.pieces(length)
    assert [step for piece in reversed(pieces) for step in piece] == list(range(2, 9))
    assert all(len(piece) <= length and piece[0] // 4 == piece[-1] // 4 for piece in pieces)
    steps = work.steps(pieces[0])
    assert [step.number for step in steps] == list(pieces[0])
    assert steps[-1].number == pieces[0][-1]
    for step in steps:
        assert torch.equal(step.theta, trained.run.vector(step.number))
        assert step.ids.tolist() == trained.run.index(step.number).tolist()
