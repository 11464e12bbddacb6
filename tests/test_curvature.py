"""Products of the Hessian of a batch's loss with directions, against differences of gradients and whole matrices."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import oracles
import pytest
import torch
import torch.nn.functional as F
from cases import LAYERS, MODELS, OPTIMIZERS, Gpt, crossed
from test_along import CASES, SIZE, Between, Case, Reversal, cross_entropy, data, layout_of, normed, seeded
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from training import train

from attrib.curvature import Curvature, Products
from attrib.curvature.point import Point
from attrib.curvature.ways import Ways
from attrib.errors import LossError
from attrib.functional import Functional
from attrib.generators import generators, set_generators
from attrib.gradients import ExampleGradients
from attrib.layout import Layout
from attrib.shares import Shares

TWICE = {
    "function differentiable once",
    "bag of embeddings",
    "loss that seldom couples",
}  # that have no second derivative
NOT_FORWARD = {"old-style function", "a part without gradients", "activation checkpointing", "loss that differentiates"}


class Setting(NamedTuple):
    model: nn.Module
    loss: Callable[..., Tensor]
    layout: Layout
    theta: Tensor
    data: Callable[[int], Sequence[Tensor]]  # seed -> batch

    def curvature(self, slices: int | None = None, kind: str = "exact") -> Curvature:
        return Curvature(Functional(self.model, self.loss, self.layout, torch.float64), slices, kind)


def of_layer(name: str) -> Setting:
    """Losses that a layer's outputs have third derivatives of."""
    build, shape = LAYERS[name]
    torch.manual_seed(2)
    model = build().double()

    def loss(m: nn.Module, x: Tensor) -> Tensor:
        return m(x).sin().flatten(1).square().sum(1)

    def batch(seed: int) -> Sequence[Tensor]:
        return [torch.randn(SIZE, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)]

    return Setting(model, loss, *layout_of(model), batch)


def of_model(name: str) -> Setting:
    torch.manual_seed(2)
    case = MODELS[name]
    model = case.build().double()

    def batch(seed: int) -> Sequence[Tensor]:
        torch.manual_seed(seed)
        return [t.double() if t.is_floating_point() else t for t in case.data(7)]

    return Setting(model, case.loss, *layout_of(model), batch)


def of_case(case: Case, size: int = SIZE) -> Setting:
    torch.manual_seed(3)
    model = case.build().double()
    return Setting(model, case.loss, *layout_of(model), lambda seed: data(seed, size))


SETTINGS: dict[str, Callable[[], Setting]] = {
    **{name: (lambda n=name: of_model(n)) for name in MODELS},
    **{name: (lambda n=name: of_case(CASES[n])) for name in CASES if name not in TWICE},
    **{f"layer: {name}": (lambda n=name: of_layer(n)) for name in LAYERS},
}


def weights_of(seed: int, size: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed + 50), dtype=torch.float64)


def losses_at(there: Setting, batch: Sequence[Tensor], state: Tensor) -> Callable[[Tensor], Tensor]:
    """theta -> losses, from a state of the generators, by a functional call of torch's; what is checkpointed is run again
    by parameters that the model holds by then, so it is not."""

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.m = there.model

        def forward(self) -> Tensor:
            return there.loss(self.m, *batch)

    def losses(theta: Tensor) -> Tensor:
        set_generators(state)
        named = {f"m.{n}": p for n, p in there.layout.unflatten(theta).items()}
        named |= {f"m.{n}": b.clone() for n, b in there.model.named_buffers()}
        with sdpa_kernel(SDPBackend.MATH), patch("test_along.checkpoint", lambda f, *a, **_: f(*a)):
            return torch.func.functional_call(Whole(), named)

    return losses


def explicit(there: Setting, theta: Tensor, batch: Sequence[Tensor], w: Tensor, v: Tensor, symmetric: bool) -> Products:
    """Losses, <V, g_i>, H V."""
    losses = losses_at(there, batch, generators())
    products = oracles.hessian_products if symmetric else oracles.transposed_products
    hessian = products(lambda t: (losses(t) * w).sum(), theta, v)
    leaf = theta.clone().requires_grad_()
    values = losses(leaf)
    rows = [torch.autograd.grad(x, leaf, retain_graph=True, allow_unused=True)[0] for x in values]
    return Products(
        values.detach(), v @ torch.stack([torch.zeros_like(leaf) if r is None else r for r in rows]).T, hessian
    )


