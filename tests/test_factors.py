"""Factors of a gradient against the gradient written out; the traced pass against the function; the user's own pass."""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import oracles
import pytest
import torch
import torch.nn.functional as F
from attrib.kernels.convolution import geometry
from attrib.kernels.factors import KINDS, Convolution, Dense, Factor, Lookup, Outer, base
from attrib.kernels.factors import kind_of as factor_kind
from cases import LAYERS, MODELS, OPTIMIZERS
from hypothesis import given
from hypothesis import strategies as st
from test_gradients import loss, setting
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten
from training import train

import attrib
from attrib.batch import Batch
from attrib.gradients import ExampleGradients
from attrib.gradients.stored import describe, from_tensors, to_tensors
from attrib.program import Programs, kind_of


class Sizes(NamedTuple):
    count: int
    positions: int
    outputs: int
    inputs: int


class Random:
    """Numbers of one seed."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.generator)


# of each kind a factor, and the same gradients written out, (B, *weight), by loops over examples and positions


def outer(random: Random, n: Sizes) -> tuple[Factor, Tensor]:
    reached = random.uniform(n.count, n.positions, 1) < 0.7  # some positions no gradient reaches
    left, right = (
        random.normal(n.count, n.positions, n.outputs) * reached,
        random.normal(n.count, n.positions, n.inputs),
    )
    rows = [sum(torch.outer(a, b) for a, b in zip(*pair, strict=True)) for pair in zip(left, right, strict=True)]
    return Outer(left, right), torch.stack(rows)


def lookup(random: Random, n: Sizes) -> tuple[Factor, Tensor]:
    index = (5 * random.uniform(n.count, n.positions)).long()
    values, rows = random.normal(n.count, n.positions, n.inputs), torch.zeros(n.count, 5, n.inputs).double()
    for i in range(n.count):
        for t in range(n.positions):
            rows[i, index[i, t]] += values[i, t]
    return Lookup(index, values, 5), rows


def dense(random: Random, n: Sizes) -> tuple[Factor, Tensor]:
    rows = random.normal(n.count, n.outputs, n.inputs)
    return Dense(rows), rows


def convolution(random: Random, n: Sizes) -> tuple[Factor, Tensor]:
    g = geometry((2, 3), (1, 2), "valid" if n.positions % 2 else 1, 1, 2)
    inputs = random.normal(n.count, 2, 2 * n.inputs, 4, 5)
    weight = torch.zeros(2 * n.outputs, n.inputs, 2, 3, dtype=torch.float64, requires_grad=True)
    images = [F.conv2d(x, weight, None, g.stride, g.padding[0][0], 1, 2) for x in inputs]
    delta = random.normal(n.count, *images[0].shape)
    rows = [torch.autograd.grad((y * d).sum(), weight)[0] for y, d in zip(images, delta, strict=True)]
    return Convolution(inputs, delta, g), torch.stack(rows)


EXAMPLES = {"outer": outer, "lookup": lookup, "dense": dense, "convolution": convolution}
some = st.integers(1, 5)
sizes = st.builds(Sizes, some, st.integers(1, 4), some, some)


@pytest.mark.parametrize("cheaper", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@given(queries=st.integers(1, 4), n=sizes, seed=st.integers(0, 99))
def test_factors_are_the_gradient(kind: str, cheaper: bool, queries: int, n: Sizes, seed: int) -> None:
    random = Random(seed)
    factor, want = EXAMPLES[kind](random, n)
    directions, weights = random.normal(queries, *want.shape[1:]), random.normal(n.count)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base, "products_are_cheaper", lambda *sizes: cheaper)
        patch.setattr(base, "SLICE_BYTES", 200)
        contracted = factor.contract(directions)
    flat = want.flatten(1)
    # sums of at most a few hundred float64 terms
    torch.testing.assert_close(contracted, directions.flatten(1) @ flat.T, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(factor.rows(), flat, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(factor.total(), flat.sum(0), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(factor.weighted(weights).rows(), weights[:, None] * flat, rtol=1e-11, atol=1e-11)
    assert (factor.examples, factor.entries) == flat.shape


@pytest.mark.parametrize("kind", KINDS)
@given(n=sizes, seed=st.integers(0, 99))
def test_a_factor_comes_back_from_its_arrays_and_its_constants(kind: str, n: Sizes, seed: int) -> None:
    factor, _ = EXAMPLES[kind](Random(seed), n)
    tensors, constants = factor.tensors(), json.loads(json.dumps(factor.constants()))
    again = KINDS[kind].restored(tensors.__getitem__, constants)
    assert factor_kind(again) == kind
    assert all(len(t) == n.count for t in tensors.values())
    assert list(tensors.values())[-1].dtype == factor.rows().dtype  # by which it is judged what is shorter
    before, after = tree_flatten(factor), tree_flatten(again)
    assert before[1] == after[1]
    assert all(a is b or a == b for a, b in zip(before[0], after[0], strict=True))
    assert {id(t) for t in tensors.values()} == {id(leaf) for leaf in before[0] if isinstance(leaf, Tensor)}


def test_the_names_in_the_store_are_those_of_runs_already_recorded() -> None:
    """Changing one would close every run that was recorded with capture="factors"."""
    stored = {}
    for kind in KINDS:
        factor, _ = EXAMPLES[kind](Random(0), Sizes(2, 1, 3, 4))
        stored[kind] = (*factor.tensors(), *factor.constants().items())
    assert stored == {
        "outer": ("left", "right"),
        "convolution": ("inputs", "delta", ("geometry", [(2, 3), (1, 2), ((0, 0), (0, 0)), (1, 1), 2])),
        "lookup": ("index", "rows", ("height", 5)),
        "dense": ("values",),
    }


@pytest.mark.parametrize("name", LAYERS)
def test_factors_of_every_layer_come_back_from_their_arrays(name: str) -> None:
    model, layout, theta, x, expected = setting(name, 5)
    found = ExampleGradients(loss, model, layout, torch.float64).factors(theta, (x,))
    described = describe(found)
    tensors = to_tensors(found, described)
    again = from_tensors(described, tensors.__getitem__)
    for k, part in layout.slices():
        rows = sum((f.rows() for f in again[k]), torch.zeros(5, part.stop - part.start, dtype=torch.float64))
        np.testing.assert_allclose(rows, expected[:, part], rtol=1e-10, atol=1e-10 * np.abs(expected).max())
    assert sum(t.nbytes for t in tensors.values()) <= sum(
        8 * 5 * f.entries for several in found.values() for f in several
    )


@pytest.mark.parametrize("name", LAYERS)
def test_a_traced_pass_gives_what_the_function_gives(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attrib.program.TRACE_AFTER", 1)
    model, layout, theta, _, _ = setting(name, 4)
    shares = ExampleGradients(loss, model, layout, torch.float64)
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
    whole = ExampleGradients(loss, model, layout, torch.float64)
    whole.contract(theta, (x,), directions)
    bytes_ = whole._forms.of(theta, Batch.of((x,))).bytes
    assert bytes_
    for size in (1, *(int(bytes_ * k) for k in range(1, 9))):  # of 1 to 7 examples; of 4 to 6 the last one overlaps
        shares = ExampleGradients(loss, model, layout, torch.float64, slices=size)
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
        [sum(f.rows().numpy() for f in found[name]) * a.run.factor_scales(step)[:, None] for name in a.run.groups], 1
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
            with pytest.raises(attrib.errors.BatchError, match=r"factors.*'weight'.*capture="):
                recorder.step(torch.arange(4), x)
    recorder.close()
    assert attrib.open_run(tmp_path / "run").steps == 1
