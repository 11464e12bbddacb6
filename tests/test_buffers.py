"""Batch norm in train mode, and other buffers that training changes: recorded, accounted for, replayed."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import crossed
from torch import Tensor, nn

import attrib
from attrib.report import figures

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


OPTIONS: list[dict[str, Any]] = [
    *({}, {"states_every": 3, "block": 2}, {"capture": "gradients"}, {"capture": "factors"}, {"constants": "digest"})
]


@pytest.mark.parametrize("options", crossed(OPTIONS, fast=[(options,) for options in OPTIONS[:2]]))
def test_a_run_with_running_statistics_is_restored_and_complete(options: dict[str, Any], tmp_path: Path) -> None:
    trained = Trained(tmp_path / "run", parts=1 if options else 2, **options).steps(0, STEPS)
    run, model = trained.run(), small(3)
    for step, state in enumerate(trained.states):
        run.load(model, step)
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    held = {name: t.clone() for name, t in model.named_buffers()}
    result = attrib.attribute(run, model.eval(), MEASURED, loss=cross_entropy, progress=False)
    assert all(torch.equal(t, held[name]) for name, t in model.named_buffers())  # its passes wrote to copies
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


def test_a_run_is_gone_on_with_from_its_last_buffers(tmp_path: Path) -> None:
    whole = Trained(tmp_path / "whole").steps(0, STEPS)
    first = Trained(tmp_path / "run", block=2).steps(0, 3)
    first.recorder.__exit__(ValueError, ValueError(), None)  # it ends early
    model = small(5)
    with torch.no_grad():
        model[1].running_mean.fill_(7.0)
    second = Trained(tmp_path / "run", model, resume=True, block=2).steps(3, STEPS)
    assert all(torch.equal(value, whole.states[-1][name]) for name, value in second.states[-1].items())
    runs = whole.run(), second.run()
    for step in range(STEPS + 1):
        one, other = (run.buffers(step) for run in runs)
        assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("start", [0, 2])
def test_a_replay_starts_from_the_buffers_of_its_state_and_writes_them_again(start: int, tmp_path: Path) -> None:
    run = Trained(tmp_path / "run", parts=2).steps(0, STEPS).run()
    again = attrib.replay(run, start, model=small(9), loss=cross_entropy, store=tmp_path / "again", progress=False)
    for step in range(again.steps + 1):
        held, expected = {**again.parameters(step), **again.buffers(step)}, {}
        expected = {**run.parameters(start + step), **run.buffers(start + step)}
        assert all(torch.equal(value, expected[name]) for name, value in held.items())
    dropped = attrib.intervention.Drop([0, 9], slice(1, 3))
    changed = attrib.replay(
        run, 0, dropped, model=small(9), loss=cross_entropy, store=tmp_path / "less", progress=False
    )
    plain = small()  # the same by hand, of weighted losses
    run.load(plain, 0)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2)
    for step in range(STEPS):
        optimizer.zero_grad()
        index = [i for i in range(SIZE * (step % 3), SIZE * (step % 3 + 1)) if not (1 <= step < 3 and i in (0, 9))]
        parts = [[i for i in part.tolist() if i in index] for part in (torch.arange(SIZE) + SIZE * (step % 3)).chunk(2)]
        for part in parts:
            (cross_entropy(plain, X[part], Y[part]).mean() / 2).backward()
        optimizer.step()
    assert all(torch.equal(changed.buffers(STEPS)[n], dict(plain.named_buffers())[n]) for n in changed.buffers(0))


class Centred(nn.Module):
    """Reads a buffer in training that it wrote in the step before, and counts."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(4, 5), nn.Linear(5, 3)
        self.register_buffer("centre", torch.zeros(5))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.inner(x))
        if self.training:
            h_centred = h - self.centre
            self.centre = 0.5 * self.centre + 0.5 * h.detach().mean(0)  # another tensor in its place
            self.count += 1
            return self.outer(h_centred)
        return self.outer(h - self.centre)


