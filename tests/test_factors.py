"""Factors of a gradient against the gradient written out; the traced pass against the function; the user's own pass."""

from pathlib import Path

import numpy as np
import oracles
import pytest
import torch
import torch.nn.functional as F
from attrib.kernels import factors
from attrib.kernels.convolution import geometry
from attrib.kernels.factors import Convolution, Dense, Factor, Lookup, Outer
from cases import LAYERS, MODELS, OPTIMIZERS
from hypothesis import given
from hypothesis import strategies as st
from test_gradients import loss, setting
from torch import Tensor, nn
from training import train

import attrib
from attrib.gradients import Shares
from attrib.gradients.stored import describe, from_tensors, to_tensors
from attrib.program import Programs, kind_of


def made(kind: str, random: torch.Generator, count: int, positions: int, outputs: int, inputs: int) -> Factor:
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    if kind == "outer":
        left = normal(count, positions, outputs)
        reached = torch.rand(count, positions, 1, generator=random) < 0.7  # some positions no gradient reaches
        return Outer(left * reached, normal(count, positions, inputs))
    if kind == "lookup":
        return Lookup(torch.randint(0, 5, (count, positions), generator=random), normal(count, positions, inputs), 5)
    if kind == "dense":
        return Dense(normal(count, outputs, inputs))
    g = geometry((2, 3), (1, 2), "valid" if positions % 2 else 1, 1, 2)
    x = normal(count, 2, 2 * inputs, 4, 5)
    y = F.conv2d(x.flatten(0, 1), normal(2 * outputs, inputs, 2, 3), None, (1, 2), g.padding[0][0], 1, 2)
    return Convolution(x, normal(count, 2, *y.shape[1:]), g)


def written_out(factor: Factor) -> Tensor:
    """(B, *weight), by loops over examples and positions."""
    if isinstance(factor, Outer):
        return torch.stack([sum(torch.outer(a, b) for a, b in zip(*pair)) for pair in zip(*factor)])  # noqa: B905
    if isinstance(factor, Lookup):
        out = torch.zeros(len(factor.rows), factor.height, factor.rows.shape[2], dtype=torch.float64)
        for i, (index, rows) in enumerate(zip(factor.index, factor.rows, strict=True)):
            for at, row in zip(index.tolist(), rows, strict=True):
                out[i, at] += row
        return out
    if isinstance(factor, Dense):
        return factor.values
    g, channels = factor.geometry, factor.inputs.shape[2] // factor.geometry.groups
    weight = torch.zeros(factor.delta.shape[2], channels, *g.kernel, dtype=torch.float64, requires_grad=True)
    rows = []
    for x, d in zip(factor.inputs, factor.delta, strict=True):
        y = F.conv2d(x, weight, None, g.stride, tuple(p for p, _ in g.padding), g.dilation, g.groups)
        rows.append(torch.autograd.grad((y * d).sum(), weight)[0])
    return torch.stack(rows)


