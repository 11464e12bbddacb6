"""Per-example gradients of every layer against batches of one."""

import numpy as np
import oracles
import pytest
import torch
from attrib.kernels.factors.base import products_are_cheaper
from cases import LAYERS
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import attrib
from attrib.gradients import FUNCTIONS, ExampleGradients
from attrib.gradients.batchwise import Batchwise, candidates, find
from attrib.layout import Layout


def layout_of(model: nn.Module) -> tuple[Layout, Tensor]:
    named = dict(model.named_parameters())
    layout = Layout(tuple(named), tuple(tuple(p.shape) for p in named.values()))
    return layout, layout.flatten(named.values())


def loss(model: nn.Module, x: Tensor) -> Tensor:
    y = model(x)
    weights = torch.cos(torch.arange(y[0].numel(), dtype=x.dtype)).reshape(y[0].shape)
    return ((y * weights + 0.3 * y**2).flatten(1)).sum(1)


def setting(name: str, size: int, seed: int = 0) -> tuple[nn.Module, Layout, Tensor, Tensor, np.ndarray]:
    torch.manual_seed(seed)
    build, shape = LAYERS[name]
    model = build().double()
    layout, theta = layout_of(model)
    x = torch.randn(size, *shape, dtype=torch.float64)
    expected = oracles.single_gradients(model, theta.numpy(), loss, (x,))
    return model, layout, theta, x, expected


@pytest.mark.parametrize("size", [1, 4, 9])
@pytest.mark.parametrize("name", LAYERS)
def test_shares_of_every_layer_are_those_of_single_examples(name: str, size: int) -> None:
    model, layout, theta, x, expected = setting(name, size)
    shares = ExampleGradients(loss, model, layout, torch.float64)
    directions = torch.randn(3, layout.size, dtype=torch.float64)
    losses, contracted = shares.contract(theta, (x,), directions)
    torch.testing.assert_close(losses, loss(model, x).detach())
    products = directions.numpy()[:, None] * expected[None]
    want = np.stack([products[..., part].sum(-1) for _, part in layout.slices()], -1)
    # sums of at most a few hundred float64 terms
    np.testing.assert_allclose(contracted, want, rtol=1e-10, atol=1e-10 * np.abs(products).sum(-1).max())
    np.testing.assert_allclose(shares.rows(theta, (x,)), expected, rtol=1e-10, atol=1e-10 * np.abs(expected).max())
    total = shares.total(theta, (x,))[1]
    np.testing.assert_allclose(total, expected.sum(0), rtol=1e-10, atol=1e-10 * np.abs(expected).max())


