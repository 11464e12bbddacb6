"""A model that torch compiled is the model that it wrapped, wherever it is passed."""

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import MODELS, crossed
from torch import nn
from training import flat

import attrib
from attrib.checks.intake import CAPTURES
from attrib.errors import BatchIdentityError

LOSS = MODELS["mlp"].loss
PASSED = ("compiled", "wrapped")


@pytest.fixture(autouse=True)
def _nothing_compiled() -> Iterator[None]:
    yield
    torch._dynamo.reset()


class Bench:
    """A small model and its compiled self, by name; `fullgraph`: what breaks its graph is an error."""

    def __init__(self, drop: float = 0.0) -> None:
        torch.manual_seed(0)
        self.raw = nn.Sequential(nn.Linear(3, 4), nn.Dropout(drop), nn.Tanh(), nn.Linear(4, 2)).double()
        self.models = {"compiled": torch.compile(self.raw, backend="eager", fullgraph=True), "wrapped": self.raw}
        self.optimizer = torch.optim.AdamW(self.raw.parameters(), lr=0.01)
        self.index, self.x, self.y = torch.arange(5), torch.randn(5, 3).double(), torch.randint(0, 2, (5,))

    @property
    def measurement(self) -> attrib.measure.Measurement:
        return attrib.measure.log_prob(self.x[:2], self.y[:2])

    def train(self, store: Path, passed: str, called: str, **options: Any) -> attrib.Run:
        model = self.models[called]
        with attrib.record(self.optimizer, self.models[passed], LOSS, store, **options) as recorder:
            for _ in range(3):
                recorder.zero_grad()
                LOSS(model, self.x, self.y).mean().backward()
                recorder.step(self.index, self.x, self.y)
        return attrib.open_run(store)


# every capture knows the model that it was passed alone; fast are those of two models
@pytest.mark.parametrize(
    ("passed", "called", "capture"),
    crossed(PASSED, PASSED, CAPTURES, fast=[("compiled", "wrapped", "replay"), ("wrapped", "compiled", "factors")]),
)
def test_a_compiled_model_is_recorded_as_the_one_it_wraps(
    passed: str, called: str, capture: str, tmp_path: Path
) -> None:
    bench, plain = Bench(), Bench()
    run = bench.train(tmp_path / "run", passed, called, capture=capture, check_every=1)
    want = plain.train(tmp_path / "plain", "wrapped", "wrapped", capture=capture)
    assert run.groups == ("0.weight", "0.bias", "3.weight", "3.bias")
    assert run.header["model"] == "Sequential"
    np.testing.assert_array_equal(flat(bench.raw), flat(plain.raw))
    other = attrib.attribute(want, plain.raw, plain.measurement, loss=LOSS, progress=False)
    for model in bench.models.values():
        result = attrib.attribute(run, model, bench.measurement, loss=LOSS, progress=False)
        result.check(1e-10)
        np.testing.assert_allclose(result.by("step", "example"), other.by("step", "example"), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("passed", crossed(PASSED, fast=[("compiled",)]))
def test_every_function_that_takes_a_model_takes_a_compiled_one(passed: str, tmp_path: Path) -> None:
    bench = Bench()
    run = bench.train(tmp_path / "run", "compiled", "compiled")
    model = bench.models[passed]
    forward = type(model).forward
    run.load(model, 1)
    np.testing.assert_array_equal(flat(bench.raw), run.vector(1).numpy())
    assert run.optimizer(model, 2).param_groups[1]["params"][0] is bench.raw[0].bias
    assert attrib.verify(run, progress=False, model=model, loss=LOSS).failure is None
    again = attrib.replay(run, 1, model=model, loss=LOSS, store=tmp_path / "again")
    assert torch.equal(again.vector(2), run.vector(3))
    *_, (state, trained) = attrib.retrain(run, 1, model=model, loss=LOSS)
    assert state == 3
    assert torch.equal(run.layout.flatten(trained.parameters()), run.vector(3))
    values = attrib.evaluate(run, model, bench.measurement)
    run.load(model, 3)
    np.testing.assert_allclose(values[-1], bench.measurement(model).detach(), rtol=1e-12)
    attrib.curvature(run, model, LOSS, (bench.x, bench.y), [3], progress=False)
    assert len(list(attrib.moves(run, model, bench.measurement, range(1, 3), loss=LOSS))) == 2
    assert type(bench.models["compiled"]).__name__ == "OptimizedModule"  # as it was
    assert type(model).forward is forward
    assert torch.equal(bench.models["compiled"](bench.x), bench.raw(bench.x))


@pytest.mark.parametrize("called", PASSED)
def test_dropout_is_drawn_again_whichever_of_the_two_is_called(called: str, tmp_path: Path) -> None:
    bench = Bench(drop=0.5)
    run = bench.train(tmp_path / "run", "compiled", called, check_every=1)
    bench.raw.eval()
    attrib.attribute(run, bench.models["compiled"], bench.measurement, loss=LOSS, progress=False).check(1e-10)


def test_dropout_of_a_compiled_model_that_was_not_passed_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        BatchIdentityError, match=r"no forward pass of the model was heard.*the model that the loop calls"
    ):
        Bench(drop=0.5).train(tmp_path / "run", "wrapped", "compiled")


def in_place(bench: Bench) -> None:
    bench.raw.compile(backend="eager")


def a_layer(bench: Bench) -> None:
    bench.raw[0] = torch.compile(bench.raw[0], backend="eager")