@pytest.mark.parametrize("cheaper", [True, False])
@pytest.mark.parametrize("kind", ["outer", "lookup", "dense", "convolution"])
@given(
    queries=st.integers(1, 4),
    count=st.integers(1, 5),
    positions=st.integers(1, 4),
    outputs=st.integers(1, 5),
    inputs=st.integers(1, 5),
    seed=st.integers(0, 99),
)
def test_factors_are_the_gradient(
    kind: str, cheaper: bool, queries: int, count: int, positions: int, outputs: int, inputs: int, seed: int
) -> None:
    random = torch.Generator().manual_seed(seed)
    factor = made(kind, random, count, positions, outputs, inputs)
    want = written_out(factor)
    directions = torch.randn(queries, *want.shape[1:], generator=random, dtype=torch.float64)
    before = factors.products_are_cheaper, factors.SLICE_BYTES
    factors.products_are_cheaper, factors.SLICE_BYTES = (lambda *sizes: cheaper), 200
    try:
        contracted = factors.contract(factor, directions)
    finally:
        factors.products_are_cheaper, factors.SLICE_BYTES = before
    # sums of at most a few hundred float64 terms
    torch.testing.assert_close(contracted, directions.flatten(1) @ want.flatten(1).T, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(factors.rows(factor), want.flatten(1), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(factors.total(factor), want.sum(0).flatten(), rtol=1e-11, atol=1e-11)
    assert factors.entries(factor) == want[0].numel()


@pytest.mark.parametrize("name", LAYERS)
def test_factors_of_every_layer_come_back_from_their_arrays(name: str) -> None:
    model, layout, theta, x, expected = setting(name, 5)
    found = Shares(loss, model, layout, torch.float64).factors(theta, (x,))
    described = describe(found)
    tensors = to_tensors(found, described)
    again = from_tensors(described, tensors.__getitem__)
    for k, part in layout.slices():
        rows = sum((factors.rows(f) for f in again[k]), torch.zeros(5, part.stop - part.start, dtype=torch.float64))
        np.testing.assert_allclose(rows, expected[:, part], rtol=1e-10, atol=1e-10 * np.abs(expected).max())
    assert sum(t.nbytes for t in tensors.values()) <= sum(
        8 * 5 * factors.entries(f) for several in found.values() for f in several
    )


@pytest.mark.parametrize("name", LAYERS)
def test_a_traced_pass_gives_what_the_function_gives(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attrib.program.TRACE_AFTER", 1)
    model, layout, theta, _, _ = setting(name, 4)
    shares = Shares(loss, model, layout, torch.float64)
    for step in range(4):
        x = torch.randn(4, *LAYERS[name][1], dtype=torch.float64)
        moved = theta + 0.1 * step
        expected = oracles.single_gradients(model, moved.numpy(), loss, (x,))
        directions = torch.randn(2, layout.size, dtype=torch.float64)
        contracted = shares.contract(moved, (x,), directions)[1].sum(-1)
        np.testing.assert_allclose(contracted, directions.numpy() @ expected.T, rtol=1e-9, atol=1e-9)
    (program,) = shares._programs._known.values()
    assert program._checked  # the last calls were those of the graph


def test_a_function_that_reads_values_is_run_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attrib.program.TRACE_AFTER", 1)
    programs = Programs()

    def function(inputs: list[Tensor]) -> Tensor:
        (x,) = inputs
        return x.sum() if x[0] > 0 else -x.sum()

    def constant(inputs: list[Tensor]) -> Tensor:
        return inputs[0] * float(np.sum(inputs[0].numpy()))  # numpy is not seen; the comparison is

    for value in (1.0, 2.0, -3.0, 4.0):
        x = torch.full((3,), value)
        assert float(programs((0, kind_of([x])), function, [x])) == 3 * abs(value)
        assert float(programs((1, kind_of([x])), constant, [x])[0]) == 3 * value**2


def test_slices_of_a_batch_change_nothing() -> None:
    model, layout, theta, x, expected = setting("attention, batch second", 7)
    directions = torch.randn(2, layout.size, dtype=torch.float64)
    whole = Shares(loss, model, layout, torch.float64)
    whole.contract(theta, (x,), directions)
    bytes_ = whole._forms.of(theta, (x,)).bytes
    assert bytes_
    for size in (1, *(int(bytes_ * k) for k in range(1, 9))):  # of 1 to 7 examples; of 4 to 6 the last one overlaps
        shares = Shares(loss, model, layout, torch.float64, slices=size)
        losses, contracted = shares.contract(theta, (x,), directions)
        np.testing.assert_allclose(contracted.sum(-1), directions.numpy() @ expected.T, atol=1e-9)
        torch.testing.assert_close(losses, loss(model, x).detach())
        np.testing.assert_allclose(shares.total(theta, (x,))[1], expected.sum(0), atol=1e-10)


@pytest.mark.parametrize("capture", ["gradients", "factors"])
@pytest.mark.parametrize("model", MODELS)
def test_shares_come_from_the_users_own_pass(model: str, capture: str, tmp_path: Path) -> None:
    """Between the checked steps the model runs once a step: for the user."""
    torch.manual_seed(0)
    case = MODELS[model]
    net = case.build().double()
    x, y = case.data(8)
    x = x.double() if x.is_floating_point() else x
    calls = []
    net.register_forward_hook(lambda *_: calls.append(1))
    with attrib.record(
        OPTIMIZERS["adamw"](list(net.parameters())), net, case.loss, tmp_path / "run", capture, check_every=100
    ) as recorder:
        for step in range(6):
            before = len(calls)
            recorder.zero_grad()
            case.loss(net, x, y).mean().backward()
            nn.utils.clip_grad_norm_(net.parameters(), 0.01)
            recorder.step(torch.arange(8), x, y)
            assert step < 2 or len(calls) == before + 1
    run = attrib.open_run(tmp_path / "run")
    assert attrib.verify(run, progress=False).failure is None
    measurement = attrib.measure.log_prob(x[:2], y[:2])
    attrib.attribute(run, net, measurement, loss=case.loss, progress=False).check(1e-10)


def test_a_second_forward_pass_is_noticed(tmp_path: Path) -> None:
    """Gradients accumulated over micro-batches: which site belongs to which row is not known, so all is computed again."""
    torch.manual_seed(0)
    case = MODELS["mlp"]
    net = case.build().double()
    x, y = case.data(8)
    with attrib.record(
        torch.optim.SGD(net.parameters(), lr=0.1), net, case.loss, tmp_path / "run", "factors"
    ) as recorder:
        for _ in range(4):
            recorder.zero_grad()
            for half in (slice(0, 4), slice(4, 8)):
                (case.loss(net, x[half], y[half]).sum() / 8).backward()
            recorder.step(torch.arange(8), x, y)
    run = attrib.open_run(tmp_path / "run")
    assert attrib.verify(run, progress=False).failure is None
    attrib.attribute(run, net, attrib.measure.log_prob(x[:2], y[:2]), progress=False).check(1e-10)


def test_factors_are_smaller_than_gradients_and_read_by_group(tmp_path: Path) -> None:
    a = train(tmp_path / "a", OPTIMIZERS["sgd"], "mlp", "factors", batch=8)
    step = 3
    names = a.run.groups[:1]
    assert list(a.run.factors(step, names)) == list(names)
    found = a.run.factors(step)
    rows = np.concatenate(
        [sum(factors.rows(f).numpy() for f in found[name]) * a.run.scale(step) for name in a.run.groups], 1
    )
    b = train(tmp_path / "b", OPTIMIZERS["sgd"], "mlp", "gradients", batch=8)
    np.testing.assert_allclose(rows, b.run.shares(step), atol=1e-14)


def test_sequences_of_another_length_are_refused_by_name(tmp_path: Path) -> None:
    net = nn.Linear(6, 4).double()
    recorder = attrib.record(
        torch.optim.SGD(net.parameters(), lr=0.1),
        net,
        lambda m, x: m(x).flatten(1).square().sum(1),
        tmp_path / "run",
        "factors",
    )
    for length in (2, 3):
        x = torch.randn(4, length, 6, dtype=torch.float64)
        recorder.zero_grad()
        net(x).flatten(1).square().sum(1).mean().backward()
        if length == 2:
            recorder.step(torch.arange(4), x)
        else:
            with pytest.raises(attrib.errors.BatchError, match=r"factors.*weight.*capture="):
                recorder.step(torch.arange(4), x)
    recorder.close()
    assert attrib.open_run(tmp_path / "run").steps == 1
