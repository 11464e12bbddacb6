"""The secant: every rule exact, equal to the vjp in the limit, unchanged when the ends are swapped."""

import logging
from functools import cache

import pytest
import torch
from cases import MODELS, OPERATIONS, OperationCase
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import attrib
from attrib.layout import Layout
from attrib.path import Measured, rules
from attrib.path.graph import Graph
from attrib.path.quadrature import gradients_one_by_one, gradients_side_by_side


def ends(case: OperationCase, seed: int, distance: float) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(case.shape, dtype=torch.float64, generator=generator)
    d = torch.randn(case.shape, dtype=torch.float64, generator=generator) * distance
    return (x.abs() + 0.5, (x + d).abs() + 0.5) if case.positive else (x, x + d)


def scalar(case: OperationCase):
    """A sum of all outputs with unequal weights."""

    def f(x: torch.Tensor) -> torch.Tensor:
        y = case.function(x)
        weights = torch.linspace(-1, 2, y.numel(), dtype=x.dtype).reshape(y.shape)
        return (y * weights).sum()

    return f


@cache
def graph_of(case: OperationCase) -> Graph:
    """Traced once, elsewhere than where it is used, as in a run."""
    return Graph(scalar(case), [ends(case, 7, 0.0)[0]], [])


def secant(case: OperationCase, x0: torch.Tensor, x1: torch.Tensor) -> torch.Tensor:
    graph = graph_of(case)
    values = graph.forward([x0], [x1], [])
    return graph.backward(torch.ones((), dtype=x0.dtype), values)[0]


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("distance", [1e-9, 1e-3, 0.3, 3.0])
def test_every_rule_is_exact(name: str, distance: float) -> None:
    case = OPERATIONS[name]
    x0, x1 = ends(case, 0, distance)
    change = scalar(case)(x1) - scalar(case)(x0)
    gradient = secant(case, x0, x1)
    # both sides are float64 sums: rounding is eps times their gross size, with room for a few hundred operations
    gross = float((gradient * (x1 - x0)).abs().sum() + scalar(case)(x0).abs() + scalar(case)(x1).abs() + 1)
    assert abs(float((gradient * (x1 - x0)).sum() - change)) <= 1e-12 * gross