@pytest.mark.parametrize("capture", ["replay", "factors"])
def test_a_loss_that_reads_a_moving_buffer_reads_it_as_it_was(capture: str, tmp_path: Path) -> None:
    torch.manual_seed(2)
    trained = Trained(tmp_path / "run", Centred().double(), capture=capture, check_every=1).steps(0, STEPS)
    model, run = trained.model.eval(), trained.run()
    result = attrib.attribute(run, model, MEASURED, loss=cross_entropy, progress=False)
    result.check(1e-10)
    assert float(result.dataset.batch_identity.max()) < 1e-12
    assert float(np.abs(result.buffers[..., 1:]).max()) == 0  # all of it stands at the first group
    assert (run.log("batch_identity") < 1e-12).all()


def test_a_loss_that_reads_what_the_batch_before_wrote_is_refused(tmp_path: Path) -> None:
    trained = Trained(tmp_path / "run", Centred().double(), parts=2)
    with pytest.raises(attrib.errors.BatchIdentityError, match=r"buffers that training writes to.*a step of one batch"):
        trained.steps(0, 1)


def test_a_measurement_that_reads_a_moving_integer_is_refused(tmp_path: Path) -> None:
    trained = Trained(tmp_path / "run", Centred().double()).steps(0, 2)
    with pytest.raises(attrib.errors.MeasurementError, match=r"moves and is no floating-point number.*one of count"):
        attrib.attribute(trained.run(), trained.model, lambda m: (m(X[:2]) * m.count)[:, 0], loss=cross_entropy)


def test_two_steps_by_hand(tmp_path: Path) -> None:
    """m(theta, b) and the training losses written out, the path integral of (theta, b) by 12 nodes of Gauss and Legendre."""
    lr, momentum, eps = 0.2, 0.1, 1e-5
    model, store = small(act=nn.Tanh), tmp_path / "run"
    theta, b = [p.detach().clone() for p in model.parameters()], [torch.zeros(6).double(), torch.ones(6).double()]
    with attrib.record(torch.optim.SGD(model.parameters(), lr=lr), model, cross_entropy, store) as recorder:
        for index in (torch.arange(8), torch.arange(8, 16)):
            recorder.zero_grad()
            cross_entropy(model, X[index], Y[index]).sum().backward()
            recorder.step(index, X[index], Y[index])
    path = attrib.GaussLegendre(12)
    result = attrib.attribute(
        attrib.open_run(store), model.eval(), MEASURED, loss=cross_entropy, path=path, progress=False
    )

    def logits(x: Tensor, p: list[Tensor], mean: Tensor, var: Tensor) -> Tensor:
        h = (x @ p[0].T + p[1] - mean) / (var + eps).sqrt() * p[2] + p[3]
        return torch.tanh(h) @ p[4].T + p[5]

    def losses(x: Tensor, y: Tensor, p: list[Tensor]) -> Tensor:
        h = x @ p[0].T + p[1]
        return -torch.log_softmax(logits(x, p, h.mean(0), h.var(0, correction=0)), 1)[range(len(y)), y]

    nodes, weights = np.polynomial.legendre.leggauss(12)
    for step, index in enumerate((torch.arange(8), torch.arange(8, 16))):
        x, y = X[index], Y[index]
        p = [t.clone().requires_grad_() for t in theta]
        shares = [torch.autograd.grad(one, p, retain_graph=True) for one in losses(x, y, p)]
        new = [t - lr * sum(g[k] for g in shares) for k, t in enumerate(theta)]
        h = (x @ theta[0].T + theta[1]).detach()
        statistics = h.mean(0), h.var(0, correction=1)
        new_b = [(1 - momentum) * old + momentum * seen for old, seen in zip(b, statistics, strict=True)]
        for q in range(3):
            total = [torch.zeros_like(t) for t in (*theta, *b)]
            for a, w in zip((nodes + 1) / 2, weights / 2, strict=True):
                ends = zip((*theta, *b), (*new, *new_b), strict=True)
                point = [torch.lerp(s, e, float(a)).requires_grad_() for s, e in ends]
                value = torch.log_softmax(logits(X[q : q + 1], point[:6], *point[6:]), 1)[0, Y[q]]
                total = [t + w * g for t, g in zip(total, torch.autograd.grad(value, point), strict=True)]
            want = [-lr * sum(float((t * g).sum()) for t, g in zip(total, share, strict=False)) for share in shares]
            got = result.by("step", "example").values[q, step, index]
            np.testing.assert_allclose(got, want, rtol=0, atol=1e-13)  # a few hundred roundings of numbers below 1
            row = sum(float((t * (e - s)).sum()) for t, s, e in zip(total[6:], b, new_b, strict=True))
            np.testing.assert_allclose(result.buffers.values[q, step].sum(), row, rtol=0, atol=1e-13)
            assert result.buffers.sel(group="1.weight").values[q, step] == result.buffers.values[q, step].sum()
        theta, b = [t.detach() for t in new], new_b


