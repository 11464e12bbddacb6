"""Per-example gradients of every layer against batches of one."""

import numpy as np
import oracles
import pytest
import torch
from cases import LAYERS
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import attrib
from attrib.gradients import FUNCTIONS, Shares
from attrib.gradients.batchwise import Batchwise, candidates, find
from attrib.gradients.terms import rows_are_cheaper
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
    shares = Shares(loss, model, layout, torch.float64)
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
    monkeypatch.setattr("attrib.gradients.terms.rows_are_cheaper", lambda queries, positions: rows)
    monkeypatch.setattr("attrib.gradients.terms.ROWS_BYTES", 8 * 40)  # slices of one or a few examples
    directions = torch.randn(4, layout.size, dtype=torch.float64)
    contracted = Shares(loss, model, layout, torch.float64).contract(theta, (x,), directions)[1]
    products = directions.numpy()[:, None] * expected[None]
    want = np.stack([products[..., part].sum(-1) for _, part in layout.slices()], -1)
    np.testing.assert_allclose(contracted, want, rtol=1e-10, atol=1e-10 * np.abs(products).sum(-1).max())


def test_rows_are_made_where_counting_says_so() -> None:
    assert [rows_are_cheaper(q, 4) for q in (1, 2, 115)] == [False, True, True]
    assert not any(rows_are_cheaper(q, 1) for q in (1, 2, 115))
    assert not any(rows_are_cheaper(1, n) for n in (1, 64, 4096))


def test_a_plan_made_on_one_batch_size_serves_the_others() -> None:
    model, layout, theta, _, _ = setting("attention, batch second", 2)
    shares = Shares(loss, model, layout, torch.float64)
    for size in (5, 1, 3, 12):
        x = torch.randn(size, 3, 6, dtype=torch.float64)
        expected = oracles.single_gradients(model, theta.numpy(), loss, (x,))
        np.testing.assert_allclose(shares.rows(theta, (x,)), expected, atol=1e-10)


@pytest.mark.parametrize("name", ["linear", "layer norm", "group norm", "bare parameters", "conv1d"])
def test_listed_functions_make_no_detour(name: str) -> None:
    """Layers in the table go neither through vmap of the loss nor through forward-mode derivatives of a whole model."""
    model, layout, theta, x, _ = setting(name, 4)
    shares = Shares(loss, model, layout, torch.float64)
    shares.contract(theta, (x,), theta[None])
    (plan,) = shares._plans.values()
    assert plan.whole == ()
    sites = shares._trace(theta, (x,)).sites
    assert sites
    assert all(site.call.function in FUNCTIONS for site in sites)


class Coupled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return y - y.mean(0)


def test_coupled_examples_are_refused_by_name() -> None:
    model = Coupled().double()
    layout, theta = layout_of(model)
    x = torch.randn(4, 3, dtype=torch.float64)
    with pytest.raises(attrib.errors.CoupledExamplesError, match=r"linear\.(weight|bias)"):
        Shares(loss, model, layout, torch.float64).contract(theta, (x,), theta[None])


def test_batch_norm_in_train_mode_is_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).double()
    with pytest.raises(attrib.errors.CoupledExamplesError, match=r"BatchNorm1d in train mode.*'1'"):
        Shares(loss, model, layout_of(model)[0], torch.float64)


@pytest.mark.parametrize("bad", ["scalar", "matrix", "number"])
def test_loss_must_be_one_number_per_example(bad: str) -> None:
    model = nn.Linear(3, 2).double()
    layout, theta = layout_of(model)
    wrong = {"scalar": lambda m, x: m(x).sum(), "matrix": lambda m, x: m(x), "number": lambda m, x: 1.0}[bad]
    with pytest.raises(attrib.errors.LossError, match=r"expected shape \(4,\)"):
        Shares(wrong, model, layout, torch.float64).total(theta, (torch.randn(4, 3).double(),))


@given(
    batch=st.integers(2, 5),
    inner=st.integers(1, 4),
    rest=st.integers(1, 3),
    where=st.integers(0, 2),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_the_layout_of_a_batch_is_read_off(batch: int, inner: int, rest: int, where: int, seed: int) -> None:
    """A reading that is found splits the tensor into the examples that it was made of."""
    generator = torch.Generator().manual_seed(seed)
    examples = torch.randn(batch, inner, rest, generator=generator) + 10
    minor = bool(seed % 2)
    flat = examples.transpose(0, 1).reshape(-1, rest) if minor else examples.reshape(-1, rest)
    dim = min(where, 1)
    tensor = flat.movedim(0, dim)
    owner = torch.arange(batch).repeat(inner) if minor else torch.arange(batch).repeat_interleave(inner)
    probes = [(i, tensor * (owner == i).to(tensor.dtype).unsqueeze(1 - dim)) for i in range(batch)]
    reading = find(tensor.shape, batch, probes)
    assert reading is not None
    for i in range(batch):
        rows = reading.split(probes[i][1], batch)
        torch.testing.assert_close(rows[i].sum(), examples[i].sum())


def test_candidates_put_the_whole_dimension_first() -> None:
    assert candidates((8, 4, 3), 4) == [Batchwise(1), Batchwise(0), Batchwise(0, minor=True)]


def test_the_callers_model_and_generator_are_left_alone() -> None:
    model, layout, theta, x, _ = setting("attention, batch first", 4)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    state, modes = torch.get_rng_state(), [m.training for m in model.modules()]
    shares = Shares(loss, model, layout, torch.float64)
    shares.contract(theta + 1, (x,), theta[None])
    shares.rows(theta + 1, (x,))
    assert torch.equal(state, torch.get_rng_state())
    assert modes == [m.training for m in model.modules()]
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