def check(found: Products, want: Products) -> None:
    # differences of gradients are off by 1e-10 of numbers of order one, times a few hundred parameters; the rest is rounding
    torch.testing.assert_close(found.losses, want.losses, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        found.along, want.along, rtol=0, atol=1e-12 * max(1.0, float(want.along.abs().max())) * 10
    )
    torch.testing.assert_close(
        found.hessian, want.hessian, rtol=0, atol=1e-7 * max(1.0, float(want.hessian.abs().max()))
    )


@pytest.mark.parametrize(("name", "queries"), crossed(SETTINGS, [1, 3]))
def test_products_are_those_of_the_hessian_batch_after_batch(name: str, queries: int) -> None:
    """At parameters that the model does not hold; taped from the third call on, checked at the fourth."""
    there = SETTINGS[name]()
    curvature = there.curvature()
    symmetric = name != "orthogonal" and (name not in CASES or CASES[name].derivative)  # which rounds a sign off theta
    v = torch.randn(queries, there.layout.size, dtype=torch.float64)
    for seed in range(5):
        batch, theta = there.data(seed), there.theta + 0.05 * seed * torch.sin(torch.arange(len(there.theta)).double())
        w, start = weights_of(seed, len(batch[0])), seeded(seed)
        want = explicit(there, theta, batch, w, v, symmetric)
        set_generators(start)
        check(curvature.products(theta, batch, w, v), want)


@pytest.mark.parametrize("name", [name for name in CASES if name not in TWICE])
def test_several_directions_go_forward_where_that_is_right(name: str) -> None:
    there = of_case(CASES[name])
    curvature, batch = there.curvature(), there.data(0)
    seeded(0)
    curvature.products(there.theta, batch, torch.ones(SIZE), there.theta[None])
    (works,) = curvature._ways._works.values()
    assert works == (["double"] if name in NOT_FORWARD else ["double", "forward"])


