"""Stores from strangers: nothing they name is made, no memory is taken that their bytes do not fill, no link is followed."""

import json
import os
import resource
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import MODELS, OPTIMIZERS
from torch import nn
from training import assert_same_arrays, train

import attrib
from attrib.errors import AttribError, StoreError
from attrib.store.metadata import canonical
from attrib.store.seal import digest, metadata_digest, sealed

Document = dict[str, Any]


def reworked(store: Path, array: str, change: Callable[[Document], None]) -> None:
    """The metadata of an array changed, and all digests made to fit: as somebody would who knows them."""
    path = store / array / "zarr.json"
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))
    attributes = json.loads((store / "zarr.json").read_text())["attributes"]
    header = attributes["attrib"]
    growing = header["kind"] == "run"
    header["sealed"]["arrays"][array] = metadata_digest(header["id"], f"{array}/zarr.json", document, growing)
    (store / "zarr.json").write_bytes(sealed(attributes))


def with_codec(name: str, **configuration: Any) -> Callable[[Document], None]:
    def change(document: Document) -> None:
        document["codecs"].insert(0, {"name": name, "configuration": configuration})

    return change


def with_value(*path: Any, value: Any) -> Callable[[Document], None]:
    def change(document: Document) -> None:
        for key in path[:-1]:
            document = document[key]
        document[path[-1]] = value

    return change


def larger(*path: Any) -> Callable[[Document], None]:
    def change(document: Document) -> None:
        for key in path[:-1]:
            document = document[key]
        document[path[-1]] = [1 << 20] * len(document[path[-1]])

    return change


