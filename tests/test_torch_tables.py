"""All of torch that is listed: the secant against autograd as the ends meet, and every capture against single losses."""

import numpy as np
import oracles
import pytest
import torch
import torch_tables
from cases import covering, crossed
from test_along import Case, layout_of, trained
from torch import Tensor, nn
from torch_tables import ALL, CANCELS, MODULES, REFUSED, ModuleCase

import attrib
from attrib import errors
from attrib.checks.intake import CAPTURES
from attrib.measure import Measurement
from attrib.path import Measured


class Held(nn.Module):
    """f(x) of a parameter x."""

    def __init__(self, name: str) -> None:
        super().__init__()
        case = ALL[name]
        x = torch.randn(case.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
        self.x, self.function = nn.Parameter(x.abs() + 0.3 if case.positive else x), case.function

    def forward(self) -> Tensor:
        return self.function(self.x)


@pytest.mark.parametrize(("name", "queries"), crossed(ALL, [1, 3]))
def test_the_secant_tends_to_the_gradient_on_every_operation(name: str, queries: int) -> None:
    """One query is run by itself, three are mapped. At a displacement of 1e-6 the gap to the gradient at its middle is of
    second order, 1e-12 times a third derivative, beside rounding of differences, 1e-16 / 1e-6; where torch's own derivative
    is a convention at a kink, only the sum is exact."""
    model = Held(name)
    layout, theta = layout_of(model)
    weights = torch.randn(queries, *model().shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    measurement = Measurement(lambda m, w: (m() * w).reshape(len(w), -1).sum(1), (weights,), name)
    query = Measured(model, measurement, layout, torch.float64, theta)
    along = torch.randn(theta.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    end = theta + 1e-6 * along
    if name in REFUSED:
        with pytest.raises(errors.UntraceableModelError, match=REFUSED[name]):
            attrib.Secant().bind(query)(theta, end)
        return
    found = attrib.Secant().bind(query)(theta, end)
    change, loss = found.end - found.start, CANCELS.get(name, 1.0)
    rounding = 1e-14 * loss * float(found.start.abs().max() + 1)
    np.testing.assert_allclose(found.gradient @ (end - theta), change, rtol=1e-12, atol=rounding)
    if not ALL[name].kinks:
        middle = ((theta + end) / 2).requires_grad_()
        values = query.of_parameters(layout.unflatten(middle), *query.batch)
        if values.requires_grad:
            rows = [torch.autograd.grad(v, middle, retain_graph=True)[0] for v in values]
        else:
            rows = [torch.zeros_like(middle)] * queries
        want = torch.stack(rows)
        np.testing.assert_allclose(found.gradient, want, rtol=1e-7, atol=1e-8 * loss * float(want.abs().max() + 1))


class Around(nn.Module):
    """A layer in front of the module, so that something is trained whatever it is."""

    def __init__(self, case: ModuleCase) -> None:
        super().__init__()
        self.front, self.module = nn.Linear(4, int(np.prod(case.shape))), case.build()
        self.shape, self.pick = case.shape, case.pick

    def forward(self, x: Tensor) -> Tensor:
        return self.pick(self.module(self.front(x).unflatten(1, self.shape))).reshape(len(x), -1)


def waves(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    out = model(x)
    return ((out + 0.1 * y[:, None]) * torch.linspace(-1, 1, out.shape[1], dtype=x.dtype)).sin().sum(1)


# modules without parameters are operations, and those are all above: what is new of them is the layer in front, each time,
# by a capture in turn. Fast is every fourth: the layers that are read off are in `cases.LAYERS`
TRAINED = [name for name, case in MODULES.items() if any(True for _ in case.build().parameters())]
SOME = covering(TRAINED, CAPTURES)[::4]
OTHERS = covering([name for name in MODULES if name not in TRAINED], CAPTURES)


@pytest.mark.parametrize(
    ("name", "capture"),
    [*crossed(TRAINED, CAPTURES, fast=SOME), *(pytest.param(*row, marks=pytest.mark.slow) for row in OTHERS)],
)
def test_every_capture_of_every_module_is_one_gradient_at_a_time(name: str, capture: str) -> None:
    """Contributions to two queries, against lr / B <Gbar, g_i> with Gbar by quadrature of its own; the secant's ledger."""
    case = Case(lambda: Around(MODULES[name]), waves)
    run, model, rows = trained(case, capture, 3)
    x = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(6, 4)
    measured = (
        Measurement(lambda m, x: m(x).sin().sum(1), (x,), "waves")
        if "Batch" not in name
        else lambda m: m(x).sin().sum(1)
    )
    loss = waves if capture == "replay" else None
    if name not in torch_tables.UNTRACEABLE and capture == "replay":  # the secant knows nothing of captures
        attrib.attribute(run, model, measured, loss=waves, progress=False).check(1e-9)
    result = attrib.attribute(run, model, measured, loss=loss, path=attrib.GaussLegendre(4), progress=False)
    nodes = [((p + 1) / 2, w / 2) for p, w in zip(*np.polynomial.legendre.leggauss(4), strict=True)]
    step = run.steps - 1
    bar = oracles.path_integral(model, run.vector(step).numpy(), run.vector(step + 1).numpy(), measured, nodes)
    want = -0.05 / len(rows[step]) * bar @ rows[step].T
    at = np.searchsorted(result.dataset["example"].values, np.arange(9) + 9 * (step % 2))
    found = result.by("step", "example").values[:, step, at]
    np.testing.assert_allclose(found, want, atol=1e-9 * np.abs(want).max() + 1e-12)
