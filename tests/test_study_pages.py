"""Every study from its command at toy size: a page, its claims and ledgers, and the data of its figures beside it."""

import json
import re
from pathlib import Path

import pytest
import torch
import xarray as xr

from attrib.cli import main
from attrib.cli.studies import NAMES
from attrib.report.article import VERDICTS

# grokking has a test of its own, which also kills it and starts it again
STUDIES = [name for name in NAMES if name != "grokking"]


def drawn(page: str) -> str:
    """Without the names of clip paths, which are those of objects in memory."""
    return re.sub(r"f\d+-[pm][0-9a-f]+", "", page)


@pytest.mark.slow  # whole studies at toy size
@pytest.mark.parametrize("name", STUDIES)
def test_study_writes_a_whole_page_and_is_not_done_twice(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, state = tmp_path / "study", torch.get_rng_state()
    seeds = "2" if name == "development" else "1"  # of which some is between the seeds
    command = ["study", name, "--setting", "toy", "--seeds", seeds, "--out", str(folder)]
    assert main(command) == 0
    assert torch.equal(torch.get_rng_state(), state)
    said = capsys.readouterr().out
    assert said.count("seed 0:") >= 2
    page = (folder / "index.html").read_text()
    claims = re.findall(r'class="verdict (\w+)"', page)
    assert len(claims) >= 5
    assert set(claims) <= set(VERDICTS)
    ledger = page[page.index('<h2 id="ledgers">') :]
    assert ledger.count("initial") >= 1
    assert ledger.count("residual") >= 2
    figures, kept = page.count("<figure>"), list((folder / "data").glob("*.json"))
    assert 0 < figures <= len(kept)
    for file in kept:
        array = xr.DataArray.from_dict(json.loads(file.read_text())).astype(float)
        assert array.size
        assert all(d in array.coords for d in array.dims), file.name
    assert main(command) == 0
    assert "seed 0:" not in capsys.readouterr().out  # nothing is done again
    assert main([*command, "--json"]) == 0
    printed = capsys.readouterr().out
    assert json.loads(printed) == {"page": str(folder / "index.html")}
    assert drawn((folder / "index.html").read_text()) == drawn(page)
    assert main(["study", name, "--setting", "unheard", "--out", str(folder)]) == 1
    assert "no such setting" in capsys.readouterr().err