@pytest.mark.parametrize("rows", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_contraction_is_the_same_by_rows_and_by_pairs(name: str, rows: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, layout, theta, x, expected = setting(name, 5)
    monkeypatch.setattr("attrib.kernels.factors.base.products_are_cheaper", lambda *sizes: not rows)
    monkeypatch.setattr("attrib.kernels.factors.base.SLICE_BYTES", 8 * 40)  # slices of one or a few examples
    directions = torch.randn(4, layout.size, dtype=torch.float64)
    contracted = ExampleGradients(loss, model, layout, torch.float64).contract(theta, (x,), directions)[1]
    products = directions.numpy()[:, None] * expected[None]
    want = np.stack([products[..., part].sum(-1) for _, part in layout.slices()], -1)
    np.testing.assert_allclose(contracted, want, rtol=1e-10, atol=1e-10 * np.abs(products).sum(-1).max())


def test_the_cheaper_contraction_is_chosen_at_the_crossing() -> None:
    """100 examples, a square weight: products cost queries x positions, gradients positions + queries and writing them."""
    chosen = {q: products_are_cheaper(q, 400, 100, 64, 64) for q in (1, 4, 5, 115)}
    assert chosen == {1: True, 4: True, 5: False, 115: False}
    assert products_are_cheaper(115, 100, 100, 512, 64)  # one position each: the gradient is no shorter
    assert products_are_cheaper(115, 60, 100, 512, 64)  # most positions reached by no gradient
    assert not products_are_cheaper(8, 6400, 100, 512, 64)


def test_a_plan_made_on_one_batch_size_serves_the_others() -> None:
    model, layout, theta, _, _ = setting("attention, batch second", 2)
    shares = ExampleGradients(loss, model, layout, torch.float64)
    for size in (5, 1, 3, 12):
        x = torch.randn(size, 3, 6, dtype=torch.float64)
        expected = oracles.single_gradients(model, theta.numpy(), loss, (x,))
        np.testing.assert_allclose(shares.rows(theta, (x,)), expected, atol=1e-10)


@pytest.mark.parametrize("name", ["linear", "layer norm", "group norm", "bare parameters", "conv1d"])
def test_listed_functions_make_no_detour(name: str) -> None:
    """Layers in the table go neither through vmap of the loss nor through forward-mode derivatives of a whole model."""
    model, layout, theta, x, _ = setting(name, 4)
    shares = ExampleGradients(loss, model, layout, torch.float64)
    shares.contract(theta, (x,), theta[None])
    (assignment,) = shares._forms.assignments.values()
    assert assignment.whole == {}
    parameters = shares.vector.parameters(theta)
    with shares._loss.bound(parameters):
        sites = shares._forms.follow(parameters, (x,)).sites
    assert sites
    assert all(site.call.function in FUNCTIONS for site in sites)


class TimeFirstFlat(nn.Module):
    """Time and batch in one dimension, time first; the head may start at zero."""

    def __init__(self, width: int = 5, zero: bool = False) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(3, width), nn.Linear(width, 1)
        if zero:
            nn.init.zeros_(self.head.weight)

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        h = self.inner(x.transpose(0, 1).reshape(t * b, c)).tanh()
        return self.head(h).view(t, b).mean(0)


@pytest.mark.parametrize(("length", "width"), [(4, 5), (5, 5), (7, 3)])
@pytest.mark.parametrize("zero", [False, True])
def test_examples_without_a_gradient_do_not_hide_the_layout(zero: bool, length: int, width: int) -> None:
    """Hinge losses of zero, a head at zero: gradients vanish, the split must not be guessed."""

    def hinge(model: nn.Module, x: Tensor) -> Tensor:
        margin = 1.0 if zero else torch.where(torch.arange(len(x)) % 2 == 0, -9.0, 9.0)
        return (margin - model(x)).relu()

    torch.manual_seed(0)
    model = TimeFirstFlat(width, zero).double()
    layout, theta = layout_of(model)
    shares = ExampleGradients(hinge, model, layout, torch.float64)
    x = torch.randn(5, length, 3, dtype=torch.float64)
    shares.rows(theta, (x,))  # a plan is made here, where gradients vanish
    moved = theta + 0.1
    expected = np.zeros((5, layout.size))
    for i in range(5):
        leaf = moved.clone().requires_grad_()
        values = torch.func.functional_call(model, layout.unflatten(leaf), (x[i : i + 1],))
        bound = 1.0 if zero else (-9.0 if i % 2 == 0 else 9.0)
        expected[i] = torch.autograd.grad((bound - values).relu().sum(), leaf)[0]
    np.testing.assert_allclose(shares.rows(moved, (x,)), expected, atol=1e-12)
    directions = torch.randn(2, layout.size, dtype=torch.float64)
    contracted = shares.contract(moved, (x,), directions)[1].sum(-1)
    np.testing.assert_allclose(contracted, directions.numpy() @ expected.T, atol=1e-11)


def test_frozen_parameters_have_no_shares() -> None:
    model, layout, theta, x, expected = setting("one layer used twice", 4)
    shares = ExampleGradients(loss, model, layout, torch.float64).at(frozenset(["linear.weight"]))
    rows = shares.rows(theta, (x,)).numpy()
    bias = dict(layout.slices())["linear.bias"]
    assert not rows[:, bias].any()
    expected[:, bias] = 0
    np.testing.assert_allclose(rows, expected, atol=1e-10)
    np.testing.assert_allclose(shares.total(theta, (x,))[1], expected.sum(0), atol=1e-10)
    assert not shares.contract(theta, (x,), theta[None])[1][..., list(layout.names).index("linear.bias")].any()


def test_dropout_inside_attention_is_the_same_when_run_again() -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.5, batch_first=True).double()
    layout, theta = layout_of(model)
    x = torch.randn(5, 3, 6, dtype=torch.float64)
    shares = ExampleGradients(loss, model, layout, torch.float64)
    directions = torch.randn(2, layout.size, dtype=torch.float64)
    state = torch.get_rng_state()
    contracted = shares.contract(theta, (x,), directions)[1].sum(-1)
    torch.set_rng_state(state)
    leaf = theta.clone().requires_grad_()
    losses = torch.func.functional_call(model, layout.unflatten(leaf), (x,))
    weights = torch.cos(torch.arange(18, dtype=x.dtype)).reshape(3, 6)
    values = (losses * weights + 0.3 * losses**2).flatten(1).sum(1)
    rows = torch.stack([torch.autograd.grad(v, leaf, retain_graph=True)[0] for v in values])
    np.testing.assert_allclose(contracted, directions @ rows.T, atol=1e-10)


@pytest.mark.parametrize("shape", [(5,), (2, 5, 4)])
def test_products_with_a_vector_or_a_stack_of_matrices(shape: tuple[int, ...]) -> None:
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(shape))

        def forward(self, x: Tensor) -> Tensor:
            return (x[:, None] if len(shape) == 3 else x) @ self.w

    model = Product().double()
    layout, theta = layout_of(model)
    x = torch.randn(4, 3, 5, dtype=torch.float64)
    expected = oracles.single_gradients(model, theta.numpy(), loss, (x,))
    shares = ExampleGradients(loss, model, layout, torch.float64)
    np.testing.assert_allclose(shares.rows(theta, (x,)), expected, atol=1e-10)
    directions = torch.randn(3, layout.size, dtype=torch.float64)
    np.testing.assert_allclose(
        shares.contract(theta, (x,), directions)[1].sum(-1), directions.numpy() @ expected.T, atol=1e-9
    )


