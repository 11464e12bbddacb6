"""The command line on one's own runs: attribute, then report, timeline, top, compare, export."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from cases import OPTIMIZERS
from training import Trained, train

import attrib
from attrib import errors
from attrib.cli import main
from attrib.marginals import AXES
from attrib.setup import load_setup


@pytest.fixture(autouse=True)
def _setups_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parent)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return train(tmp_path_factory.mktemp("cli") / "run", OPTIMIZERS["adamw"], steps=9)


@pytest.fixture(scope="module")
def store(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The result of queries 1, 4, 5 of the setup."""
    path = tmp_path_factory.mktemp("cli") / "result"
    sys.path.insert(0, str(Path(__file__).parent))
    command = ["attribute", str(trained.run.reader.target), "--setup", "setups:full", "--measurement", "log_prob"]
    assert main([*command, "--queries", "1,4:6", "-o", str(path)]) == 0
    return str(path)


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    """What a command prints with --json."""
    capsys.readouterr()
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line of a command that fails."""
    capsys.readouterr()
    assert main(list(arguments)) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("attrib: ")
    return captured.err


def test_attribute_explains_the_queries_that_were_chosen(store: str, trained: Trained) -> None:
    result = attrib.open_result(store)
    result.check(1e-10)
    assert list(result.dataset["query"].values) == [1, 4, 5]
    measurement = load_setup("setups:full").choose("log_prob")
    assert result.names == [measurement.names[q] for q in (1, 4, 5)]
    np.testing.assert_allclose(result.final, measurement(trained.model).detach()[[1, 4, 5]], rtol=1e-12)
    assert result.dataset["group"].values[0] == "first"


@pytest.mark.parametrize("setup", ["setups:plain", "setups:callable_only", f"{Path(__file__).parent}/setups.py:plain"])
def test_setups_of_every_kind_are_taken(
    setup: str, trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = str(trained.run.reader.target), str(tmp_path / "result")
    options = ["--queries", "2", "--window", "3:", "--keep", "step,group", "--keep", "example", "--memory", "1G"]
    found = said(capsys, "attribute", run, "--setup", setup, "-o", out, *options)
    assert found["result"] == out
    assert set(found["identities"]) == {"batch", "step", "measurement", "split", "limit"}
    result = attrib.open_result(out)
    assert found["queries"][0]["final"] == float(result.final[0])
    assert result.dataset.attrs["window"] == [3, 9]
    assert result.kept == [("example",), ("step", "group")]
    assert list(result.dataset["query"].values) == [2]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (["--setup", "nowhere:setup"], "No module named 'nowhere'"),
        (["--setup", "nowhere/script.py:setup"], "no script"),
        (["--setup", "setups"], "my_script:setup"),
        (["--setup", "setups:missing"], "missing"),
        (["--setup", "setups:failing"], "RuntimeError: no data here"),
        (["--setup", "setups:wrong"], "got str"),
        (["--setup", "setups:full"], "log_prob, margin"),
        (["--setup", "setups:full", "--measurement", "odds"], "log_prob, margin"),
        (["--setup", "setups:plain", "--measurement", "odds"], "'log_prob'"),
        (["--setup", "setups:plain", "--queries", "3,99"], "got 99, expected 0 to 11"),
        (["--setup", "setups:callable_only", "--queries", "3,99"], "got 99, expected 0 to 11"),
        (["--setup", "setups:plain", "--window", "5:99"], "0 <= a < b <= 9"),
        (["--setup", "setups:plain", "--keep", "layer"], "unknown axes"),
        (["--setup", "setups:plain", "--memory", "1K"], "does not hold one query"),
    ],
)
def test_what_cannot_be_attributed_is_said_in_one_line(
    options: list[str], match: str, trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "result"
    assert match in refused(capsys, "attribute", str(trained.run.reader.target), *options, "-o", str(out))
    assert not out.exists()


def test_place_is_looked_at_before_the_work(
    trained: Trained, store: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    command = ["attribute", str(trained.run.reader.target), "--setup", "setups:failing", "-o"]
    assert "already" in refused(capsys, *command, store)
    assert "failed" in refused(capsys, *command, store, "--overwrite")
    attrib.open_result(store).check()


@pytest.mark.parametrize(
    "arguments",
    [
        ["--queries", "a"],
        ["--queries", "3:1"],
        ["--window", "7"],
        ["--memory", "x"],
        ["--memory", "infG"],
        ["-n", "-1"],
        ["-n", "0"],
    ],
)
def test_options_that_make_no_sense_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    command = ["top", "result"] if "-n" in arguments else ["attribute", "run", "--setup", "a:b"]
    with pytest.raises(SystemExit) as stopped:
        main([*command, *arguments])
    assert stopped.value.code == 2
    assert "expected such as" in capsys.readouterr().err


def test_script_is_read_anew_and_forgotten_if_it_fails(tmp_path: Path) -> None:
    for folder, width in (("a", 2), ("b", 3)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine_own.py").write_text(
            f"import torch\nclass Net(torch.nn.Linear): pass\ndef setup():\n    return Net({width}, 1), None, None\n"
        )
        model = load_setup(f"{tmp_path / folder / 'mine_own.py'}:setup").model
        assert model.in_features == width
        assert sys.modules["mine_own"].Net is type(model)  # what pickles, such as data loaders' workers, look up
    (tmp_path / "mine_broken.py").write_text("1 / 0")
    with pytest.raises(errors.SetupError, match="ZeroDivisionError"):
        load_setup(f"{tmp_path / 'mine_broken.py'}:setup")
    assert "mine_broken" not in sys.modules


def test_callables_keep_their_name(trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, out = str(trained.run.reader.target), str(tmp_path / "result")
    assert (
        main(
            ["attribute", run, "--setup", "setups:callable_only", "--measurement", "odds", "--queries", "3", "-o", out]
        )
        == 0
    )
    assert attrib.open_result(out).dataset.attrs["measurement"] == "odds"


def test_failing_description_is_one_line(store: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["top", store], ["report", store, "-o", str(tmp_path / "report.html")]):
        assert "IndexError" in refused(capsys, *command, "--setup", "setups:badly_described")
    assert not list(tmp_path.iterdir())


def test_top_lists_what_the_result_lists(store: str, capsys: pytest.CaptureFixture[str]) -> None:
    result = attrib.open_result(store)
    rows = said(capsys, "top", store, "-n", "2")
    pd.testing.assert_frame_equal(pd.DataFrame(rows), result.top(2))
    (shown, *_) = said(capsys, "top", store, "-n", "2", "--query", "4", "--setup", "setups:full")
    assert shown["query"] == 4
    assert shown["shown"] == f"{shown['example']}: <script>alert({shown['example']})</script>"
    capsys.readouterr()
    assert main(["top", store, "-n", "2"]) == 0
    text = capsys.readouterr().out
    assert result.names[0] in text
    assert "1 of 3" in text
    assert f"{result.top(1)['contribution'][0]:+.4f}" in text
    assert "got 'x'" in refused(capsys, "top", store, "--query", "x")


def test_timeline_is_printed_and_drawn(store: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = attrib.open_result(store)
    found = said(capsys, "timeline", store, "--bins", "4", "-o", str(tmp_path / "timeline.svg"))
    assert [row["name"] for row in found] == result.names
    assert [row["query"] for row in found] == [1, 4, 5]
    for q, row in enumerate(found):
        total = sum(map(sum, row["groups"].values()))
        np.testing.assert_allclose(total, result.timeline()[q].sum(), rtol=1e-12, atol=1e-14)
    assert "already" in refused(capsys, "timeline", store, "-o", str(tmp_path / "timeline.svg"))
    assert "<svg" in (tmp_path / "timeline.svg").read_text()
    assert main(["timeline", store, "--query", result.names[1]]) == 0
    assert result.names[1] in capsys.readouterr().out


def test_compare_puts_numbers_to_likeness(
    store: str, trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    same = said(capsys, "compare", store, store)
    assert all(row["correlation"] == pytest.approx(1) and row["same of top 10"] == 1 for row in same["queries"])
    result = attrib.open_result(store)
    dataset = result.dataset.load()
    turned = dataset.assign({v: -dataset[v] for v in ("timeline", *(n for n in dataset if str(n)[:5] == "contr"))})
    attrib.Result(turned.isel(query=[0, 2])).save(tmp_path / "turned")
    other = said(capsys, "compare", store, str(tmp_path / "turned"), "-n", "3")
    assert [row["query"] for row in other["queries"]] == [result.names[0], result.names[2]]
    assert all(row["correlation"] == pytest.approx(-1) and row["rank correlation"] == pytest.approx(-1)
               for row in other["queries"])  # fmt: skip
    assert all(row["a"] == pytest.approx(-row["b"]) for row in other["groups"])
    assert main(["compare", store, store]) == 0
    assert "net change per group" in capsys.readouterr().out
    unnamed = trained.attribute().dataset  # queries 0 and 1: without names, the numbers count
    attrib.Result(unnamed).save(tmp_path / "unnamed")
    assert [row["query"] for row in said(capsys, "compare", store, str(tmp_path / "unnamed"))["queries"]] == ["1"]
    attrib.Result(unnamed.assign_coords(query=[7, 8])).save(tmp_path / "others")
    assert "no query in common" in refused(capsys, "compare", store, str(tmp_path / "others"))


def test_queries_of_one_name_are_not_mixed_up(store: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = attrib.open_result(store)
    same = attrib.Result(result.dataset.load().assign_coords(query_name=("query", ["cat", "cat", "dog"])))
    same.save(tmp_path / "same")
    rows = said(capsys, "compare", str(tmp_path / "same"), str(tmp_path / "same"))["queries"]
    assert [row["final a"] for row in rows] == [row["final b"] for row in rows] == list(result.final.values)
    assert len(said(capsys, "timeline", str(tmp_path / "same"))) == 3


@pytest.mark.parametrize("ending", ["csv", "parquet"])
@pytest.mark.parametrize("axes", [(), ("example",), ("step", "group"), ("step", "example", "group")])
def test_exported_tables_read_back_the_same(
    axes: tuple[str, ...], ending: str, store: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result, path = attrib.open_result(store), tmp_path / f"table.{ending}"
    found = said(capsys, "export", store, "-o", str(path), "--axes", ",".join(axes))
    read = {
        "csv": lambda: pd.read_csv(path, converters={"contribution": float}),
        "parquet": lambda: pd.read_parquet(path),
    }
    table = read[ending]()
    assert found["rows"] == len(table) == result.by(*axes).size
    pd.testing.assert_frame_equal(table, result.to_pandas(*axes), check_exact=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == [path.name]
    assert "already" in refused(capsys, "export", store, "-o", str(path))
    assert main(["export", store, "-o", str(path), "--overwrite"]) == 0


def test_bad_exports_leave_nothing(
    store: str, trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    assert ".csv or .parquet" in refused(capsys, "export", store, "-o", str(out / "table.xls"))
    trained.attribute(keep=("example",)).save(tmp_path / "short")
    assert "keep=('step', 'example')" in refused(
        capsys, "export", str(tmp_path / "short"), "-o", str(out / "table.csv"), "--axes", "step,example"
    )
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(errors.MissingExtraError, match=r"attrib\[parquet\]"):
        attrib.report.export(attrib.open_result(store), out / "table.parquet")
    assert not list(out.iterdir())


def test_report_is_written_with_the_setups_descriptions(
    store: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "report.html"
    found = said(capsys, "report", store, "-o", str(path), "--setup", "setups:full", "--title", "Why?")
    assert found == {"report": str(path), "bytes": path.stat().st_size}
    assert "<title>Why?</title>" in path.read_text()
    assert "no result" in refused(capsys, "report", str(tmp_path / "nothing"), "-o", str(path))


def test_exits_hold_the_same_numbers(store: str) -> None:
    result = attrib.open_result(store)
    array = result.by("step", "group")
    np.testing.assert_array_equal(result.to_numpy("step", "group"), array)
    np.testing.assert_array_equal(result.to_torch("step", "group"), array)
    table = result.to_pandas("step", "group")
    assert list(table.columns) == ["query", "step", "group", "contribution"]
    again = table.set_index(["query", "step", "group"])["contribution"].to_xarray()
    np.testing.assert_array_equal(again.sel(group=array["group"]), array)
    here = attrib.Result(result.dataset.load())
    assert here.has(*AXES)
    here.to_torch(*AXES).zero_()  # one's own copy
    np.testing.assert_array_equal(here.to_numpy(*AXES), attrib.open_result(store).to_numpy(*AXES))
    assert np.abs(here.to_numpy(*AXES)).max() > 0


def test_notebooks_see_tables_and_data_stay_text(store: str, trained: Trained) -> None:
    result = attrib.open_result(store)
    html = result._repr_html_()
    assert html.count("<table") == 2
    assert "&lt;b&gt;sum" in html
    assert "<b>" not in html
    assert f"{float(result.final[0]):.6f}" in html
    short = trained.attribute(keep=("step",))
    assert short._repr_html_().count("<table") == 1
    ledger = result.check()._repr_html_()
    assert "batch" in ledger
    assert "<table" in ledger
    assert "AdamW, lr 0.01" in trained.run._repr_html_()
    assert "steps           9" in str(trained.run)


@pytest.mark.slow  # 400 steps, and a process of its own to kill
def test_killed_from_outside_leaves_what_was_done(tmp_path: Path) -> None:
    """A real process, a real Ctrl-C."""
    train(tmp_path / "run", OPTIMIZERS["adamw"], "gpt", steps=400, block=50)
    (tmp_path / "mine.py").write_text(
        "import sys, time\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import torch, cases, attrib, attrib.account\n"
        "def setup():\n"
        "    case = cases.MODELS['gpt']\n"
        "    x, y = case.data(3)\n"
        "    tallies = attrib.account.Account.tallies\n"
        "    attrib.account.Account.tallies = lambda *a: (tallies(*a), print('step', flush=True), time.sleep(0.3))[0]\n"
        "    return case.build().double(), case.loss, attrib.measure.log_prob(x, y)\n"
    )
    command = [sys.executable, "-m", "attrib", "attribute", "run", "--setup", "mine:setup", "-o", "result"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout
    assert process.stdout.readline() == "step\n"
    time.sleep(0.1)
    os.kill(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert "complete and saved: result" in error
    result = attrib.open_result(tmp_path / "result")
    result.check(1e-10)
    assert 0 < result.dataset.attrs["window"][0] < result.dataset.attrs["window"][1] == 400


@pytest.mark.slow  # starts processes, which import torch
def test_workers_of_the_command_line_give_the_result_of_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tmp_path / "run", OPTIMIZERS["adamw"], "gpt", steps=6)
    (tmp_path / "mine.py").write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import torch, cases, attrib\n"
        "def setup():\n"
        "    torch.manual_seed(0)\n"
        "    case = cases.MODELS['gpt']\n"
        "    x, y = case.data(3)\n"
        "    return case.build().double(), case.loss, attrib.measure.log_prob(x, y)\n"
    )
    monkeypatch.chdir(tmp_path)
    for name, workers in (("alone", []), ("together", ["--workers", "2"])):
        assert main(["attribute", "run", "--setup", f"{tmp_path}/mine.py:setup", "-o", name, *workers]) == 0
    alone, together = (attrib.open_result(tmp_path / name) for name in ("alone", "together"))
    np.testing.assert_allclose(together.by("step", "example"), alone.by("step", "example"), rtol=0, atol=1e-14)
    with pytest.raises(SystemExit):
        main(["attribute", "run", "--setup", "mine:setup", "--workers", "0"])
    assert "not a count" in capsys.readouterr().err


def test_a_difference_and_an_influence_are_asked_for_and_looked_at(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, setup = str(trained.run.reader.target), ["--setup", "setups:full", "--measurement", "log_prob"]
    changed = attrib.replay(
        trained.run,
        0,
        attrib.intervention.Drop([3]),
        model=trained.model,
        loss=trained.case.loss,
        store=tmp_path / "changed",
        progress=False,
    )
    places = {name: str(tmp_path / name) for name in ("influence", "difference")}
    found = said(capsys, "influence", run, *setup, "-o", places["influence"])
    assert "tangent against sensitivity" in found["checked"][0]
    command = ["difference", run, str(changed.reader.target), *setup, "--queries", "1,4", "--via", "reaction"]
    found = said(capsys, *command, "-o", places["difference"])
    assert {row["query"] for row in found["top"]} == {1, 4}
    for name, word in (("influence", "influence"), ("difference", "contribution")):
        assert word in said(capsys, "top", places[name], "-n", "2")[0]
        assert "this is about accounts: got " in refused(capsys, "compare", places[name], places[name])
    assert "already" in refused(capsys, *command, "-o", places["difference"])