CHANGES = {
    "pickle": (with_codec("numcodecs.pickle"), "codec 'numcodecs.pickle'"),
    "shards": (with_codec("sharding_indexed", chunk_shape=[1]), "codec 'sharding_indexed'"),
    "objects": (with_value("data_type", value="object"), "data type 'object'"),
    "structured": (with_value("data_type", value={"name": "structured", "configuration": {}}), "data type"),
    "version 2": (with_value("zarr_format", value=2), "zarr_format 2"),
    "negative": (with_value("shape", value=[-1, 4]), r"shape \[-1, 4\]"),
    "no chunks": (with_value("chunk_grid", "configuration", "chunk_shape", value=[0, 4]), "chunks"),
    "dimensions": (with_value("dimension_names", value=["step"]), "dimensions"),
    "transformers": (with_value("storage_transformers", value=[{"name": "x"}]), "storage transformers"),
    "large chunk": (larger("chunk_grid", "configuration", "chunk_shape"), "too short"),
    "large array": (larger("shape"), "missing|too short"),
}


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run and a result, to be copied."""
    folder = tmp_path_factory.mktemp("stored")
    train(folder / "run", OPTIMIZERS["sgd"]).attribute().save(folder / "result")
    return folder


@pytest.mark.parametrize("kind", CHANGES)
@pytest.mark.parametrize("what", ["run", "result"])
def test_array_that_attrib_would_not_write_is_refused(what: str, kind: str, stored: Path, tmp_path: Path) -> None:
    """Before anything of it is made, with little memory."""
    shutil.copytree(stored / what, tmp_path / what)
    change, text = CHANGES[kind]
    array = {"run": "index", "result": "contribution_step_example_group"}[what]
    if kind == "large array" and what == "run":  # as while it is recorded: only committed rows are read
        pytest.skip("harmless")

    def read() -> None:
        attrib.open_run(tmp_path / "run").index(0) if what == "run" else attrib.open_result(tmp_path / "result")

    reworked(tmp_path / what, array, change)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + (1 << 30), hard))
    try:
        with pytest.raises(StoreError, match=text):
            read()
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.mark.parametrize("victim", ["theta/c/0/0", "theta/zarr.json", "theta", "zarr.json"])
def test_link_out_of_a_store_is_not_followed(victim: str, tmp_path: Path) -> None:
    train(tmp_path / "run", OPTIMIZERS["sgd"])
    os.rename(tmp_path / "run" / victim, tmp_path / "outside")
    (tmp_path / "run" / victim).symlink_to(tmp_path / "outside")
    with pytest.raises(StoreError, match="is a link or no plain file"):
        attrib.open_run(tmp_path / "run").vector(0)


def test_pipe_in_a_store_is_not_waited_for(tmp_path: Path) -> None:
    train(tmp_path / "run", OPTIMIZERS["sgd"])
    (tmp_path / "run" / "theta/c/0/0").unlink()
    os.mkfifo(tmp_path / "run" / "theta/c/0/0")
    with pytest.raises(StoreError, match="no plain file"):
        attrib.open_run(tmp_path / "run").vector(0)


LIES = (None, "x", -1, 1 << 70, [], {}, [[]])
TOLD = {"generators", "remainder", "seed", "shares"}  # facts that are said of a run, and not needed to read it


@pytest.mark.parametrize("some", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_header_that_lies_is_an_error_of_ours(some: int, tmp_path: Path) -> None:
    """Sealed as it should be, with every fact in turn of another type, or gone. some: every so many of these, in turn."""
    train(tmp_path / "run", OPTIMIZERS["adamw"])
    content = (tmp_path / "run" / "zarr.json").read_bytes()
    attributes = json.loads(content)["attributes"]
    refused = set()
    for place, name in enumerate(attributes["attrib"]):
        for value in LIES[place % some :: some]:
            header = {**attributes["attrib"], name: value}
            if value is None:
                del header[name]
            if name == "seal":
                continue
            (tmp_path / "run" / "zarr.json").write_bytes(sealed({"attrib": header}))
            try:
                run = attrib.open_run(tmp_path / "run")
                attrib.verify(run, progress=False)
                str(run), repr(run)
            except (AttribError, IndexError):
                refused.add(name)
    assert len(refused) > len(attributes["attrib"]) / 2
    assert some > 1 or set(attributes["attrib"]) - refused <= {*TOLD, "seal"}


class Named(nn.Module):
    """Buffers and parameters whose names are no file's."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("a/b", torch.tensor([1.0, 2.0]))
        self.register_buffer("x" * 300, torch.tensor(0.5))
        self.register_parameter("w/c/0", nn.Parameter(torch.randn(2, 3)))
        self.register_parameter("v" * 300, nn.Parameter(torch.zeros(3)))
        self.register_buffer("a", torch.tensor([4.0]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ (getattr(self, "w/c/0") * getattr(self, "a/b")[:, None]) + getattr(self, "v" * 300)


@pytest.mark.parametrize("capture", ["replay", "gradients", "factors"])
def test_tensors_may_have_any_name(capture: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, loss = Named().double(), MODELS["mlp"].loss
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    x, y = torch.randn(6, 2).double(), torch.randint(0, 3, (6,))
    with attrib.record(optimizer, model, loss, tmp_path / "run", capture) as recorder:
        for _ in range(4):
            recorder.zero_grad()
            loss(model, x, y).mean().backward()
            recorder.step(torch.arange(6), x, y)
    run = attrib.open_run(tmp_path / "run")
    fresh = Named().double()
    fresh.get_buffer("a/b").zero_()
    run.load(fresh, 4)
    assert all(map(torch.equal, fresh.state_dict().values(), model.state_dict().values()))
    assert attrib.verify(run, progress=False).failure is None
    attrib.attribute(run, fresh, attrib.measure.log_prob(x, y), loss=loss, progress=False).check(1e-10)


PLAIN = """
    import sys
    sys.modules["attrib"] = None  # not installed
    import numpy as np, xarray as xr, zarr
    run, result, out = {places!r}
    group = zarr.open_group(run, mode="r")
    arrays = {{k.replace("/", "|"): a[...] for k, a in group.members(max_depth=None) if isinstance(a, zarr.Array)}}
    whole = xr.open_zarr(run, consolidated=False).load()
    assert (whole["theta"].values == arrays["theta"]).all()
    by = xr.open_zarr(result, consolidated=False).load()["contribution_step_example_group"].values
    np.savez(out, by=by, **arrays)
"""


@pytest.mark.slow  # a new process
def test_zarr_and_xarray_alone_read_everything(tmp_path: Path) -> None:
    trained = train(tmp_path / "run", OPTIMIZERS["adamw"], capture="gradients")
    result = trained.attribute()
    result.save(tmp_path / "result")
    places = [str(tmp_path / name) for name in ("run", "result", "read.npz")]
    script = textwrap.dedent(PLAIN).format(places=places)
    subprocess.run([sys.executable, "-c", script], check=True, cwd="/")
    os.rename(tmp_path / "run", tmp_path / "run.zarr")
    os.rename(tmp_path / "result", tmp_path / "result.zarr")
    page = (Path(__file__).parent.parent / "docs" / "store.md").read_text()
    block = page.split("import json, xarray, zarr")[1].split("```")[0]
    done = subprocess.run(
        [sys.executable, "-c", f"import json, xarray, zarr{block}print(json.dumps(facts))"],
        check=True,
        capture_output=True,
        cwd=tmp_path,
    )
    assert json.loads(done.stdout)["loss"] == attrib.open_run(tmp_path / "run.zarr").log("loss")[0]
    read = np.load(tmp_path / "read.npz")
    np.testing.assert_array_equal(read["by"], result.by("step", "example", "group"))
    run = attrib.open_run(tmp_path / "run.zarr")
    for name in run.reader.names():
        np.testing.assert_array_equal(read[name.replace("/", "|")], run.reader.read(name), err_msg=name)


def test_digest_tells_names_and_bytes_apart() -> None:
    names, contents = ("a", "b", "ab"), (b"", b"a", b"b", b"ab")
    assert len({digest(of, name, content) for of in ("x", "y") for name in names for content in contents}) == 24
    assert canonical({"b": 1, "a": [1.5]}) == canonical({"a": [1.5], "b": 1})


def test_moved_run_is_the_same_run(tmp_path: Path) -> None:
    train(tmp_path / "run", OPTIMIZERS["sgd"])
    os.rename(tmp_path / "run", tmp_path / "moved")
    train(tmp_path / "run", OPTIMIZERS["sgd"])
    assert_same_arrays(attrib.open_run(tmp_path / "moved"), attrib.open_run(tmp_path / "run"))
