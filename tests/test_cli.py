"""The command line: demo, info, verify."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from cases import OPTIMIZERS
from setups import CASE
from training import train

import attrib
from attrib.cli import main


@pytest.fixture
def store(tmp_path: Path) -> str:
    train(tmp_path / "run", OPTIMIZERS["adamw"], "gpt", capture="gradients", steps=6)
    return str(tmp_path / "run")


def test_info_tells_what_a_run_holds(store: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", store]) == 0
    text = capsys.readouterr().out
    for word in ("6", "Gpt", "AdamW", "float64", "gradients", "batch identity"):
        assert word in text
    assert main(["info", store, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["optimizer"] == "AdamW"


def test_verify_checks_every_step(store: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", store, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["failure"] is None
    assert found["identities"]["step"]["steps"] == found["identities"]["batch"]["steps"] == 6
    assert found["chunks"] > 10
    assert main(["verify", store]) == 0
    assert "verified" in capsys.readouterr().out


@pytest.mark.parametrize("array", ["theta", "gradient", "gradients", "hyper", "state/momentum"])
def test_verify_finds_a_changed_number(array: str, store: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A well-formed chunk with a wrong number in it: only the identities can tell."""
    found = zarr.open_group(store, mode="r+")[array]
    assert isinstance(found, zarr.Array)
    values = np.asarray(found[...])
    place = (min(4, len(values) - 1),) + (0,) * (values.ndim - 1)
    values[place] += 0.125
    found[...] = values
    assert main(["verify", store]) == 1
    assert "FAILED" in capsys.readouterr().out


def test_verify_names_a_damaged_chunk(store: str, capsys: pytest.CaptureFixture[str]) -> None:
    victim = sorted(p for p in (Path(store) / "gradients" / "c").rglob("*") if p.is_file())[0]
    victim.write_bytes(b"nonsense")
    assert main(["verify", store]) == 1
    assert str(victim.relative_to(store)) in capsys.readouterr().out


def test_errors_are_one_line_and_a_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(tmp_path / "nothing")]) == 1
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("attrib: no run is stored there")


def test_errors_of_a_command_come_with_its_usage(capsys: pytest.CaptureFixture[str]) -> None:
    for wrong in (["info", "run", "--wrong"], ["info"]):
        with pytest.raises(SystemExit) as stopped:
            main(wrong)
        assert stopped.value.code == 2
        assert capsys.readouterr().err.startswith("usage: attrib info")


def test_a_clipped_run_is_replayed_with_its_norm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained = train(tmp_path / "run", OPTIMIZERS["adamw"], CASE, clip=0.1)
    command = ["replay", str(tmp_path / "run"), "--setup", "setups:plain", "-o", str(tmp_path / "again"), "--json"]
    assert main([*command, "--clip", "0.1"]) == 0
    again = attrib.open_run(tmp_path / "again")
    for step in range(again.steps + 1):
        assert torch.equal(again.vector(step), trained.run.vector(step))
    assert main([*command, "--overwrite"]) == 1  # p.grad is not what the losses give
    assert "backward" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*command, "--clip", "-1"])
    assert "not a norm" in capsys.readouterr().err


def test_a_shell_is_told_commands_and_options(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("shtab")
    assert main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    for word in ("attribute", "influence", "--setup", "_attrib_info_pos_0_COMPGEN=_shtab_compgen_dirs"):
        assert word in script
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["completion", "bash"]) == 1
    assert "attrib[shell]" in capsys.readouterr().err


def test_module_and_command_are_one(
    store: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["attrib", "info", store])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module("attrib", run_name="__main__")
    assert stopped.value.code == 0
    assert "AdamW" in capsys.readouterr().out


@pytest.mark.slow  # a new process, which imports torch
def test_module_runs_in_a_process_of_its_own(store: str) -> None:
    done = subprocess.run([sys.executable, "-m", "attrib", "info", store], capture_output=True, text=True, check=True)
    assert "AdamW" in done.stdout


@pytest.mark.slow  # the whole demo: trains until it generalises, explains, draws
def test_demo_tells_its_story_and_leaves_its_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--out", str(tmp_path / "out")]) == 0
    text = capsys.readouterr().out
    for word in ("ledger", "residual", "batch identity", "step identity", "measurement identity", " + ", "embedding"):
        assert word in text
    assert (tmp_path / "out" / "timeline.png").read_bytes().startswith(b"\x89PNG")
    result = attrib.open_result(tmp_path / "out" / "result.zarr")
    ledger = result.check(1e-5)
    assert float(result.curve.isel(state=-1).max()) > np.log(0.9)
    assert float(abs(ledger.residual).max()) > 0  # float32: measured, not assumed
    top = result.top(1)
    assert len(top) == 2 * result.dataset.sizes["query"]
