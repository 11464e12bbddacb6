"""The notebooks under docs/tutorials: executed, and true."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parent.parent / "docs" / "tutorials").glob("*.ipynb"))
NEEDS = {  # a package that each is about, or has its data of
    "hugging_face": "transformers",
    "lightning": "lightning",
    "batchnorm": "sklearn",
    "compile_ddp": "sklearn",
}


def code_of(notebook: Path) -> list[dict]:
    return [cell for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == "code"]


def test_every_notebook_is_known() -> None:
    assert {notebook.stem for notebook in NOTEBOOKS} == set(NEEDS)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda n: n.stem)
def test_every_cell_was_executed_in_order_and_printed_no_error(notebook: Path) -> None:
    cells = code_of(notebook)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    kinds = {output["output_type"] for cell in cells for output in cell["outputs"]}
    assert "error" not in kinds
    assert {"stream", "display_data"} <= kinds  # a ledger and a picture
    assert "/work" not in notebook.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda n: n.stem)
def test_the_code_of_a_notebook_runs_and_prints_a_whole_ledger(notebook: Path, tmp_path: Path) -> None:
    pytest.importorskip(NEEDS[notebook.stem])
    if notebook.stem.startswith("compile") and not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("needs a C++ compiler")
    lines = [line for cell in code_of(notebook) for line in [*"".join(cell["source"]).splitlines(), ""]]
    script = tmp_path / "notebook.py"
    script.write_text("\n".join(line for line in lines if not line.startswith("%")))
    command, environment = [sys.executable, str(script)], {**os.environ, "MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "residual" in done.stdout
