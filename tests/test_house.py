"""The shape of the house: floors, file sizes, what the wheel carries."""

import ast
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from house import FLOORS, FOREIGN, IGNORED, picture

ROOT = Path(__file__).parent.parent

FLOOR = {unit: n for n, floor in enumerate(FLOORS) for unit in floor.units}


def sources() -> list[tuple[str, Path]]:
    """(unit, file): the unit is a module of attrib or one of its folders."""
    found = [(f.relative_to(ROOT / "attrib").parts[0].removesuffix(".py"), f) for f in (ROOT / "attrib").rglob("*.py")]
    return found + [("kernels", f) for f in (ROOT / "kernels").rglob("*.py")]


def imports(unit: str, file: Path) -> set[str]:
    """Names of attrib's units and of other packages that a file imports."""
    base = ROOT / ("kernels" if unit == "kernels" else "attrib")
    package = ["attrib", *(["kernels"] if unit == "kernels" else []), *file.relative_to(base).parts[:-1]]
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            stem = package[: len(package) - node.level + 1] if node.level else []
            path = [*stem, *(node.module.split(".") if node.module else [])]
            modules = (
                [".".join([*path, alias.name]) for alias in node.names] if path == ["attrib"] else [".".join(path)]
            )
        else:
            continue
        for module in modules:
            parts = module.split(".")
            found.add(parts[1] if parts[0] == "attrib" and len(parts) > 1 else parts[0])
    return found


def test_modules_import_only_lower_floors() -> None:
    wrong = []
    for unit, file in sources():
        assert unit in FLOOR, f"{file} stands on no floor: add it to FLOORS in tests/house.py"
        for other in imports(unit, file) - {unit, "attrib"}:
            upwards = other in FLOOR and FLOOR[other] >= FLOOR[unit]
            if upwards or (other in FOREIGN and unit not in FOREIGN[other]):
                wrong.append(f"{file} imports {other}")
    assert wrong == []


def test_every_row_of_the_house_has_a_file() -> None:
    units = [unit for floor in FLOORS for unit in floor.units]
    assert sorted(units) == sorted({unit for unit, _ in sources()})
    packages = {package for unit in FOREIGN.values() for package in unit}
    assert packages <= set(units)


def test_the_documentation_shows_the_house_as_it_is() -> None:
    page = ROOT / "docs" / "developing.md"
    assert picture() in page.read_text(), f"put the output of `python tests/house.py` into {page}"


def test_what_mypy_does_not_judge_is_listed_with_its_reason() -> None:
    found = {}
    for _, file in sources():
        for line in file.read_text().splitlines():
            if "type: ignore" in line:
                code = line.split("type: ignore[")[1].split("]")[0]
                found[str(file.relative_to(ROOT))] = code
    assert found == {file: code for file, (code, _) in IGNORED.items()}


def test_files_and_functions_are_short() -> None:
    wrong = []
    for _, file in sources():
        text = file.read_text()
        tree = ast.parse(text)
        if not ast.get_docstring(tree):
            wrong.append(f"{file} has no header")
        if text.count("\n") > 350:
            wrong.append(f"{file} is too long")
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.FunctionDef)
                and node.end_lineno is not None
                and node.end_lineno - node.lineno >= 60
            ):
                wrong.append(f"{file}: {node.name} is too long")
    assert wrong == []


def test_nothing_is_pickled_to_disk() -> None:
    """An executor's workers are sent what they need; no store holds any."""
    for unit, file in sources():
        assert not {"joblib", "dill"} & imports(unit, file)


@pytest.mark.slow  # builds a wheel
def test_the_wheel_carries_every_module_and_no_top_level_kernels(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    source = tmp_path / "source"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(source)], check=True)
    subprocess.run([*command, str(source)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {t for t in tops if not t.endswith(".dist-info")} == {"attrib"}
    folders = ((source / "attrib", source / "attrib"), (source / "kernels", source))
    modules = {f"attrib/{f.relative_to(base)}" for folder, base in folders for f in folder.rglob("*.py")}
    assert modules <= set(names)  # pyproject names every package
    assert "attrib/py.typed" in names


ONCE = """
import importlib.util, attrib.kernels.slopes, attrib.cli
try:
    twice = importlib.util.find_spec("attrib.attrib.errors")
except ModuleNotFoundError:
    twice = None
print(attrib.__name__, twice, attrib.kernels.slopes is importlib.import_module("attrib.kernels.slopes"))
"""


@pytest.mark.slow  # new processes, which import torch
@pytest.mark.parametrize("folder", [ROOT, Path("/")])
def test_attrib_is_importable_from_any_folder_and_each_module_once(folder: Path) -> None:
    done = subprocess.run([sys.executable, "-c", ONCE], cwd=folder, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "attrib None True", done.stderr


def test_the_top_level_is_the_agreed_list() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    tops = {name.split("/")[0] for name in listed}
    allowed = {
        "pyproject.toml",
        "attrib",
        "kernels",
        "tests",
        "scripts",
        "README.md",
        ".ci",
        "LICENSE",
        "CHANGELOG.md",
        "docs",
        "CITATION.cff",
    }
    assert {t for t in tops - allowed if not t.startswith(".")} == set()