@pytest.mark.parametrize("name", ["mlp", "cnn", "gpt", "LSTM", "contrastive loss", "dropout"])
def test_along_is_what_gradients_contract(name: str) -> None:
    there = SETTINGS[name]()
    batch, v = there.data(1), torch.randn(2, there.layout.size, dtype=torch.float64)
    start = seeded(1)
    found = there.curvature().products(there.theta, batch, torch.zeros(len(batch[0])), v)
    set_generators(start)
    shares = ExampleGradients(there.loss, there.model, there.layout, torch.float64)
    losses, products = shares.contract(there.theta, batch, v)
    # the same sums in other orders
    torch.testing.assert_close(found.along, products.sum(2), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(found.losses, losses)
    assert not found.hessian.any()  # all weights are zero


@pytest.mark.parametrize("kind", ["exact", "gauss-newton"])
@pytest.mark.parametrize("name", ["mlp", "cnn", "gpt", "LSTM", "contrastive loss"])
def test_products_are_symmetric_and_linear_in_the_weights(name: str, kind: str) -> None:
    there = SETTINGS[name]()
    batch, v = there.data(0), torch.randn(2, there.layout.size, dtype=torch.float64)
    first, second = weights_of(0, len(batch[0])), weights_of(1, len(batch[0]))
    curvature = there.curvature(kind=kind)
    one, other, both = (curvature.products(there.theta, batch, w, v) for w in (first, second, 2 * first - 3 * second))
    size = float(both.hessian.abs().max())
    torch.testing.assert_close(both.hessian, 2 * one.hessian - 3 * other.hessian, rtol=0, atol=1e-12 * size)
    torch.testing.assert_close(v[0] @ one.hessian[1], v[1] @ one.hessian[0], rtol=1e-11, atol=1e-11 * size)
    torch.testing.assert_close(one.along, both.along, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["exact", "gauss-newton"])
@pytest.mark.parametrize(
    "name",
    [
        "mlp",
        "cnn",
        "gpt",
        "LSTM",
        "contrastive loss",
        "loss divided by the batch",
        "dropout",
        "loss that couples far away",
    ],
)
def test_slices_change_nothing(name: str, kind: str) -> None:
    """Whether the caller knows that losses depend on each other or not."""
    there = of_model(name) if name in MODELS else of_case(CASES[name], 12)
    v = torch.randn(5, there.layout.size, dtype=torch.float64)
    batch = there.data(2)
    w, start = weights_of(2, len(batch[0])), seeded(2)
    want = there.curvature(kind=kind).products(there.theta, batch, w, v)
    left = generators()
    for slices in (1, 300, 3000):
        curvature = there.curvature(slices, kind)
        for coupled in (False, True, False):
            set_generators(start)
            found = curvature.products(there.theta, batch, w, v, coupled)
            size = float(want.hessian.abs().max())
            torch.testing.assert_close(found.hessian, want.hessian, rtol=0, atol=1e-12 * max(1.0, size))
            torch.testing.assert_close(found.along, want.along, rtol=1e-11, atol=1e-11)
            torch.testing.assert_close(found.losses, want.losses)
            if name == "dropout":
                assert torch.equal(generators(), left)


def test_a_batch_is_cut_and_directions_parted_where_memory_is_short() -> None:
    there = SETTINGS["mlp"]()
    batch, v = there.data(0), torch.randn(6, there.layout.size, dtype=torch.float64)
    passes: list[tuple[int, int]] = []
    curvature = there.curvature(200)
    run = curvature._run
    curvature._run = lambda way, point, named: (  # type: ignore[method-assign]
        passes.append((point.batch.size, len(next(iter(named.values()))))) or run(way, point, named)  # type: ignore[func-returns-value]
    )
    curvature.products(there.theta, batch, torch.ones(7), v)
    whole = passes.copy()
    passes.clear()
    curvature.products(there.theta, batch, torch.ones(7), v, coupled=True)
    assert {size for size, _ in whole} == {1}
    assert set(passes) == {(7, 1)}
    assert len(passes) == 6


def test_parameters_that_do_not_move_have_no_part() -> None:
    there = SETTINGS["gpt"]()
    names = frozenset(["positions", "block.qkv.weight"])
    batch, v, w = there.data(0), torch.randn(3, there.layout.size, dtype=torch.float64), weights_of(0, 7)
    mask = torch.cat([torch.full((p.stop - p.start,), float(n in names)) for n, p in there.layout.slices()])
    for kind in ("exact", "gauss-newton"):
        curvature = there.curvature(kind=kind)
        found = curvature.at(names).products(there.theta, batch, w, v)
        want = curvature.products(there.theta, batch, w, v * mask)
        assert not found.hessian[:, mask == 0].any()
        torch.testing.assert_close(found.hessian, want.hessian * mask, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(found.along, want.along, rtol=1e-11, atol=1e-11)
        still = curvature.at(frozenset()).products(there.theta, batch, w, v)
        assert not still.hessian.any()
        assert not still.along.any()
        torch.testing.assert_close(still.losses, want.losses)


def test_a_multiple_of_the_loss_has_that_multiple_of_the_products() -> None:
    there = SETTINGS["cnn"]()
    batch, v, w = there.data(0), torch.randn(2, there.layout.size, dtype=torch.float64), weights_of(0, 7)
    curvature = there.curvature()
    one = curvature.products(there.theta, batch, w, v)
    half = curvature.at(curvature.active, 0.5).products(there.theta, batch, w, v)
    for a, b in zip(one, half, strict=True):
        torch.testing.assert_close(a / 2, b)


def test_buffers_are_those_of_the_step_and_none_is_written_to() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)).double()
    there = Setting(model, cross_entropy, *layout_of(model), data)
    before = {name: t.clone() for name, t in model.named_buffers()}
    v, w = torch.randn(2, there.layout.size, dtype=torch.float64), torch.ones(SIZE)
    for train_mode in (True, False):
        model.train(train_mode)
        for mean in (0.0, 0.4):
            model[1].running_mean.fill_(mean)
            want = there.curvature().products(there.theta, data(0), w, v)
            model[1].running_mean.fill_(0.0)
            curvature = there.curvature()
            buffers = {"1.running_mean": torch.full((6,), mean).double()}
            for _ in range(5):
                found = curvature.at(curvature.active, buffers=buffers).products(there.theta, data(0), w, v)
                torch.testing.assert_close(found, want)
        assert all(torch.equal(t, before[name]) for name, t in model.named_buffers())


