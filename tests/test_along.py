"""The truth along a direction, and the fast form held against it: models whose batches are anything but tidy."""

import random
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import oracles
import pytest
import torch
import torch.nn.functional as F
from cases import covering, crossed
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from zarr.storage import MemoryStore

import attrib
from attrib import errors
from attrib.batch import Batch
from attrib.functional import Functional
from attrib.generators import generators, random_state, set_generators
from attrib.gradients import ExampleGradients, LossVector
from attrib.layout import Layout


class Sorted(nn.Module):
    """Rows in the order of what they hold, and back."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        order = x[:, 0].argsort(descending=True, stable=True)
        return self.b(torch.tanh(self.a(x[order])))[order.argsort()]


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.out = nn.Linear(4, 3), nn.Linear(4, 3)
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        weight, chosen = self.gate(x).softmax(-1).topk(2, -1)
        out = torch.zeros_like(x)
        for n, expert in enumerate(self.experts):
            rows, k = torch.where(chosen == n)
            out = out.index_add(0, rows, torch.tanh(expert(x[rows])) * weight[rows, k, None])
        return self.out(out)


class Reversal(torch.autograd.Function):
    """As they were written before there were transforms of functions: no rule for forward mode, none to be mapped."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return -0.5 * gradient


class Once(torch.autograd.Function):
    """Without a second derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient * ctx.saved_tensors[0].cos()


class Between(nn.Module):
    """Two layers with something in between."""

    def __init__(self, between: Callable[[Tensor], Tensor], inner: int = 6) -> None:
        super().__init__()
        self.a, self.b, self.between = nn.Linear(4, 6), nn.Linear(inner, 3), between

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.between(self.a(x)))


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(checkpoint(lambda h: torch.tanh(self.b(torch.tanh(h))), self.a(x), use_reentrant=False))


class Stopped(nn.Module):
    """A part that training takes for constant, as momentum targets are: forward mode would go through it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x))
        with torch.no_grad():
            size = h.norm(dim=1, keepdim=True) + self.b.weight.norm()
        return self.b(h / size)


