"""The memory budget, and what `attrib.plan` says beforehand."""

import json
import subprocess
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from cases import OPTIMIZERS, crossed
from hypothesis import given
from hypothesis import strategies as st
from training import train

import attrib
from attrib import errors
from attrib.budget import MEMORY, Sizes, divide
from attrib.cli import main
from attrib.recomputed import Recomputed
from attrib.result import join


@given(
    st.builds(
        Sizes,
        parameters=st.integers(1, 10**8),
        tensors=st.integers(1, 200),
        itemsize=st.sampled_from([4, 8]),
        batch=st.integers(1, 10**5),
        block=st.integers(1, 64),
        accumulators=st.integers(1, 3),
        kept=st.integers(0, 10**9),
    ),
    st.integers(1, 5000),
    st.integers(1, 2**38),
)
def test_what_is_held_at_once_fits_the_memory(sizes: Sizes, queries: int, memory: int) -> None:
    try:
        budget = divide(sizes, queries, memory)
    except ValueError as error:
        least = int(str(error).split("at least ")[1].split(",")[0])
        assert least > memory
        assert divide(sizes, queries, least).peak <= least  # what it asks for is enough
        return
    assert budget.peak <= memory
    assert budget.peak > sizes.kept + sizes.block_bytes + budget.at_once * sizes.per_query
    assert 1 <= budget.at_once <= queries
    sweeps = -(-queries // budget.at_once)
    if sweeps > 1:  # not one sweep more than are needed
        fewer = -(-queries // (sweeps - 1))
        assert budget.peak + (fewer - budget.at_once) * sizes.per_query > memory


@pytest.mark.parametrize(("parameters", "kept"), [(10**9, 0), (1000, 10**11)], ids=["large model", "large cube kept"])
def test_without_a_bound_no_query_is_refused(parameters: int, kept: int) -> None:
    sizes = Sizes(parameters=parameters, tensors=9, itemsize=4, batch=64, block=1, accumulators=2, kept=kept)
    assert divide(sizes, 3).at_once >= 1
    with pytest.raises(ValueError, match="does not hold one query"):
        divide(sizes, 3, MEMORY)


def test_the_least_memory_that_is_asked_for_is_enough(tmp_path: Path) -> None:
    trained = train(tmp_path / "run", OPTIMIZERS["adamw"], steps=7)
    whole = trained.attribute(trained.measurement(5))
    with pytest.raises(ValueError, match="does not hold one query") as refused:
        trained.attribute(trained.measurement(5), memory=1)
    least = int(str(refused.value).split("at least ")[1].split(",")[0])
    found = trained.attribute(trained.measurement(5), memory=least)
    found.check(1e-10)
    np.testing.assert_allclose(found.by("example"), whole.by("example"), rtol=1e-8, atol=1e-11)


def test_of_the_gaps_of_several_sweeps_the_largest_counts() -> None:
    def part(values: list[float], gaps: list[float]) -> xr.Dataset:
        return xr.Dataset(
            {"final": ("query", values), "step_identity": ("step", gaps)},
            {"query": range(len(values)), "step": [3, 4]},
            {"path": "Secant()"},
        )

    joined = join([part([1.0, 2.0], [0.1, 0.4]), part([3.0], [0.2, 0.3])])
    assert list(joined["final"].values) == [1.0, 2.0, 3.0]
    assert list(joined["query"].values) == [0, 1, 2]
    assert list(joined["step_identity"].values) == [0.2, 0.4]
    assert list(joined["step"].values) == [3, 4]
    assert joined.attrs == {"path": "Secant()"}


def forced(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    """So many queries to a sweep."""
    module = import_module("attrib.attribute")
    real = module.divide
    monkeypatch.setattr(
        module,
        "divide",
        lambda sizes, queries, memory: real(sizes, queries, memory).__class__(at_once, 1 << 20, 0),
    )


@pytest.mark.parametrize(("at_once", "batched"), crossed([2, 1, 4], [True, False]))
def test_queries_of_several_sweeps_come_in_their_order(
    at_once: int, batched: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = train(tmp_path / "run", OPTIMIZERS["adamw"], steps=5)
    x = trained.data[0][:5]
    measurement: Any = trained.measurement(5) if batched else lambda model: model(x)[:, 2]
    whole = trained.attribute(measurement)
    forced(monkeypatch, at_once)
    parts = trained.attribute(measurement)
    for name in whole.dataset.data_vars:
        assert parts.dataset[name].dims == whole.dataset[name].dims
        if not str(name).endswith("identity"):  # those are the largest gap over the queries, at rounding
            np.testing.assert_allclose(
                parts.dataset[name], whole.dataset[name], rtol=1e-8, atol=1e-11, err_msg=str(name)
            )
    parts.check(1e-10)
    parts.save(tmp_path / "result.zarr")
    assert attrib.open_result(tmp_path / "result.zarr").dataset.identical(parts.dataset)
    with pytest.raises(ValueError, match="a cube is written in one sweep: got 5 queries"):
        trained.attribute(measurement, cube=tmp_path / "cube.zarr")
    assert not (tmp_path / "cube.zarr").exists()


@pytest.mark.parametrize(
    ("memory", "message"), [(1000, "does not hold one query"), (0, "number of bytes"), ("2G", "number of")]
)
def test_memory_that_does_not_do_is_refused(memory: Any, message: str, tmp_path: Path) -> None:
    trained = train(tmp_path / "run", OPTIMIZERS["adamw"])
    with pytest.raises(ValueError, match=message):
        trained.attribute(memory=memory)
    with pytest.raises(ValueError, match=message):
        attrib.plan(trained.run, 1, memory)


def test_plan_says_what_a_run_will_take(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained = train(tmp_path / "run", OPTIMIZERS["adamw"], steps=9)
    disk = sum(f.stat().st_size for f in (tmp_path / "run").rglob("*") if f.is_file())
    found = attrib.plan(trained.run, 3)
    assert (found.steps, found.queries, found.sweeps, found.disk) == (9, 3, 1, disk)
    seconds = trained.run.log("seconds")
    assert np.isnan(seconds[0])
    assert (seconds[1:] > 0).all()
    assert found.training == pytest.approx(9 * np.median(seconds[1:]))
    assert found.seconds > found.training
    assert attrib.plan(trained.run, 50).peak > found.peak
    assert main(["plan", str(tmp_path / "run"), "--queries", "3"]) == 0
    out = capsys.readouterr().out
    assert "peak memory" in out
    assert "expected time" in out
    assert "shares by" not in out  # no batch was met whose losses depend on each other
    assert main(["plan", str(tmp_path / "run"), "--queries", "3", "--json", "--memory", "1G"]) == 0
    assert json.loads(capsys.readouterr().out)["disk"] == disk


def test_plan_of_a_single_step_does_not_know_the_time(tmp_path: Path) -> None:
    found = attrib.plan(train(tmp_path / "run", OPTIMIZERS["sgd"], steps=1).run)
    assert np.isnan(found.seconds)
    assert "expected time" not in str(found)


@pytest.mark.parametrize(
    "arguments", [["--queries", "0"], ["--memory", "10"], ["--memory", "many"], ["--queries", "few"]], ids=str
)
def test_bad_plans_are_one_line(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tmp_path / "run", OPTIMIZERS["sgd"])
    try:
        status = main(["plan", str(tmp_path / "run"), *arguments])
    except SystemExit as stopped:
        status = int(str(stopped.code))
    assert status != 0
    assert "Traceback" not in capsys.readouterr().err


COUNTERFACTUAL = ("influence", "difference")


def asked_of(trained: Any, question: str, other: Any, **options: Any) -> Any:
    """An influence, or the difference of a run and another."""
    options = {"loss": trained.case.loss, "progress": False, **options}
    if question == "influence":
        return attrib.influence(trained.run, trained.model, trained.measurement(5), **options)
    return attrib.difference(trained.run, other, trained.model, trained.measurement(5), **options)


@pytest.mark.parametrize("question", COUNTERFACTUAL)
def test_a_counterfactual_question_keeps_to_the_memory_that_was_planned(question: str, tmp_path: Path) -> None:
    """What is said to be the least is enough, in several sweeps, which give what one does; the passes are cut to it."""
    trained = train(tmp_path / "run", OPTIMIZERS["adamw"], steps=5, dtype=torch.float64)
    drop = attrib.intervention.Drop(trained.run.examples[:2].tolist())
    options = {"model": trained.model, "loss": trained.case.loss, "store": tmp_path / "changed", "progress": False}
    other = attrib.replay(trained.run, 0, drop, **options)
    whole = asked_of(trained, question, other)
    for refused in (
        lambda: attrib.plan(trained.run, 5, 1, question=question),
        lambda: asked_of(trained, question, other, memory=1),
    ):
        with pytest.raises(ValueError, match="does not hold one query") as error:
            refused()
    least = int(str(error.value).split("at least ")[1].split(",")[0])
    assert attrib.plan(trained.run, 5, least, question=question).peak <= least
    seen = []
    within, divided = Recomputed.within, divide

    def noted(self: Any, slices: int) -> Any:
        seen.append(slices)
        return within(self, slices)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Recomputed, "within", noted)
        patch.setattr("attrib.asked.divide", lambda *args: replace(divided(*args), at_once=2))
        found = asked_of(trained, question, other, memory=least)
    assert 0 < max(seen) < least // 4
    size = float(abs(whole.by("example")).max())
    np.testing.assert_allclose(found.by("example"), whole.by("example"), rtol=0, atol=1e-9 * size)
    found.check(1e-9)


def test_every_question_has_a_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained = train(tmp_path / "run", OPTIMIZERS["adamw"], steps=9)
    plans = {name: attrib.plan(trained.run, 3, question=name) for name in ("accounting", *COUNTERFACTUAL)}
    assert plans["accounting"].peak < plans["influence"].peak < plans["difference"].peak
    assert all(found.seconds > found.training > 0 for found in plans.values())
    assert attrib.plan(trained.run, 30, question="influence").seconds > plans["influence"].seconds
    assert main(["plan", str(tmp_path / "run"), "--question", "difference", "--queries", "3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["peak"] == plans["difference"].peak
    assert "question         difference" in str(plans["difference"])
    with pytest.raises(ValueError, match="unknown question: got 'cause', expected one of 'accounting', 'influence'"):
        attrib.plan(trained.run, question="cause")
    other = train(tmp_path / "other", OPTIMIZERS["rmsprop"])
    with pytest.raises(errors.ReplayError, match="was not derived: got RMSprop"):
        attrib.plan(other.run, question="influence")


PEAK = """
import gc, sys
sys.path.insert(0, {tests!r})
import torch, attrib
from test_plan import wide, wide_loss

def status(name):
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith(name))

def ask(run, model, x, y, **options):
    run.load(model, run.steps)
    query, options = attrib.measure.log_prob(x[:4], y[:4]), dict(loss=wide_loss, progress=False, **options)
    if {question!r} == "influence":
        attrib.influence(run, model, query, **options)
    else:
        attrib.difference(run, run, model, query, **options)

torch.set_num_threads(1)
x, y = torch.load({data!r})
ask(attrib.open_run({small!r}), wide(8), x, y)  # torch and numba bring along what they need
run, model = attrib.open_run({run!r}), wide()
gc.collect()
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
ask(run, model, x, y, memory={memory})
print(status("VmHWM") - before)
"""


def wide(width: int = 1024) -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(64, width), torch.nn.GELU(), torch.nn.Linear(width, 512))


def wide_loss(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(model(x), y, reduction="none")


@pytest.mark.slow  # processes of their own
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are read from /proc")
@pytest.mark.parametrize("question", COUNTERFACTUAL)
def test_the_measured_peak_is_below_the_planned_one(question: str, tmp_path: Path) -> None:
    """590 000 parameters, 4 queries."""
    torch.manual_seed(0)
    data = torch.randn(96, 64), torch.randint(0, 512, (96,))
    torch.save(data, tmp_path / "data")
    for name, width in (("run", 1024), ("small", 8)):
        model = wide(width)
        with attrib.record(torch.optim.AdamW(model.parameters()), model, wide_loss, tmp_path / name) as recorder:
            for _ in range(6):
                recorder.zero_grad()
                wide_loss(model, *data).mean().backward()
                recorder.step(torch.arange(96), *data)
    places = {name: str(tmp_path / name) for name in ("run", "small", "data")}
    places["tests"], memory = str(Path(__file__).parent), 1 << 30
    code = PEAK.format(**places, question=question, memory=memory)
    peak = int(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)
    planned = attrib.plan(attrib.open_run(tmp_path / "run"), 4, memory, question=question)
    assert peak <= planned.peak <= memory