def test_random_numbers_are_drawn_once_for_all_passes() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Gpt(), nn.Dropout(0.3)).double()
    there = Setting(model, MODELS["gpt"].loss, *layout_of(model), lambda s: MODELS["gpt"].data(6))
    batch, v, w = there.data(0), torch.randn(4, there.layout.size, dtype=torch.float64), weights_of(0, 6)
    start = seeded(0)
    want = explicit(there, there.theta, batch, w, v, symmetric=True)
    left = generators()
    for slices in (None, 4000):  # at once, and by twos
        for kind in ("exact", "gauss-newton"):
            set_generators(start)
            found = there.curvature(slices, kind).products(there.theta, batch, w, v)
            torch.testing.assert_close(found.losses, want.losses, rtol=1e-12, atol=1e-12)
            if kind == "exact":
                check(found, want)
            assert torch.equal(generators(), left)


# Gauss-Newton


def newton(there: Setting, theta: Tensor, batch: Sequence[Tensor], w: Tensor, v: Tensor) -> Tensor:
    """By whole matrices, of a model that returns one tensor and is called once."""
    state = generators()
    with torch.no_grad():
        shape = losses_and_output(there, theta, batch, state)[1].shape

    def loss(out: Tensor) -> Tensor:
        return (losses_and_output(there, theta, batch, state, out.view(shape))[0] * w).sum()

    return oracles.newton_products(lambda t: losses_and_output(there, t, batch, state)[1].flatten(), loss, theta, v)