@pytest.mark.parametrize("name", [n for n, c in OPERATIONS.items() if not c.kinks])
def test_every_rule_is_the_vjp_in_the_limit(name: str) -> None:
    case = OPERATIONS[name]
    x0, _ = ends(case, 1, 0.0)
    step = 1e-6 * torch.randn(case.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    expected = torch.func.grad(scalar(case))(x0 + step / 2)
    gradient = secant(case, x0, x0 + step)
    # around the midpoint the rules differ from the vjp at second order in the step (1e-12); 1e-8 allows for curvature
    # and for eps / 1e-6 where a rule falls back on a difference quotient
    torch.testing.assert_close(gradient, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_rule_is_symmetric_in_the_ends(name: str) -> None:
    case = OPERATIONS[name]
    x0, x1 = ends(case, 3, 0.5)
    torch.testing.assert_close(secant(case, x0, x1), secant(case, x1, x0), rtol=1e-12, atol=1e-12)


@given(
    seed=st.integers(0, 10**6), distance=st.sampled_from([0.0, 1e-7, 0.1, 10.0]), name=st.sampled_from(list(OPERATIONS))
)
def test_rules_are_exact_for_random_ends(seed: int, distance: float, name: str) -> None:
    case = OPERATIONS[name]
    x0, x1 = ends(case, seed, distance)
    gradient = secant(case, x0, x1)
    assert torch.isfinite(gradient).all()
    change = scalar(case)(x1) - scalar(case)(x0)
    gross = float((gradient * (x1 - x0)).abs().sum() + scalar(case)(x0).abs() + scalar(case)(x1).abs() + 1)
    assert abs(float((gradient * (x1 - x0)).sum() - change)) <= 1e-12 * gross


def query_of(model: nn.Module, measurement: object) -> tuple[Measured, torch.Tensor, torch.Tensor]:
    layout = Layout(tuple(n for n, _ in model.named_parameters()), tuple(tuple(p.shape) for p in model.parameters()))
    theta = layout.flatten(model.parameters())
    other = theta + 0.3 * torch.randn(theta.shape, dtype=theta.dtype)
    return Measured(model, measurement, layout, torch.float64, theta), theta, other


def model_query(name: str) -> tuple[Measured, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    case = MODELS[name]
    model = case.build().double().eval()
    x, y = case.data(3)
    return query_of(model, attrib.measure.log_prob(x.double() if x.is_floating_point() else x, y))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("substeps", [1, 3])
def test_secant_of_a_network_is_complete_at_every_number_of_substeps(name: str, substeps: int) -> None:
    query, theta0, theta1 = model_query(name)
    found = attrib.Secant(substeps).bind(query)(theta0, theta1)
    gap = found.gradient @ (theta1 - theta0) - (found.end - found.start)
    # rounding of a float64 inner product over P parameters, relative to its gross size
    gross = (found.gradient.abs() @ (theta1 - theta0).abs()).max()
    assert gap.abs().max() <= 1e-13 * gross


@pytest.mark.parametrize("name", MODELS)
def test_secant_tends_to_the_path_integral_as_substeps_grow(name: str) -> None:
    query, theta0, theta1 = model_query(name)
    # the midpoint rule on 2000 cells, each a step of its own: steps are taken side by side, the nodes of one are not
    ends = torch.lerp(theta0, theta1, torch.linspace(0, 1, 2001, dtype=theta0.dtype)[:, None])
    integral = attrib.Midpoint(1).bind(query)(ends[:-1], ends[1:]).gradient.mean(0)
    errors = [
        float((attrib.Secant(n).bind(query)(theta0, theta1).gradient - integral).norm() / integral.norm())
        for n in (1, 4, 16, 64)
    ]
    # second order on smooth pieces: 16 times smaller for 4 times the substeps; kinks of the network and the 2000 nodes
    # leave a floor of a few 1e-3
    assert errors[0] > errors[1] > errors[2] > errors[3]
    assert errors[3] <= max(errors[0] / 50, 1e-3)


@pytest.mark.parametrize("path", [attrib.Secant(), attrib.GaussLegendre(3), attrib.Midpoint(3)])
def test_queries_of_a_batch_and_a_plain_callable_agree(path: attrib.path.Path) -> None:
    torch.manual_seed(0)
    case = MODELS["mlp"]
    model = case.build().double()
    measurement = attrib.measure.margin(*case.data(4))
    query, theta0, theta1 = query_of(model, measurement)
    plain, _, _ = query_of(model, lambda m: measurement(m))
    a, b = path.bind(query)(theta0, theta1), path.bind(plain)(theta0, theta1)
    for got, expected in zip(a, b, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_depth_two_linear_secant_is_the_path_integral() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5, bias=False), nn.Linear(5, 3, bias=False)).double()
    x = torch.randn(2, 4, dtype=torch.float64)
    query, theta0, theta1 = query_of(model, attrib.measure.logit(x, torch.tensor([0, 2])))
    secant_ = attrib.Secant().bind(query)(theta0, theta1).gradient
    # the integrand is linear along the segment, so two Gauss nodes are exact; both sides are a few products and sums
    integral = attrib.GaussLegendre(2).bind(query)(theta0, theta1).gradient
    torch.testing.assert_close(secant_, integral, rtol=1e-14, atol=1e-14)


def test_gauss_legendre_reaches_rounding_on_a_smooth_network() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    query, theta0, theta1 = query_of(model, attrib.measure.log_prob(torch.randn(2, 4).double(), torch.tensor([0, 2])))
    found = attrib.GaussLegendre(12).bind(query)(theta0, theta1)
    gap = found.gradient @ (theta1 - theta0) - (found.end - found.start)
    assert gap.abs().max() <= 1e-10


def test_gradients_of_a_query_are_those_of_autograd() -> None:
    query, theta, _ = model_query("gpt")
    leaf = theta.clone().requires_grad_()
    value = query.of_parameters(query.layout.unflatten(leaf), *query.batch)
    expected = torch.stack([torch.autograd.grad(v, leaf, retain_graph=True)[0] for v in value])
    for gradient in (gradients_one_by_one, gradients_side_by_side):
        torch.testing.assert_close(gradient(query)(theta), expected, rtol=1e-12, atol=1e-12)


def test_operations_without_a_rule_are_named_once(caplog: pytest.LogCaptureFixture) -> None:
    rules._reported.clear()
    with caplog.at_level(logging.INFO, logger="attrib"):
        for _ in range(2):
            secant(OPERATIONS["product of all"], *ends(OPERATIONS["product of all"], 0, 0.1))
    assert sum("prod" in message for message in caplog.messages) == 1


def test_untraceable_model_is_told_to_use_gauss_legendre() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.linear(x)
            return y if float(y.sum()) > 0 else -y

    model = Branching().double()
    x = torch.randn(2, 2, dtype=torch.float64)
    query, theta0, theta1 = query_of(model, lambda m: m(x)[:, 0])
    with pytest.raises(attrib.errors.UntraceableModelError, match="GaussLegendre"):
        attrib.Secant().bind(query)(theta0, theta1)


def test_complex_numbers_are_refused_by_name() -> None:
    model = nn.Embedding(8, 3).double()
    query, _, _ = query_of(model, lambda m: torch.fft.rfft(m.weight, dim=0).abs()[:, 0])
    with pytest.raises(attrib.errors.UntraceableModelError, match=r"complex numbers at aten.*GaussLegendre"):
        attrib.Secant().bind(query)


def test_model_that_runs_in_one_type_only_is_told_of_dtype() -> None:
    model = nn.Linear(3, 2).double()
    layout = Layout(("weight", "bias"), ((2, 3), (2,)))
    theta = layout.flatten(model.parameters())
    x = torch.randint(0, 255, (2, 3), dtype=torch.uint8)
    with pytest.raises(attrib.errors.MeasurementError, match="pass that as dtype="):
        Measured(model, lambda m: m(x / 255)[:, 0], layout, torch.float64, theta)
    Measured(model, lambda m: m(x / 255)[:, 0], layout, torch.float32, theta)


@pytest.mark.parametrize("bad", [0, -1, 1.5, "4"])
@pytest.mark.parametrize("path", [attrib.Secant, attrib.GaussLegendre, attrib.Midpoint])
def test_number_of_nodes_must_be_a_count(path: type, bad: object) -> None:
    with pytest.raises(ValueError, match="integer of at least 1"):
        path(bad)