class Recurrent(nn.Module):
    def __init__(self, kind: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.rnn, self.out = kind(2, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.rnn(x.unflatten(1, (2, 2)))[0][:, -1])


class LayerDrop(nn.Module):
    """Whether a layer is run is drawn from Python's generator, noise from numpy's."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x))
        if not self.training or random.random() < 0.6:
            h = h + self.b(h)
        return self.c(h + (0.1 * np.random.rand() if self.training else 0.0))  # noqa: NPY002


class KeyBias(nn.Module):
    """The gradient of a key's bias is rounding: attention does not see it."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(2, 2) for _ in range(4))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = x.unflatten(1, (2, 2))
        return self.head(self.out(F.scaled_dot_product_attention(self.q(h), self.k(h), self.v(h))).flatten(1))


class LastToken(nn.Module):
    """Each example is read at a position of its own: picked by its content, and yet row i stays row i."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(2, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x.unflatten(1, (2, 2))))
        return self.b(h[torch.arange(len(x)), (x[:, 0] > 0).long()])


class Bag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bag, self.out = nn.EmbeddingBag(9, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.bag((x.abs() * 5).long() % 9))


class Assigned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.zeros(len(x), 5, dtype=x.dtype)
        wide[:, 1:] = x
        h = torch.zeros(len(x), 6, dtype=x.dtype)
        h[x[:, 0] > 0] = torch.tanh(self.a(wide))[x[:, 0] > 0]
        return self.b(h)


def cross_entropy(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(m(x), y, reduction="none")


def contrastive(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    z = F.normalize(m(x), dim=1)
    return F.cross_entropy(z @ z.T / 0.5, (torch.arange(len(x)) + 1) % len(x), reduction="none")


def in_pieces(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Walks the batch by threes, by positions that it takes for granted."""
    pieces = [cross_entropy(m, x[k : k + 3], y[k : k + 3])[[0, 1, 2]] for k in range(0, len(x), 3)]
    return torch.cat(pieces)


def by_lengths(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """A weight for each example, made of numbers that Python reads off the batch."""
    weights = [1.0 + k for k in y.tolist()]
    return cross_entropy(m, x, y) * torch.tensor(weights, dtype=x.dtype)


def per_batch(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return cross_entropy(m, x, y) / len(x)


def normed() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6, track_running_stats=False), nn.ReLU(), nn.Linear(6, 3))


class Case(NamedTuple):
    build: Callable[[], nn.Module]
    loss: Callable[..., Tensor] = cross_entropy
    coupled: bool | None = False  # None: found out batch by batch
    slow: bool | None = False  # whether some shares must go along U; None: either way
    derivative: bool = True  # whether torch's gradient of it is its derivative
    traceable: bool = True  # whether the secant can follow it


def force(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Differentiates on its way, as force fields and gradient penalties do."""
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        (slope,) = torch.autograd.grad(m(x).square().sum(), x, create_graph=True)
    return slope.square().sum(1)


def far_apart(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Pushes other classes away where they are near: in some batches none are."""
    z = m(x)
    near = (0.3 - torch.cdist(z, z)).relu() * (y[:, None] != y)
    return F.cross_entropy(z, y, reduction="none") + near.sum(1)


def neighbours(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Coupled at a distance that a few examples do not show."""
    z = m(x)
    losses = F.cross_entropy(z, y, reduction="none")
    return torch.cat([losses[:8], losses[8:] + (z[8:] * z[:-8]).sum(1)])


class Flipped(nn.Module):
    """A branch that is drawn, seldom taken."""

    def __init__(self, draw: Callable[[], float]) -> None:
        super().__init__()
        self.a, self.b, self.draw = nn.Linear(4, 6), nn.Linear(6, 3), draw

    def forward(self, x: Tensor) -> Tensor:
        x = x.flip(1) if self.training and self.draw() < 0.3 else x
        return self.b(torch.tanh(self.a(x)))


CASES = {
    "batch sorted inside": Case(Sorted, slow=None),
    "experts": Case(Experts, slow=True),
    "old-style function": Case(lambda: Between(Reversal.apply), derivative=False, traceable=False),
    "function differentiable once": Case(lambda: Between(Once.apply), traceable=False),
    "activation checkpointing": Case(Checkpointed),
    "a part without gradients": Case(Stopped, derivative=False),
    "LSTM": Case(lambda: Recurrent(nn.LSTM)),
    "GRU": Case(lambda: Recurrent(nn.GRU)),
    "layer drop": Case(LayerDrop),
    "bias of the keys": Case(KeyBias),
    "last token": Case(LastToken, slow=None),
    "bag of embeddings": Case(Bag, slow=None),
    "assignment by a mask": Case(Assigned, slow=None),
    "prelu": Case(lambda: Between(nn.PReLU(6))),
    "prelu of one": Case(lambda: Between(nn.PReLU())),
    "batch norm on the batch's statistics": Case(normed, coupled=True, slow=True),
    "contrastive loss": Case(lambda: Between(torch.tanh), contrastive, coupled=True, slow=True),
    "batch norm and a contrastive loss": Case(normed, contrastive, coupled=True, slow=True),
    "loss in pieces": Case(lambda: Between(torch.tanh), in_pieces, slow=True),
    "loss by numbers of Python": Case(lambda: Between(torch.tanh), by_lengths),
    "loss divided by the batch": Case(lambda: Between(torch.tanh), per_batch),
    "orthogonal": Case(lambda: nn.utils.parametrizations.orthogonal(nn.Linear(4, 3))),
    "spectral norm": Case(lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(4, 3)).eval()),
    "weight norm": Case(lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))),
    "a branch drawn by torch": Case(lambda: Flipped(lambda: torch.rand(()).item()), slow=None),
    "a branch drawn by Python": Case(lambda: Flipped(random.random), slow=None),
    "loss that differentiates": Case(lambda: Between(torch.tanh), force, slow=None),
    "loss that seldom couples": Case(lambda: Between(torch.tanh), far_apart, coupled=None, slow=None),
    "loss that couples far away": Case(lambda: Between(torch.tanh), neighbours, coupled=None, slow=None),
    "dropout": Case(lambda: nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.Linear(6, 3))),
}
SIZE = 9


def layout_of(model: nn.Module) -> tuple[Layout, Tensor]:
    named = dict(model.named_parameters())
    layout = Layout(tuple(named), tuple(tuple(p.shape) for p in named.values()))
    return layout, layout.flatten(named.values())


def data(seed: int, size: int = SIZE) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, 4, generator=generator, dtype=torch.float64), torch.randint(
        0, 3, (size,), generator=generator
    )


def seeded(seed: int) -> Tensor:
    """Generators at a known state, which is returned."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    return generators()


class Setting(NamedTuple):
    case: Case
    model: nn.Module
    layout: Layout
    theta: Tensor


def setting(name: str) -> Setting:
    torch.manual_seed(3)
    case = CASES[name]
    model = case.build().double()
    return Setting(case, model, *layout_of(model))


@cache
def truth(name: str, seed: int) -> np.ndarray:
    """The gradients (B, P) of the single losses of a batch, at parameters moved by 0.1 * seed."""
    case, model, _, theta = setting(name)
    seeded(seed)
    return oracles.losses_one_by_one(model, (theta + 0.1 * seed).numpy(), case.loss, data(seed))


# in another order than the captures below: what a case does not contract here, it contracts or stores there
@pytest.mark.parametrize(("name", "way"), crossed(CASES, ["rows", "total", "contract"]))
def test_shares_are_the_gradients_of_the_single_losses_of_the_batch(name: str, way: str) -> None:
    """On several batches of one kind, at parameters that the model does not hold: taped from the third call on."""
    case, model, layout, theta = setting(name)
    shares = ExampleGradients(case.loss, model, layout, torch.float64)
    directions = torch.randn(3, layout.size, dtype=torch.float64)
    for seed in range(4):
        batch, moved = data(seed), theta + 0.1 * seed
        seeded(seed)
        found: Any = getattr(shares, way)(moved, batch, *([directions] if way == "contract" else []))
        want = truth(name, seed)
        # float64 sums of a few hundred terms
        scale = 1e-10 * max(1.0, float(np.abs(want).max()))
        if way == "rows":
            np.testing.assert_allclose(found, want, atol=scale)
        elif way == "total":
            np.testing.assert_allclose(found[1], want.sum(0), atol=SIZE * scale)
        else:
            parts = [np.einsum("qp,bp->qb", directions[:, p], want[:, p]) for _, p in layout.slices()]
            np.testing.assert_allclose(found[1].numpy(), np.stack(parts, -1), atol=50 * scale)
    assert case.coupled is None or shares.coupled == case.coupled


@pytest.mark.parametrize("name", CASES)
def test_what_is_slow_is_said_once_and_nothing_else_is(name: str, caplog: pytest.LogCaptureFixture) -> None:
    case, model, layout, theta = setting(name)
    shares = ExampleGradients(case.loss, model, layout, torch.float64)
    for seed in (0, 1, 2, 3):
        shares.contract(theta, data(seed), theta[None])
    said = [m for m in caplog.messages if "are slow" in m]
    assert len(said) == len(set(said))
    assert case.slow is None or bool(said) == case.slow, said


@pytest.mark.parametrize("way", ["forward", "double", "single"])
@pytest.mark.parametrize("name", CASES)
def test_every_way_along_a_direction_is_the_same_or_found_out(name: str, way: str) -> None:
    case, model, layout, theta = setting(name)
    vector = LossVector(Functional(model, case.loss, layout, torch.float64), layout)
    batch, start = data(0), seeded(0)
    named = layout.unflatten(torch.randn(2, layout.size, dtype=torch.float64))
    halves = [list(layout.names)[::2], list(layout.names)[1::2]]
    one = {n: u[:1] for n, u in named.items()}
    with random_state(start):
        works = vector._works(way, theta, Batch.of(batch), one, start)
    twice = {
        "function differentiable once",
        "bag of embeddings",
        "loss that seldom couples",
    }  # have no second derivative
    lacking = {"double": twice, "forward": twice | {"old-style function", "a part without gradients", "weight norm"}}
    if name != "loss that differentiates":
        assert works == (name not in lacking.get(way, set()))
    if works:
        set_generators(start)
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            losses, found = getattr(vector, f"_{way}")(theta, Batch.of(batch), named, halves, start)
        set_generators(start)
        want = oracles.losses_one_by_one(model, theta.numpy(), case.loss, batch)
        flat = layout.flatten(named[n][0] for n in layout.names), layout.flatten(named[n][1] for n in layout.names)
        for q, u in enumerate(flat):
            for g, half in enumerate(halves):
                mask = np.concatenate([np.full(p.stop - p.start, n in half) for n, p in layout.slices()])
                np.testing.assert_allclose(found[q, :, g], want @ (u.numpy() * mask), atol=1e-9)
        set_generators(start)
        torch.testing.assert_close(losses, vector.values(theta, batch))


def trained(case: Case, capture: str, steps: int = 4) -> tuple[attrib.Run, nn.Module, list[np.ndarray]]:
    """A recorded run by plain gradient descent, and the true gradients of every step's losses, (B, P) each."""
    torch.manual_seed(3)
    model, store = case.build().double(), MemoryStore()
    recorder = attrib.record(torch.optim.SGD(model.parameters(), lr=0.05), model, case.loss, store, capture)
    rows = []
    for step in range(steps):
        x, y = data(step)
        start = seeded(step)
        rows.append(oracles.losses_one_by_one(model, layout_of(model)[1].numpy(), case.loss, (x, y)))
        set_generators(start)
        recorder.zero_grad()
        case.loss(model, x, y).mean().backward()
        recorder.step(torch.arange(SIZE) + SIZE * (step % 2), x, y)
    recorder.close()
    return attrib.open_run(store), model, rows


CAPTURES = ["replay", "gradients", "factors"]
FIRST = covering(CASES, CAPTURES)


# fast is every fourth: of all, shares are held to the truth above
@pytest.mark.parametrize(("name", "capture"), crossed(CASES, CAPTURES, fast=FIRST[::4]))
def test_every_contribution_is_the_true_one_whatever_the_batch(name: str, capture: str) -> None:
    """Recorded and attributed by every capture: lr / B <Gbar, g_i>, with Gbar by quadrature of its own."""
    case = CASES[name]
    if (name, capture) == ("layer drop", "factors"):
        with pytest.raises(errors.LossError, match=r'other calls than at the first step.*capture="replay"'):
            trained(case, capture)
        return
    run, model, rows = trained(case, capture)
    if name in ("layer drop", "dropout", "a branch drawn by torch", "a branch drawn by Python"):
        model.eval()
    x, y = data(99, 2)
    measured: Any = attrib.measure.log_prob(x, y)
    if case.coupled:  # a single row has no statistics: the queries together
        measured = lambda m: m(x)[:, 0]  # noqa: E731
    loss = case.loss if capture == "replay" else None
    result = attrib.attribute(run, model, measured, loss=loss, path=attrib.GaussLegendre(8), progress=False)
    result.check(1e-6 if case.derivative else np.inf)
    if (name, capture) not in FIRST:
        pass  # the secant knows nothing of captures
    elif case.traceable:
        secant = attrib.attribute(run, model, measured, loss=loss, progress=False)
        assert secant.check(1e-9).identities["limit"] < 1e-4  # it is of the change that is measured, derivative or not
    else:  # and what the message advises was done above
        with pytest.raises(errors.UntraceableModelError, match=r"path=attrib\.GaussLegendre\(nodes=4\)"):
            attrib.attribute(run, model, measured, loss=loss, progress=False)
    assert "depend on each other" in result.dataset.attrs["share"] if case.coupled and capture == "replay" else True
    nodes = [((p + 1) / 2, w / 2) for p, w in zip(*np.polynomial.legendre.leggauss(8), strict=True)]
    found = result.by("step", "example").values
    order = [run.layout.names.index(n) for n, _ in model.named_parameters()]
    assert order == sorted(order)
    ids = result.dataset["example"].values
    for step in range(run.steps - 1, -1, -1):
        ends = run.vector(step).numpy(), run.vector(step + 1).numpy()
        bar = oracles.path_integral(model, *ends, lambda m: measured(m), nodes)
        want = -0.05 / SIZE * bar @ rows[step].T
        at = np.searchsorted(ids, np.arange(SIZE) + SIZE * (step % 2))
        np.testing.assert_allclose(found[:, step, at], want, atol=1e-9 * np.abs(want).max() + 1e-12)


def test_a_generator_of_its_own_is_named(tmp_path: Path) -> None:
    own = torch.Generator().manual_seed(0)

    def loss(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(m, x + 0.1 * torch.randn(x.shape, generator=own, dtype=x.dtype), y)

    model = nn.Linear(4, 3).double()
    recorder = attrib.record(torch.optim.SGD(model.parameters(), lr=0.1), model, loss, tmp_path / "run")
    x, y = data(0)
    loss(model, x, y).mean().backward()
    with pytest.raises(errors.BatchIdentityError, match="a generator of its own"):
        recorder.step(torch.arange(SIZE), x, y)


def test_generators_are_put_back_to_the_bit() -> None:
    seeded(4)
    random.gauss(0, 1)
    np.random.normal()  # noqa: NPY002
    with random_state(generators()):
        first = torch.rand(2).tolist(), random.gauss(0, 1), random.random(), np.random.normal(), np.random.rand()  # noqa: NPY002
    again = torch.rand(2).tolist(), random.gauss(0, 1), random.random(), np.random.normal(), np.random.rand()  # noqa: NPY002
    assert first == again


@pytest.mark.parametrize("name", ["experts", "contrastive loss", "batch sorted inside"])
def test_tensors_of_a_group_go_along_a_direction_together(name: str) -> None:
    case, model, layout, theta = setting(name)
    batch, u = data(1), torch.randn(2, layout.size, dtype=torch.float64)
    apart = ExampleGradients(case.loss, model, layout, torch.float64).contract(theta, batch, u)[1]
    groups = [k % 2 for k in range(len(layout.names))]
    together = ExampleGradients(case.loss, model, layout, torch.float64).contract(theta, batch, u, groups)[1]
    for g in (0, 1):
        mine = [k for k, group in enumerate(groups) if group == g]
        np.testing.assert_allclose(together[..., mine].sum(-1), apart[..., mine].sum(-1), atol=1e-11)


@pytest.mark.parametrize("way", ["forward", "double", "single"])
def test_parameters_without_a_gradient_have_no_derivative_along_a_direction(way: str) -> None:
    case, model, layout, theta = setting("contrastive loss")
    vector = LossVector(Functional(model, case.loss, layout, torch.float64), layout).at(frozenset(["a.weight"]))
    batch, named = data(1), layout.unflatten(theta[None])
    vector._ways[vector._kind(Batch.of(batch))] = way
    found = vector.along(theta, batch, named, [["a.weight", "b.weight"], ["b.bias"]])[1]
    alone = vector.along(theta, batch, named, [["a.weight"]])[1]
    np.testing.assert_allclose(found[..., :1], alone, atol=1e-14)
    assert not found[..., 1].any()


def test_reentrant_checkpointing_is_named_with_what_works(tmp_path: Path) -> None:
    class Old(nn.Module):
        def __init__(self, reentrant: bool) -> None:
            super().__init__()
            self.a, self.b, self.reentrant = nn.Linear(4, 6), nn.Linear(6, 3), reentrant

        def forward(self, x: Tensor) -> Tensor:
            return self.b(checkpoint(torch.tanh, self.a(x), use_reentrant=self.reentrant))

    x, y = data(0)
    for reentrant in (True, False):
        model = Old(reentrant).double()
        recorder = attrib.record(
            torch.optim.SGD(model.parameters(), lr=0.1), model, cross_entropy, tmp_path / f"{reentrant}"
        )
        cross_entropy(model, x, y).mean().backward()
        if reentrant:
            with pytest.raises(errors.LossError, match="use_reentrant=False"):
                recorder.step(torch.arange(SIZE), x, y)
        else:
            recorder.step(torch.arange(SIZE), x, y)


@pytest.mark.parametrize("capture", ["gradients", "factors"])
def test_stored_shares_of_a_converged_run_are_those_of_their_examples(capture: str, tmp_path: Path) -> None:
    """p.grad has cancelled to rounding: no scale can be had from it."""
    torch.manual_seed(0)
    model = nn.Linear(4, 1).double()
    # a Hessian that is twice the identity: every error shrinks by 0.2 a step, from 1 to 1e-17 in 25
    columns = torch.linalg.qr(torch.cat([torch.ones(12, 1), torch.randn(12, 4)], 1).double()).Q
    x, y = 12**0.5 * columns[:, 1:], torch.randn(12).double()

    def loss(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return (m(x)[:, 0] - y).square()

    recorder = attrib.record(torch.optim.SGD(model.parameters(), lr=0.4), model, loss, tmp_path / "run", capture)
    with recorder:
        for _ in range(50):
            recorder.zero_grad()
            loss(model, x, y).mean().backward()
            recorder.step(torch.arange(12), x, y)
    assert float(model.weight.grad.norm()) < 1e-14
    run = attrib.open_run(tmp_path / "run")
    for given in (loss, None):
        result = attrib.attribute(run, model, lambda m: m(x[:2])[:, 0], loss=given, progress=False)
        assert result.check(1e-9).identities["split"] < 1.5e-8  # sqrt(eps), of shares that are as good as zero


@pytest.mark.parametrize("detached", ["no_grad", "detach", "accuracy", "constant"])
def test_measurements_without_a_gradient_are_accounted_for_by_the_secant(detached: str) -> None:
    run, model, _ = trained(CASES["prelu"], "replay")
    x, y = data(99, 5)

    def measured(m: nn.Module) -> Tensor:
        if detached == "no_grad":
            with torch.no_grad():
                return m(x)[:, 0]
        if detached == "detach":
            return m(x)[:, 0].detach()
        return (m(x).argmax(1) == y).double().mean()[None] if detached == "accuracy" else torch.ones(2, dtype=x.dtype)

    attrib.attribute(run, model, measured, loss=cross_entropy, progress=False).check(1e-9)
    with pytest.raises(errors.MeasurementError, match="no gradient to integrate"):
        attrib.attribute(run, model, measured, loss=cross_entropy, path=attrib.GaussLegendre(2), progress=False)


def test_a_batch_is_cut_only_where_its_losses_are_those_of_its_slices() -> None:
    for name in ("loss that couples far away", "contrastive loss"):
        case, model, layout, theta = setting(name)
        for size in (7, 12, 16):
            x, y = data(3, size)
            x = x[:1].expand(size, -1).clone() if size == 7 else x
            shares = ExampleGradients(case.loss, model, layout, torch.float64, slices=1)
            want = oracles.losses_one_by_one(model, theta.numpy(), case.loss, (x, y))
            for _ in range(2):
                found = shares.contract(theta, (x, y), theta[None])[1].sum(-1)[0]
                np.testing.assert_allclose(found, want @ theta.numpy(), atol=1e-9)


def test_another_generator_of_numpys_is_left_alone() -> None:
    before = np.random.get_bit_generator()
    np.random.set_bit_generator(np.random.PCG64(3))
    try:
        start = generators()
        first = np.random.rand()  # noqa: NPY002
        set_generators(start)
        assert np.random.rand() != first  # noqa: NPY002
    finally:
        np.random.set_bit_generator(before)


def test_batch_norm_that_writes_its_statistics_goes_by_dual_numbers() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)).double()
    before, (x, y) = {name: t.clone() for name, t in model.named_buffers()}, data(0)
    layout = Layout(*zip(*((name, tuple(p.shape)) for name, p in model.named_parameters()), strict=True))
    shares = ExampleGradients(cross_entropy, model, layout, torch.float64)
    theta, u = layout.flatten(model.parameters()), torch.randn(2, layout.size).double()
    products = shares.contract(theta, Batch.of((x, y)), u, [0] * 6)[1]  # as one group: fewer passes than examples
    rows = torch.stack(
        [layout.flatten(row.values()) for row in shares.vector.rows(theta, Batch.of((x, y)), layout.names)]
    )
    np.testing.assert_allclose(products.sum(2), u @ rows.T, rtol=0, atol=1e-12)
    assert set(shares.vector._ways.values()) == {"forward"}
    assert all(torch.equal(t, before[name]) for name, t in model.named_buffers())