@pytest.mark.parametrize("compiled", [in_place, a_layer])
def test_what_is_compiled_within_a_model_is_traced_as_it_is_written(compiled: Any, tmp_path: Path) -> None:
    bench = Bench()
    compiled(bench)
    run = bench.train(tmp_path / "run", "wrapped", "wrapped", check_every=1)
    attrib.attribute(run, bench.raw, bench.measurement, loss=LOSS, progress=False).check(1e-10)


def compiled_model(bench: Bench, **options: Any) -> tuple[Any, Any]:
    model = torch.compile(bench.raw, **options)
    return LOSS, lambda: LOSS(model, bench.x, bench.y).mean().backward()


def model_compiled_in_place(bench: Bench, **options: Any) -> tuple[Any, Any]:
    bench.raw.compile(**options)
    return LOSS, lambda: LOSS(bench.raw, bench.x, bench.y).mean().backward()


def compiled_loss(bench: Bench, **options: Any) -> tuple[Any, Any]:
    loss = torch.compile(LOSS, **options)
    return loss, lambda: loss(bench.raw, bench.x, bench.y).mean().backward()


def compiled_forward(bench: Bench, **options: Any) -> tuple[Any, Any]:
    mean = torch.compile(lambda: LOSS(bench.raw, bench.x, bench.y).mean(), **options)
    return LOSS, lambda: mean().backward()


def compiled_step(bench: Bench, **options: Any) -> tuple[Any, Any]:
    return LOSS, torch.compile(lambda: LOSS(bench.raw, bench.x, bench.y).mean().backward(), **options)


STEPS = (compiled_model, model_compiled_in_place, compiled_loss, compiled_forward, compiled_step)


def announced(bench: Bench, step: Any, loss: Any, store: Path) -> attrib.Run:
    with attrib.record(bench.optimizer, bench.raw, loss, store, check_every=1) as recorder:
        for _ in range(3):
            recorder.zero_grad()
            recorder.batch(bench.index, bench.x, bench.y)
            step()
            recorder.step()
    bench.raw.eval()
    return attrib.open_run(store)


@pytest.mark.parametrize("compiled", crossed(STEPS, fast=[(compiled_loss,), (compiled_step,)]))
def test_whatever_of_a_step_is_compiled_its_dropout_is_drawn_again(compiled: Any, tmp_path: Path) -> None:
    bench = Bench(drop=0.5)
    loss, step = compiled(bench, backend="eager")
    run = announced(bench, step, loss, tmp_path / "run")
    attrib.attribute(run, bench.raw, bench.measurement, loss=loss, progress=False).check(1e-10)


INDUCTOR = pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="needs a C++ compiler")


@INDUCTOR
@pytest.mark.slow  # it calls a C++ compiler
@pytest.mark.filterwarnings("ignore")  # what torch's compiler says of itself
@pytest.mark.parametrize("compiled", STEPS)
def test_the_default_backend_draws_other_numbers_unless_it_falls_back(compiled: Any, tmp_path: Path) -> None:
    import torch._inductor.config as inductor

    bench = Bench(drop=0.5)
    loss, step = compiled(bench)
    with pytest.raises(BatchIdentityError, match=r"set torch._inductor.config.fallback_random = True before the first"):
        announced(bench, step, loss, tmp_path / "run")
    torch._dynamo.reset()
    with inductor.patch(fallback_random=True):
        bench = Bench(drop=0.5)
        loss, step = compiled(bench)
        run = announced(bench, step, loss, tmp_path / "run")
        attrib.attribute(run, bench.raw, bench.measurement, loss=loss, progress=False).check(1e-10)


@torch.library.custom_op("attrib_tests::sine", mutates_args=())
def sine(x: torch.Tensor) -> torch.Tensor:
    return x.sin()


@torch.library.custom_op("attrib_tests::sine_backward", mutates_args=())
def sine_backward(x: torch.Tensor, pulled: torch.Tensor) -> torch.Tensor:
    return pulled * x.cos()


sine.register_fake(torch.empty_like)
sine_backward.register_fake(lambda x, pulled: torch.empty_like(x))
sine.register_autograd(
    lambda ctx, pulled: sine_backward(ctx.saved_tensors[0], pulled),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[0]),
)


class Sine(nn.Module):
    """A parameter of its own, which no layer that is known reads."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.ones(4, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = sine(x) + sine(self.shift)
        return out


def test_an_operation_with_one_derivative_goes_the_slow_way_and_is_named_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bench = Bench()
    bench.raw[2] = Sine()
    bench.optimizer.add_param_group({"params": [bench.raw[2].shift]})
    _, step = compiled_model(bench, backend="eager")
    run = announced(bench, step, LOSS, tmp_path / "run")
    options = {"loss": LOSS, "progress": False, "groups": {"all": ["*"]}, "path": attrib.GaussLegendre(nodes=8)}
    measurement = attrib.measure.log_prob(bench.x[:1], bench.y[:1])
    attrib.attribute(run, bench.raw, measurement, **options).check(1e-9)
    said = [record.message for record in caplog.records if "a backward pass per example" in record.message]
    assert len(said) == 1
    assert "attrib_tests.sine_backward" in said[0]


@pytest.mark.slow  # two new processes, which import torch
def test_nothing_of_torchs_compiler_is_loaded_for_a_model_that_is_not(tmp_path: Path) -> None:
    """It takes seconds."""
    import subprocess

    program = "import sys, attrib; print('torch._dynamo' in sys.modules)"
    plain = "import sys, torch; print('torch._dynamo' in sys.modules)"
    said = [
        subprocess.run([sys.executable, "-c", p], capture_output=True, text=True, check=True).stdout
        for p in (program, plain)
    ]
    assert said[0] == said[1]
