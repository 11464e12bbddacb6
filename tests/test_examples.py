"""Every public object has an example, and it runs: what stands in the docstrings is typed in, and what it prints compared.

All get the same names, in a folder of their own that holds "run.zarr": a network of two layers, trained on 24 examples for
12 steps of AdamW, and what attrib says of it. See `recorded`.
"""

import inspect
import shutil
from collections import OrderedDict
from collections.abc import Iterator
from copy import deepcopy
from doctest import ELLIPSIS, NORMALIZE_WHITESPACE, SKIP, DocTestFinder, DocTestRunner
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import attrib

MODULES = ("attrib", "attrib.measure", "attrib.intervention", "attrib.report", "attrib.hf", "attrib.lightning")
NEEDED = {"attrib.hf": "transformers", "attrib.lightning": "lightning.pytorch"}  # the packages that examples import


def public() -> Iterator[tuple[str, Any]]:
    """(name, object): functions and classes; of a module that lists none, the classes that it defines."""
    for path in MODULES:
        module = import_module(path)
        names = getattr(module, "__all__", [n for n, v in vars(module).items() if inspect.isclass(v)])
        for name in names:
            value = getattr(module, name)
            whose = hasattr(module, "__all__") or value.__module__ == path
            if (inspect.isclass(value) or inspect.isfunction(value)) and whose and not name.startswith("_"):
                yield f"{path}.{name}", value


OBJECTS = dict(public())
SLOW = {name: package for name in OBJECTS for path, package in NEEDED.items() if name.startswith(path)}


def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y, reduction="none")


def recorded() -> dict[str, Any]:
    """The names that examples may use, of a run that is recorded in the current folder."""
    torch.manual_seed(0)
    x, x_test = torch.randn(24, 8, dtype=torch.float64), torch.randn(2, 8, dtype=torch.float64)
    y, y_test = (t[:, :3].argmax(1) for t in (x, x_test))
    layers = OrderedDict(hidden=nn.Linear(8, 6), tanh=nn.Tanh(), output=nn.Linear(6, 3))
    model = nn.Sequential(layers).double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)
    loader = [(index, x[index], y[index]) for epoch in range(4) for index in torch.randperm(24).split(8)]
    with attrib.record(optimizer, model, loss, "run.zarr") as recorder:
        for batch in loader:
            recorder.zero_grad()
            loss(model, *batch[1:]).mean().backward()
            recorder.step(*batch)
    run, measurement = attrib.open_run("run.zarr"), attrib.measure.log_prob(x_test, y_test)
    subsets = attrib.random_subsets(run, 0.2, 4)
    drop = attrib.intervention.Drop([3, 14])
    packages = dict(attrib=attrib, torch=torch, nn=nn, np=np)
    data = dict(x=x, y=y, x_test=x_test, y_test=y_test, loader=loader)
    return dict(
        **packages,
        **data,
        model=model,
        optimizer=optimizer,
        loss=loss,
        measurement=measurement,
        subsets=subsets,
        result=attrib.attribute(run, model, measurement, loss=loss),
        changed=attrib.replay(run, 0, drop, model=model, loss=loss, store="changed.zarr"),
        outcomes=attrib.retrain_subsets(run, subsets, measurement, model=model, loss=loss),
    )


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("recorded")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return folder, recorded()


@pytest.fixture
def names(kept: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A copy of everything, in a folder of its own: what one example changes no other sees."""
    folder, values = kept
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    runs = {name: attrib.open_run(f"{name}.zarr") for name in ("run", "changed")}
    model, optimizer = deepcopy((values["model"], values["optimizer"]))
    torch.manual_seed(0)
    return {**values, **runs, "model": model, "optimizer": optimizer}


def modules() -> Iterator[str]:
    """Those of attrib that have an example."""
    root = Path(__file__).parent.parent
    for folder, package in (("attrib", ()), ("kernels", ("attrib",))):
        for file in sorted((root / folder).rglob("*.py")):
            if ">>> " in file.read_text():
                yield ".".join((*package, *file.relative_to(root).with_suffix("").parts)).removesuffix(".__init__")


OTHERS = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # what they warn of is theirs


@pytest.mark.parametrize("name", [pytest.param(n, marks=OTHERS if n in SLOW else []) for n in sorted(OBJECTS)])
def test_every_public_object_has_an_example_that_runs(name: str, names: dict[str, Any]) -> None:
    if name in SLOW:
        pytest.importorskip(SLOW[name])
    assert name in executed(name, OBJECTS[name], names), f"{name} has no example"


def test_all_other_examples_run(names: dict[str, Any]) -> None:
    """Those of the modules inside, each with the names of its module."""
    public, ran = {id(value) for value in OBJECTS.values()}, []
    for path in modules():
        module = import_module(path)
        for name, value in vars(module).items():
            if getattr(value, "__module__", None) == path and id(value) not in public:
                ran += executed(f"{path}.{name}", value, {**vars(module), **names})
    assert {"attrib.kernels.changes.find_changes", "attrib.report.figures.timeline"} <= set(ran)
    import_module("matplotlib.pyplot").close("all")


def executed(name: str, value: Any, names: dict[str, Any]) -> list[str]:
    """Run the examples of an object and of its methods; the names of those that have some."""
    tests = [test for test in DocTestFinder().find(value, name, globs=names) if test.examples]
    runner, report = DocTestRunner(optionflags=ELLIPSIS | NORMALIZE_WHITESPACE), []
    for test in tests:
        assert not [example for example in test.examples if example.options.get(SKIP)], f"{test.name} skips an example"
        runner.run(test, out=report.append)
    assert runner.failures == 0, "".join(report)
    return [test.name for test in tests]
