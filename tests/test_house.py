"""The shape of the house: floors, file sizes, what the wheel carries."""

import ast
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# a module imports only strictly lower floors, siblings within one folder excepted
FLOORS = [
    {"kernels"},
    {"budget", "errors", "layout", "functional", "generators", "interrupt", "ledger", "marginals", "program", "result"},
    {"checks", "gradients", "optim", "path", "store", "measure"},
    {"capture", "trajectory"},
    {"recorder", "run"},
    {"plan", "source"},
    {"sink"},
    {"engine", "verify"},
    {"intervention", "phases", "report", "scale", "setup"},
    {"development"},
    {"studies"},
    {"cli", "__main__"},
]
FLOOR = {name: n for n, names in enumerate(FLOORS) for name in names}
WITHIN = {("result", "marginals"), ("marginals", "errors"), ("cli", "__main__"), ("__main__", "cli")}
FOREIGN = {"zarr": {"store"}, "dask": {"scale"}, "plotly": {"report"}, "matplotlib": {"report"}}


def sources() -> list[tuple[str, Path]]:
    """(unit, file): the unit is a module of attrib or one of its folders; the package's own face is not judged."""
    found = [(f.relative_to(ROOT / "attrib").parts[0].removesuffix(".py"), f) for f in (ROOT / "attrib").rglob("*.py")]
    return [(u, f) for u, f in found if u != "__init__"] + [("kernels", f) for f in (ROOT / "kernels").rglob("*.py")]


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


@pytest.mark.parametrize(("unit", "file"), sources(), ids=lambda v: v if isinstance(v, str) else v.name)
def test_modules_import_only_lower_floors(unit: str, file: Path) -> None:
    assert unit in FLOOR, f"{file} stands on no floor: add it to FLOORS"
    for other in imports(unit, file) - {unit, "attrib"}:
        if other in FLOOR:
            lower = FLOOR[other] < FLOOR[unit]
            assert lower or (unit, other) in WITHIN or FLOOR[other] == FLOOR[unit] == 1, f"{file} imports {other}"
        assert other not in FOREIGN or unit in FOREIGN[other], f"{file} imports {other}"


@pytest.mark.parametrize(("unit", "file"), sources(), ids=lambda v: v if isinstance(v, str) else v.name)
def test_files_and_functions_are_short(unit: str, file: Path) -> None:
    text = file.read_text()
    assert text.count("\n") <= 350
    tree = ast.parse(text)
    assert ast.get_docstring(tree), f"{file} has no header"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.end_lineno is not None:
            assert node.end_lineno - node.lineno + 1 <= 60, f"{file}: {node.name}"


def test_nothing_is_pickled() -> None:
    for _, file in sources():
        assert not {"pickle", "joblib", "dill"} & imports("x" if "kernels" not in str(file) else "kernels", file)


@pytest.mark.slow  # builds a wheel
def test_the_wheel_carries_no_top_level_kernels(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    source = tmp_path / "source"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(source)], check=True)
    subprocess.run([*command, str(source)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {t for t in tops if not t.endswith(".dist-info")} == {"attrib"}
    assert "attrib/kernels/slopes.py" in names
    assert "attrib/py.typed" in names


@pytest.mark.slow  # new processes, which import torch
@pytest.mark.parametrize("folder", [ROOT, Path("/")])
def test_attrib_is_importable_from_any_folder(folder: Path) -> None:
    command = [sys.executable, "-c", "import attrib.kernels.slopes, attrib.cli; print(attrib.__name__)"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "attrib", done.stderr


def test_the_top_level_is_the_agreed_list() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    tops = {name.split("/")[0] for name in listed}
    allowed = {"pyproject.toml", "attrib", "kernels", "tests", "scripts", "README.md", ".ci", "LICENSE", "CHANGELOG.md"}
    assert {t for t in tops - allowed if not t.startswith(".")} == set()
