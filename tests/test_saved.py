"""What a sweep saves itself changes no number: values kept of a state, vectors gone through in pieces, copies not made."""

import numpy as np
import pytest
import torch
from attrib.kernels import slopes
from attrib.kernels.memory import empty, stacked
from cases import MODELS
from test_secant import model_query, query_of
from torch import Tensor

import attrib
from attrib.layout import Layout
from attrib.path import Measured, PathGradient, limit_bound, limit_gap, rules
from attrib.path.graph import Graph
from attrib.sensitivity import along_tensors


def one_step_at_a_time(monkeypatch: pytest.MonkeyPatch, traced: bool) -> None:
    monkeypatch.setattr("attrib.path.measured.STEPS_BYTES", 1)
    if not traced:
        monkeypatch.setattr("attrib.path.measured.TRACED_BYTES", 0)


def states_from(theta: Tensor, count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    moves = (0.05 * torch.randn(len(theta), dtype=theta.dtype, generator=generator) for _ in range(count))
    found = [theta]
    for move in moves:
        found.append(found[-1] + move)
    return found


def query(name: str, together: bool) -> tuple[Measured, Tensor]:
    """Three queries, by their rows or as a callable's."""
    by_rows, theta, _ = model_query(name)
    if not together:
        return by_rows, theta
    model, measurement = by_rows._made_of[:2]
    return query_of(model, lambda m: measurement(m))[:2]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("traced", [True, False])
@pytest.mark.parametrize("together", [True, False])
def test_values_kept_of_a_state_are_those_of_that_state(
    name: str, traced: bool, together: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Backwards over steps that share their states, then over some that do not; in another type on the way, too."""
    measured, theta = query(name, together)
    states = states_from(theta, 7)
    order = [*zip(states[5::-1], states[6:0:-1], strict=True), (states[0], states[5]), (states[2], states[1])]
    order += [(a.float(), b.float()) for a, b in order[:6]] + order[:2]
    plain = attrib.Secant().bind(measured)
    one_step_at_a_time(monkeypatch, traced)
    keeping = attrib.Secant().bind(measured)
    for a, b in order:
        found, want = keeping(a[None], b[None]), plain(a, b)
        for mine, other in zip(found, want, strict=True):  # the same graph on the same numbers
            torch.testing.assert_close(mine[0], other, rtol=1e-12, atol=1e-12 * float(other.abs().max()))


@pytest.mark.parametrize("name", MODELS)
def test_every_state_of_a_sweep_is_evaluated_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    measured, theta = query(name, together=True)
    one_step_at_a_time(monkeypatch, traced=False)
    integrate, states, calls = attrib.Secant().bind(measured), states_from(theta, 4), []
    monkeypatch.setattr(Graph, "values", lambda self, *given, of=Graph.values: calls.append(1) or of(self, *given))
    for k in reversed(range(4)):
        integrate(states[k][None], states[k + 1][None])
    assert len(calls) == 5


@pytest.mark.parametrize("h", [0.0, 1e-9, 1e-3, 0.1, 0.1499999, 0.1500001, 0.4, 3.0])
def test_the_slope_of_gelu_is_the_mean_of_its_derivative(h: float) -> None:
    x = torch.linspace(-9, 9, 1801, dtype=torch.float64)
    nodes, weights = (torch.from_numpy(a) for a in np.polynomial.legendre.leggauss(40))
    points = (x[:, None] + h * (nodes + 1) / 2).requires_grad_()
    for approximate in ("none", "tanh"):
        torch.nn.functional.gelu(points, approximate=approximate).sum().backward()
        assert points.grad is not None
        want, points.grad = points.grad @ (weights / 2), None
        for found in (slopes.gelu(x, x + h, approximate), slopes.gelu(x + h, x, approximate)):
            # numbers of size one, a difference of them over 0.15 where it is long enough; where x + h is rounded, h is too
            torch.testing.assert_close(found, want, rtol=0, atol=1e-14 if h != 1e-9 else 3e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_slopes_of_exp_and_sigmoid_are_right_far_out(dtype: torch.dtype) -> None:
    infinite = float("inf")
    ends = ((-infinite, -infinite, 0.0), (-infinite, 1.0, 0.0), (-600.0, 0.0, 1 / 600), (2.0, 2.0, np.exp(2.0)))
    for a, b, want in ends:
        for pair in ((a, b), (b, a)):
            found = slopes.exp(*(torch.tensor(x, dtype=dtype) for x in pair))
            torch.testing.assert_close(float(found), want, rtol=1e-6, atol=0)
    for a, b, want in ((-600.0, 600.0, 1 / 1200), (40.0, 41.0, np.exp(-40.0) * (1 - np.exp(-1.0))), (0.0, 0.0, 0.25)):
        for pair in ((a, b), (b, a), (-a, -b)):
            found = slopes.sigmoid(*(torch.tensor(x, dtype=dtype) for x in pair))
            torch.testing.assert_close(float(found), want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("outputs", [2, 64])  # more kernels than patches, and fewer
@pytest.mark.parametrize(("stride", "padding", "dilation"), [(1, 1, 1), (2, 0, 1), (1, 2, 2)])
def test_the_cotangent_of_a_kernel_is_that_of_torch(outputs: int, stride: int, padding: int, dilation: int) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(2, 3, 6, 5).double(), torch.randn(outputs, 3, 2, 3).double().requires_grad_()
    how = [stride] * 2, [padding] * 2, [dilation] * 2, False, [0, 0], 1
    y = torch.ops.aten.convolution(x, weight, None, *how)
    several = torch.randn(3, *y.shape).double()
    want = torch.stack([torch.autograd.grad(y, weight, c, retain_graph=True)[0] for c in several])
    found = torch.vmap(lambda c: rules._of_kernel(c, x, weight.detach(), *how))(several)
    torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-12)


def test_the_limit_asks_no_differences_where_a_shorter_displacement_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    measured, theta = query("mlp", together=False)
    bends = 3 * limit_bound(measured.dtype)  # of the first displacement, as kinks of a network do it

    def bent(theta0: Tensor, theta1: Tensor) -> PathGradient:
        exact, size = attrib.Secant().bind(measured)(theta0, theta1), (theta1 - theta0).norm()
        first = torch.finfo(measured.dtype).eps ** (1 / 3) * theta.norm()
        return exact._replace(gradient=exact.gradient * (1 + bends * size / first))

    def differences(*given: object) -> float:
        raise AssertionError("many passes for each tensor")

    monkeypatch.setattr("attrib.path.limit._numerical_gap", differences)
    limit = limit_gap(measured, bent, torch.stack([theta, 1.01 * theta]))
    assert limit.gap <= limit_bound(measured.dtype)
    assert limit.tensor is None


def test_sums_over_tensors_are_the_same_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attrib.layout.CACHED", 3)
    layout = Layout(tuple("abcd"), ((2, 5), (), (0, 3), (4,)))
    vectors, others = torch.randn(2, 3, 15).double(), torch.randn(4, 2, 15).double()
    found = along_tensors(layout, vectors, lambda part: [v[:, part] for v in others])
    want = [[[(vectors[n] * v[n])[:, p].sum(1) for _, p in layout.slices()] for n in range(2)] for v in others]
    np.testing.assert_allclose(found, np.array([[torch.stack(row, 1) for row in rows] for rows in want]), atol=1e-14)


@pytest.mark.parametrize("count", [3, 1 << 20])
def test_fresh_memory_holds_what_is_put_there(count: int) -> None:
    t = torch.arange(2.0 * count).view(2, count)
    assert torch.equal(empty(t.shape, torch.float64).copy_(t), t.double())
    assert empty((2, 0, count), torch.bfloat16).shape == (2, 0, count)
    assert torch.equal(stacked([t]), t[None])
    assert torch.equal(stacked([t, t + 1]), torch.stack([t, t + 1]))