def losses_and_output(
    there: Setting, theta: Tensor, batch: Sequence[Tensor], state: Tensor, put: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    outputs: list[Tensor] = []
    hook = there.model.register_forward_hook(lambda m, a, out: outputs.append(out) or put)  # type: ignore[func-returns-value]
    try:
        return losses_at(there, batch, state)(theta), outputs[0]
    finally:
        hook.remove()


NEWTON = ["mlp", "cnn", *(n for n in CASES if n not in TWICE | {"loss in pieces", "loss that differentiates"})]


@pytest.mark.parametrize(
    ("name", "queries"), [*crossed(NEWTON, [3, 1]), pytest.param("gpt", 3, marks=pytest.mark.slow)]
)
def test_gauss_newton_is_that_of_the_whole_matrices(name: str, queries: int) -> None:
    there = SETTINGS[name]()
    curvature = there.curvature(kind="gauss-newton")
    v = torch.randn(queries, there.layout.size, dtype=torch.float64)
    for seed in range(5):
        batch, theta = there.data(seed), there.theta + 0.05 * seed
        w, start = weights_of(seed, len(batch[0])), seeded(seed)
        want = newton(there, theta, batch, w, v)
        set_generators(start)
        found = curvature.products(theta, batch, w, v)
        # sums of a few hundred terms in float64
        torch.testing.assert_close(found.hessian, want, rtol=0, atol=1e-11 * max(1.0, float(want.abs().max())))


class Returned:
    def __init__(self, logits: Tensor) -> None:
        self.logits, self.name = logits, "of no account"


@dataclass(frozen=True)
class Answer:
    logits: Tensor
    shape: tuple[int, int] = (3, 3)


class Pair(NamedTuple):
    number: int
    logits: Tensor


class Wrapped(nn.Module):
    """Two layers that hand out their logits in some structure."""

    def __init__(self, wrap: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.net, self.wrap = Between(torch.tanh), wrap

    def forward(self, x: Tensor) -> Any:
        return self.wrap(self.net(x))


@pytest.mark.parametrize(
    ("wrap", "read"),
    [
        (lambda z: {"a": [z, 3], "b": None}, lambda o: o["a"][0]),
        (lambda z: (z[:, :2], z[:, 2:], z.detach()), lambda o: torch.cat(o[:2], 1)),
        (Returned, lambda o: o.logits),
        (Answer, lambda o: o.logits),
        (lambda z: Pair(3, z), lambda o: o.logits),
    ],
)
def test_outputs_are_found_in_whatever_the_model_returns(wrap: Any, read: Any) -> None:
    torch.manual_seed(0)
    model = Wrapped(wrap).double()
    layout, theta = layout_of(model)
    plain = Setting(model.net, cross_entropy, *layout_of(model.net), data)
    function = Functional(
        model, lambda m, x, y: F.cross_entropy(read(m(x)), y, reduction="none"), layout, torch.float64
    )
    v, w = torch.randn(2, layout.size, dtype=torch.float64), weights_of(0, SIZE)
    found = Curvature(function, kind="gauss-newton").products(theta, data(0), w, v)
    want = plain.curvature(kind="gauss-newton").products(theta, data(0), w, v)
    torch.testing.assert_close(found, want)


def two_views(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """One loss of two calls."""
    return F.cross_entropy(m(x) * m(-x).exp(), y, reduction="none")


def chained(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The second call is given what the first returned."""
    first = m(x)
    return F.cross_entropy(m(F.pad(first, (0, 1))) + first, y, reduction="none")


@pytest.mark.parametrize("loss", [two_views, chained])
def test_several_calls_of_the_model_are_outputs_together(loss: Callable[..., Tensor]) -> None:
    torch.manual_seed(1)
    model = Between(torch.tanh).double()
    layout, theta = layout_of(model)
    x, y = data(0)
    v, w = torch.randn(3, layout.size, dtype=torch.float64), weights_of(0, SIZE)

    def outputs(theta: Tensor) -> Tensor:
        there = lambda x: torch.func.functional_call(model, layout.unflatten(theta), (x,))  # noqa: E731
        first = there(x)
        return torch.cat([first, there(-x if loss is two_views else F.pad(first, (0, 1)))]).flatten()

    def of_outputs(out: Tensor) -> Tensor:
        first, second = out.view(2, SIZE, 3)
        logits = first * second.exp() if loss is two_views else first + second
        return (F.cross_entropy(logits, y, reduction="none") * w).sum()

    want = oracles.newton_products(outputs, of_outputs, theta, v)
    function = Functional(model, loss, layout, torch.float64)
    found = Curvature(function, kind="gauss-newton").products(theta, (x, y), w, v)
    torch.testing.assert_close(found.hessian, want, rtol=0, atol=1e-12 * float(want.abs().max()))
    exact = Curvature(function).products(theta, (x, y), w, v)
    torch.testing.assert_close(found.along, exact.along)


def test_a_penalty_beside_the_model_is_in_the_losses_and_not_in_gauss_newton() -> None:
    model = nn.Linear(4, 3).double()
    layout, theta = layout_of(model)

    def loss(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(m, x, y) + m.weight.pow(3).sum()

    v, w = torch.randn(2, layout.size, dtype=torch.float64), weights_of(0, SIZE)
    found, exact = (
        Curvature(Functional(model, loss, layout, torch.float64), kind=kind).products(theta, data(0), w, v)
        for kind in ("gauss-newton", "exact")
    )
    bare = Curvature(Functional(model, cross_entropy, layout, torch.float64)).products(theta, data(0), w, v)
    torch.testing.assert_close(found.along, exact.along)
    torch.testing.assert_close(found.hessian, bare.hessian)  # of a linear model both are the same


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (
            lambda m, x, y: F.cross_entropy(m.b(torch.tanh(m.a(x))), y, reduction="none"),
            "0 calls of the model.*in the loss",
        ),
        (lambda m, x, y: m(x).detach().sum(1) + m.a(x).square().sum(1), "1 calls of the model"),
        (lambda m, x, y: m(x)[:, 0], "linear in what the model returns"),
        (CASES["loss that differentiates"].loss, "no function of what the model returns"),
    ],
)
def test_gauss_newton_is_refused_where_the_loss_is_not_curved_in_outputs(loss: Any, message: str) -> None:
    model = Between(torch.tanh).double()
    layout, theta = layout_of(model)
    curvature = Curvature(Functional(model, loss, layout, torch.float64), kind="gauss-newton")
    with pytest.raises(LossError, match=message):
        curvature.products(theta, data(0), torch.ones(SIZE), theta[None])


# what there are no products of, and what is said


@pytest.mark.parametrize("kind", ["exact", "gauss-newton"])
@pytest.mark.parametrize("name", sorted(TWICE))
def test_a_loss_without_a_second_derivative_is_refused(name: str, kind: str) -> None:
    """A function that is differentiable once gives torch zeros without a word."""
    there = of_case(CASES[name])
    with pytest.raises(LossError, match="no second derivative"):
        there.curvature(kind=kind).products(there.theta, there.data(0), torch.ones(SIZE), there.theta[None])


def test_reentrant_checkpointing_is_named_with_what_works() -> None:
    model = Between(lambda h: checkpoint(torch.tanh, h, use_reentrant=True)).double()
    layout, theta = layout_of(model)
    curvature = Curvature(Functional(model, cross_entropy, layout, torch.float64))
    with pytest.raises(LossError, match="use_reentrant=False"):
        curvature.products(theta, data(0), torch.ones(SIZE), theta[None])


def test_a_gradient_that_changes_otherwise_than_the_hessian_says_is_said(caplog: pytest.LogCaptureFixture) -> None:
    for name in (
        "old-style function",
        "a part without gradients",
        "activation checkpointing",
        "loss that differentiates",
    ):
        caplog.clear()
        there = of_case(CASES[name])
        there.curvature().products(there.theta, there.data(0), torch.ones(SIZE), there.theta[None])
        assert ("not how its gradient changes" in caplog.text) == (not CASES[name].derivative)


def test_an_embedding_s_padding_row_is_left_out_as_training_leaves_it() -> None:
    """Forward mode sees it, which shows where the row is not zero: at first it is, and the losses are flat there."""
    there, v = of_layer("embedding with padding"), torch.randn(3, 20, dtype=torch.float64)
    curvature, w, (x,) = there.curvature(), weights_of(0, SIZE), there.data(0)
    for row in (0.0, 0.3):
        theta = there.theta.clone()
        theta.view(5, 4)[1] = row
        check(curvature.products(theta, (x,), w, v), explicit(there, theta, (x,), w, v, symmetric=True))


def test_an_operation_met_later_that_has_no_forward_mode_goes_by_a_second_backward_pass() -> None:
    def loss(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(m, x, y) + (Reversal.apply(m(x)).square().sum(1) if x[0, 0] > 5 else 0.0)

    model = Between(torch.tanh).double()
    there = Setting(model, loss, *layout_of(model), data)
    curvature, v = there.curvature(), torch.randn(3, layout_of(model)[0].size, dtype=torch.float64)
    (x, y), w, start = data(0), weights_of(0, SIZE), seeded(0)
    for first in (0.0, 6.0):
        x = x.clone()
        x[0, 0] = first
        set_generators(start)
        check(
            curvature.products(there.theta, (x, y), w, v), explicit(there, there.theta, (x, y), w, v, symmetric=False)
        )
    assert [*curvature._ways._works.values()] == [["double"]]


def test_an_objective_has_one_weight() -> None:
    model = normed().double()
    layout, theta = layout_of(model)
    v = torch.randn(3, layout.size, dtype=torch.float64)
    each, mean = (
        Curvature(Functional(model, loss, layout, torch.float64))
        for loss in (cross_entropy, lambda m, x, y: cross_entropy(m, x, y).mean())
    )
    found = mean.products(theta, data(0), torch.full((SIZE,), 2.0), v)
    want = each.products(theta, data(0), torch.full((SIZE,), 2.0 / SIZE), v)
    torch.testing.assert_close(found.hessian, want.hessian)
    torch.testing.assert_close(found.along, want.along.mean(1, keepdim=True))
    with pytest.raises(LossError, match="an objective has one weight"):
        mean.products(theta, data(0), weights_of(0, SIZE), v)


def test_bad_arguments_are_named() -> None:
    there = SETTINGS["mlp"]()
    with pytest.raises(ValueError, match="unknown curvature: got 'fisher', expected one of 'exact', 'gauss-newton'"):
        there.curvature(kind="fisher")
    infinite = there._replace(loss=lambda m, x, y: cross_entropy(m, x, y) / (x[:, 0] * 0.0))
    with pytest.raises(LossError, match="not finite"):
        infinite.curvature().products(there.theta, there.data(0), torch.ones(7), there.theta[None])
    shapeless = there._replace(loss=lambda m, x, y: m(x))
    with pytest.raises(LossError, match="not one number per example"):
        shapeless.curvature().products(there.theta, there.data(0), torch.ones(7), there.theta[None])


@pytest.mark.parametrize("kind", ["exact", "gauss-newton"])
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_to_few_bits_products_are_right_to_their_rounding(low: torch.dtype, kind: str) -> None:
    torch.manual_seed(0)
    case = MODELS["gpt"]
    model = case.build().to(low)
    layout, theta = layout_of(model)
    batch, v = case.data(8), torch.randn(2, layout.size)
    found = Curvature(Functional(model, case.loss, layout, low), kind=kind).products(
        theta.float(), batch, torch.full((8,), 1 / 8), v
    )
    double = Functional(model.double(), case.loss, layout, torch.float64)
    want = Curvature(double, kind=kind).products(theta.double(), batch, torch.full((8,), 1 / 8), v.double())
    # four passes of 7 products and about as many other operations each, which add up as their 2-norm does; twice for luck
    bound = 2 * 56**0.5 * torch.finfo(low).eps / 2
    for a, b in ((found.hessian, want.hessian), (found.along, want.along)):
        assert float((a - b).norm() / b.norm()) <= bound


@pytest.mark.parametrize("kind", ["exact", "gauss-newton"])
def test_a_step_of_a_run_has_the_products_of_its_reduced_loss(kind: str, tmp_path: Path) -> None:
    trained = train(tmp_path / "run", OPTIMIZERS["adamw"], steps=3)
    run, case = trained.run, trained.case
    shares = Shares(run, trained.model, case.loss, torch.float64, 1 << 26, np.eye(len(run.groups)))
    v = torch.randn(3, run.layout.size, dtype=torch.float64)
    ((step,),) = run.blocks(1, 2)
    found = shares.curved(step, v, curvature=kind).hessian
    batch = trained.batches[1][1:]
    direct = Curvature(Functional(trained.model, case.loss, run.layout, torch.float64), kind=kind)
    size = len(batch[0])
    want = direct.products(run.vector(1), batch, torch.full((size,), 1 / size), v).hessian
    torch.testing.assert_close(found, want)
    with pytest.raises(LossError, match="a loss is needed"):
        Shares(run, trained.model, None, torch.float64, 1 << 26, np.eye(len(run.groups))).curved(step, v)


@pytest.mark.parametrize("reduced", [False, True])
def test_only_of_an_objective_the_first_derivative_is_held_against_the_gradient_unasked(
    reduced: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of losses, the caller holds them against what was recorded; an objective has none."""
    model = normed().double()
    layout, theta = layout_of(model)

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        losses = cross_entropy(model, x, y)
        return losses.mean() if reduced else losses

    curvature, asked, run = Curvature(Functional(model, loss, layout, torch.float64)), list[bool](), Ways.run

    def running(self: Ways, way: str, point: Point, directions: Any) -> Any:
        asked.append(point.checked)
        return run(self, way, point, directions)

    curvature.products(theta, data(0), torch.ones(SIZE), theta[None])  # the first of a kind always is
    monkeypatch.setattr(Ways, "run", running)
    for _ in range(2):  # later ones are taped
        curvature.products(theta, data(0), torch.ones(SIZE), theta[None], checked=False)
    assert set(asked) == {reduced}
