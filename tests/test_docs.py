"""The README and the documentation: short, linked, complete, and true."""

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import attrib

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
LINKS = re.compile(r"\]\(\s*([^)\s]+)\)")


def code_of_readme() -> str:
    return (ROOT / "README.md").read_text().split("```python\n")[1].split("```")[0]


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.slow
def test_the_readme_runs_and_prints_such_a_ledger(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code_of_readme()],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    shown = (ROOT / "README.md").read_text().split("```python\n")[1].split("```\n")[2].split("```")[0].splitlines()
    printed = done.stdout.splitlines()
    assert [line.split()[0] for line in printed[: len(shown)]] == [line.split()[0] for line in shown]
    assert printed[0] == shown[0]
    initial = [float(line.split()[1]) for line in (printed[1], shown[1])]
    assert initial[0] == pytest.approx(initial[1], abs=1e-5)  # float32 at a seeded start
    assert (tmp_path / "report.html").stat().st_size > 0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    targets = [link.split("#")[0] for link in LINKS.findall(page.read_text())]
    local = [target for target in targets if target and not target.startswith(("http:", "https:"))]
    assert [target for target in local if not (page.parent / target).exists()] == []


def test_every_page_is_in_the_contents() -> None:
    listed: set[Path] = set()
    for page in DOCS.rglob("*.md"):
        for tree in re.findall(r"```\{toctree\}\n(.*?)```", page.read_text(), flags=re.S):
            names = [line.strip() for line in tree.splitlines() if line.strip() and not line.startswith(":")]
            listed |= {(page.parent / name).resolve() for name in names}
    pages = {page.with_suffix("").resolve() for page in [*DOCS.rglob("*.md"), *DOCS.rglob("*.ipynb")]}
    built = {page for page in pages if "_build" in page.parts}
    assert pages - built - {DOCS / "index"} == listed


def test_every_public_name_is_in_the_reference() -> None:
    text = "\n".join(page.read_text() for page in (DOCS / "reference").glob("*.md"))
    modules = set(re.findall(r"automodule:: attrib\.(\w+)", text))
    names = set(re.findall(r"auto(?:class|function):: attrib\.(\w+)", text))
    public = {n: getattr(attrib, n) for n in attrib.__all__}
    assert names == {n for n, value in public.items() if not inspect.ismodule(value)}
    assert modules == {n for n, value in public.items() if inspect.ismodule(value)}