@pytest.mark.parametrize(("dtype", "logit"), [(torch.float32, 97.0), (torch.float64, 743.0)])  # e^-97 = 7e-43
def test_a_gradient_too_small_for_its_digits_is_no_reason_for_the_slow_way(
    dtype: torch.dtype, logit: float, caplog: pytest.LogCaptureFixture
) -> None:
    """As a model that has learned its examples leaves them."""
    model = nn.Linear(1, 2).to(dtype)
    layout, _ = layout_of(model)
    theta, x, y = torch.tensor([-0.5, 0.5, 0.0, 0.0], dtype=dtype), torch.tensor([[logit], [1.0]]), torch.tensor([1, 1])
    shares = ExampleGradients(
        lambda m, x, y: nn.functional.cross_entropy(m(x), y, reduction="none"), model, layout, dtype
    )
    rows = shares.rows(theta, (x.to(dtype), y))
    assert 0 < rows[0, 2] < torch.finfo(dtype).smallest_normal  # the bias's, without digits
    direction = torch.randn(1, 4, dtype=torch.float64)
    products = shares.contract(theta, (x.to(dtype), y), direction)[1].sum(-1)
    np.testing.assert_allclose(
        products, direction @ rows.double().T, rtol=1e-5, atol=torch.finfo(dtype).smallest_normal
    )
    assert not caplog.messages


@pytest.mark.parametrize("bad", ["scalar", "matrix", "number"])
def test_loss_must_be_one_number_per_example(bad: str) -> None:
    model = nn.Linear(3, 2).double()
    layout, theta = layout_of(model)
    wrong = {"scalar": lambda m, x: m(x).sum(), "matrix": lambda m, x: m(x), "number": lambda m, x: 1.0}[bad]
    with pytest.raises(attrib.errors.LossError, match=r"expected shape \(4,\)"):
        ExampleGradients(wrong, model, layout, torch.float64).total(theta, (torch.randn(4, 3).double(),))


@given(
    batch=st.integers(2, 5), inner=st.integers(1, 4), rest=st.integers(1, 3), where=st.integers(0, 1),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_the_layout_of_a_batch_is_read_off(batch: int, inner: int, rest: int, where: int, seed: int) -> None:
    """A reading that is found splits the tensor into the examples that it was made of."""
    examples = torch.randn(batch, inner, rest, generator=torch.Generator().manual_seed(seed)) + 10
    minor = bool(seed % 2)
    flat = examples.transpose(0, 1).reshape(-1, rest) if minor else examples.reshape(-1, rest)
    tensor = flat.movedim(0, where)
    owner = torch.arange(batch).repeat(inner) if minor else torch.arange(batch).repeat_interleave(inner)
    changes = [(i, (owner == i).unsqueeze(1 - where).expand(tensor.shape)) for i in range(batch)]
    reading = find(tensor.shape, batch, changes)
    assert reading is not None
    for i, rows in enumerate(reading.split(tensor, batch)):
        torch.testing.assert_close(rows.sum(), examples[i].sum())


def test_what_does_not_change_is_not_assumed_to_belong_to_anyone() -> None:
    nothing = [(i, torch.zeros(4, 4, dtype=torch.bool)) for i in range(4)]
    assert find((4, 4), 4, nothing) is None


def test_candidates_put_the_whole_dimension_first() -> None:
    assert candidates((8, 4, 3), 4) == [Batchwise(1), Batchwise(0), Batchwise(0, minor=True)]


def test_the_callers_model_and_generator_are_left_alone() -> None:
    model, layout, theta, x, _ = setting("attention, batch first", 4)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    state, modes = torch.get_rng_state(), [m.training for m in model.modules()]
    shares = ExampleGradients(loss, model, layout, torch.float64)
    shares.contract(theta + 1, (x,), theta[None])
    shares.rows(theta + 1, (x,))
    assert torch.equal(state, torch.get_rng_state())
    assert modes == [m.training for m in model.modules()]
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