def test_what_buffers_did_is_shown_and_moves_add_up(tmp_path: Path) -> None:
    trained = Trained(tmp_path / "run").steps(0, STEPS)
    run, model = trained.run(), trained.model.eval()
    result = attrib.attribute(run, model, MEASURED, loss=cross_entropy, progress=False)
    assert "buffers" in str(result.ledger())
    assert list(result.ledger().terms)[-3:] == ["buffers", "residual", "final"]
    ends = {
        line.get_label().split("  (")[0]: line.get_ydata()[-1] for line in figures.cumulative(result, 1, n=3).lines[:-1]
    }
    np.testing.assert_allclose(ends["buffers"], result.buffers[1].sum(), rtol=1e-12)
    np.testing.assert_allclose(sum(ends.values()), (result.final - result.initial)[1], rtol=1e-12)
    result.save(tmp_path / "result")
    np.testing.assert_array_equal(attrib.open_result(tmp_path / "result").buffers, result.buffers)
    each = list(attrib.moves(run, model, MEASURED, steps=range(1, 3), loss=cross_entropy))
    change = (result.curve[:, 3] - result.curve[:, 1]).values
    moved = [m.contributions.sum(1) + m.decay + m.inherited + m.remainder for m in each]
    np.testing.assert_allclose(sum(moved), change, rtol=0, atol=1e-12)
    curve = attrib.evaluate(run, model, MEASURED)
    np.testing.assert_allclose(curve.values.T, result.curve, rtol=0, atol=1e-13)
    line = attrib.interpolate(run, 0, run, STEPS, model, MEASURED, points=3)
    np.testing.assert_allclose(line.values[[0, -1]], curve.values[[0, -1]], rtol=0, atol=1e-13)


@pytest.mark.parametrize("queries", [1, 4])
def test_the_plan_says_what_a_coupled_batch_takes(queries: int, tmp_path: Path) -> None:
    run = Trained(tmp_path / "run").steps(0, 2).run()
    plan = attrib.plan(run, queries)
    assert plan.buffers == (6 + 6 + 1) * 8
    assert plan.passes == min(queries * 6, SIZE)  # a pass per query and tensor, or per example
    assert attrib.plan(run, queries, groups={"all": ["*"]}).passes == queries
    said = str(plan)
    assert said.index(f"shares by example  {plan.passes} passes more") < said.index("shares by rows     none more")


@pytest.mark.slow
def test_a_residual_network_with_augmentation_is_complete(tmp_path: Path) -> None:
    """Transformers' ResNet, batch norm in train mode, SGD with momentum and weight decay, images flipped at random."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.ResNetConfig(
        embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=3, num_channels=3
    )
    model = transformers.ResNetForImageClassification(config).double().train()
    images, labels = torch.randn(12, 3, 16, 16).double(), torch.arange(12) % 3

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(model(x).logits, y, reduction="none")

    def log_prob(model: nn.Module) -> Tensor:
        return torch.log_softmax(model(images[:2]).logits, 1)[:, 1]

    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-2)
    with attrib.record(optimizer, model, loss, tmp_path / "run") as recorder:
        for step in range(4):
            index = torch.arange(4) + 4 * (step % 3)
            x = torch.where(torch.rand(4, 1, 1, 1) < 0.5, images[index].flip(3), images[index])
            recorder.zero_grad()
            recorder.batch(index, x, labels[index])
            loss(model, x, labels[index]).mean().backward()
            recorder.step()
    run, groups = attrib.open_run(tmp_path / "run"), {"embedder": ["*embedder*"], "stages": ["*stages*"]}
    result = attrib.attribute(run, model.eval(), log_prob, loss=loss, groups=groups, progress=False)
    ledger = result.check(1e-10)
    assert float(np.abs(ledger.residual).max()) < 1e-10
    assert float(np.abs(ledger.buffers).min()) > 1e-3
    assert ledger.identities["split"] < 1e-8
