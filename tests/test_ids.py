"""Ids of training examples: strings of any kind and numbers beyond 2**53 are the same wherever they come out."""

import csv
import json
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from html import escape
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
import zarr
from cases import OPTIMIZERS
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from training import Trained, train
from zarr.storage import MemoryStore

import attrib
from attrib import errors
from attrib.cli import main
from attrib.intervention import Drop, Reweight
from attrib.report import article, figures, payload, shown, to_json
from attrib.store import Reader
from attrib.store.ids import FEWEST, SHORTEST, Ids, IdTable

# what a table, a terminal, a page or a file could take for something else
NAMES = ["doc-17", "", "nan", "007", "__proto__", "float32", "constructor", "日本 \U0001f600 é", "<b>&amp;", 'x" \n\ty, z',
         "@1:2", "corpus/" + 300 * "0" + "/doc-3"]  # fmt: skip
LARGE = [2**62 + 1 + 2 * k for k in range(12)]  # as numbers of JavaScript they are all the same
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))


def named(index: Tensor) -> list[str]:
    return [NAMES[k] for k in index]


def numbered(index: Tensor) -> Tensor:
    return torch.tensor(LARGE)[index]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return train(tmp_path_factory.mktemp("named") / "run", OPTIMIZERS["adamw"], steps=9, called=named)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """The same training, its ids positions in NAMES."""
    return train(tmp_path_factory.mktemp("plain") / "run", OPTIMIZERS["adamw"], steps=9)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return train(tmp_path_factory.mktemp("large") / "run", OPTIMIZERS["adamw"], steps=9, called=numbered)


@pytest.fixture(scope="module")
def result(trained: Trained) -> attrib.Result:
    return trained.attribute()


# recorded


@pytest.mark.parametrize(
    "kind",
    [list, tuple, np.array, pd.Series, lambda names: np.array(names, object), lambda names: list(map(np.str_, names))],
)  # fmt: skip
def test_strings_read_back_as_they_were_whatever_they_came_in(kind: Any) -> None:
    trained = train(MemoryStore(), OPTIMIZERS["sgd"], called=lambda index: kind(named(index)))
    seen: dict[str, None] = {}
    for step, (index, _, _) in enumerate(trained.batches):
        assert trained.run.index(step).tolist() == named(index)
        seen.update(dict.fromkeys(named(index)))
    assert trained.run.examples.tolist() == list(seen)  # in the order in which they came
    assert {type(name) for name in trained.run.examples} == {str}


def test_zarr_alone_can_read_the_strings(trained: Trained) -> None:
    group = zarr.open_group(trained.run.reader.target, mode="r")
    text, spans, index = (np.asarray(group[name][...]) for name in ("ids/text", "ids/span", "index"))
    first = [text[a:b].tobytes().decode() for a, b in spans[index[0]]]
    assert first == named(trained.batches[0][0])
    for path in Path(trained.run.reader.target).rglob("zarr.json"):
        assert "pickle" not in path.read_text()


@given(st.lists(st.lists(TEXT, min_size=1, max_size=6), min_size=1, max_size=8), st.integers(1, 3))
def test_any_strings_come_back_after_any_commits(steps: list[list[str]], every: int) -> None:
    group = zarr.create_group(MemoryStore())
    arrays = [np.array(names, dtype=object) for names in steps]
    table, numbers = IdTable.created(group, arrays[0], every), []
    for n, ids in enumerate(arrays, 1):
        numbers.append(table.place(ids))
        if n % every == 0:
            table.commit()
            whole = {name: group[f"ids/{name}"][:] for name in ("span", "text")}
    table.commit()
    ids = opened(group, table.written)
    for names, at in zip(steps, numbers, strict=True):
        assert ids.of(at).tolist() == names
    assert len({n for at in numbers for n in at}) == len({name for names in steps for name in names})
    if len(steps) >= every:  # what was committed before stands where it stood
        for name, values in whole.items():
            np.testing.assert_array_equal(group[f"ids/{name}"][: len(values)], values)


def opened(group: zarr.Group, committed: list[int]) -> Ids:
    """As a run of these ids would be read."""
    reader = SimpleNamespace(
        header={"ids": committed},
        read=lambda name, rows: np.asarray(group[name][rows]),  # type: ignore[index]
    )
    return Ids(cast(Reader, reader))


def test_commits_fill_whole_chunks_so_that_none_is_written_twice(tmp_path: Path) -> None:
    group = zarr.create_group(tmp_path / "store")
    table = IdTable.created(group, np.array(["a"], dtype=object), 1)
    files: dict[Path, int] = {}
    for n in range(3):
        table.place(np.array([f"{n} {'x' * 20_000}", f"{n}"], dtype=object))
        table.commit()
        now = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("c/*") if path.is_file()}
        now |= {path: path.stat().st_mtime_ns for path in tmp_path.rglob("c/*/*") if path.is_file()}
        assert all(now[path] == when for path, when in files.items())
        assert len(now) > len(files)
        files = now


def test_what_waits_is_written_by_the_commit_after_one_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    group = zarr.create_group(MemoryStore())
    table = IdTable.created(group, np.array(["a"], dtype=object), 1)
    first = table.place(np.array(["a", "b"], dtype=object))
    with monkeypatch.context() as patch:
        patch.setattr(zarr.Array, "resize", lambda *given: (_ for _ in ()).throw(OSError("full")))
        with pytest.raises(OSError, match="full"):
            table.commit()
    second = table.place(np.array(["c", "a"], dtype=object))
    table.commit()
    ids = opened(group, table.written)
    assert [ids.of(at).tolist() for at in (first, second)] == [["a", "b"], ["c", "a"]]


def test_a_killed_run_has_the_strings_of_its_committed_steps(tmp_path: Path) -> None:
    """Strings that were being written, their arrays already longer, a chunk half there, are not asked for."""
    trained = train(tmp_path / "run", OPTIMIZERS["sgd"], steps=9, called=named, close=False)
    group = zarr.open_group(tmp_path / "run", mode="r+")
    spans, text = group["ids/span"], group["ids/text"]
    assert isinstance(spans, zarr.Array)
    assert isinstance(text, zarr.Array)
    text.resize((2 * SHORTEST,))
    spans.resize((2 * FEWEST, 2))
    for name in ("text/c/1", "span/c/1/0"):
        (tmp_path / "run" / "ids" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "run" / "ids" / name).write_bytes(b"half")
    again = attrib.open_run(tmp_path / "run")
    assert not again.complete
    assert 3 <= again.steps < 9
    for step in range(again.steps):
        assert again.index(step).tolist() == named(trained.batches[step][0])
    assert attrib.verify(again, progress=False).failure is None


def test_damaged_strings_are_named(tmp_path: Path) -> None:
    train(tmp_path / "run", OPTIMIZERS["sgd"], called=named)
    victim = tmp_path / "run" / "ids" / "text" / "c" / "0"
    victim.write_bytes(victim.read_bytes()[:-8] + bytes(8))
    with pytest.raises(errors.StoreError, match="ids/text/c/0"):
        _ = attrib.open_run(tmp_path / "run").examples
    assert "ids/text" in str(attrib.verify(attrib.open_run(tmp_path / "run"), progress=False).failure)


# attributed


def test_contributions_are_those_of_the_same_run_with_numbers(trained: Trained, plain: Trained) -> None:
    found, wanted = trained.attribute(), plain.attribute()
    for axes in (("example",), ("step", "example"), ("example", "group")):
        ours, theirs = found.by(*axes), wanted.by(*axes)
        assert ours["example"].dtype == object
        for number in theirs["example"].values:
            np.testing.assert_array_equal(ours.sel(example=NAMES[number]), theirs.sel(example=number))
    np.testing.assert_array_equal(found.timeline(), wanted.timeline())
    assert found.dataset["example"].values.tolist() == trained.run.examples.tolist()


def test_tables_of_a_result_hold_the_strings(result: attrib.Result) -> None:
    assert set(result.top(3)["example"]) <= set(NAMES)
    table = result.to_pandas("example")
    assert set(table["example"]) == set(NAMES)
    for _, row in table[table["query"] == 1].iterrows():
        assert result.by("example").sel(query=1, example=row["example"]).item() == row["contribution"]
    assert "<b>" not in result._repr_html_()
    for name in result.select([0]).top(3)["example"]:
        assert f"<td>{escape(name, quote=False)}</td>" in result._repr_html_() or len(name) > 50


@pytest.mark.parametrize("keep", [None, ("step", "group")])
@pytest.mark.parametrize("kind", ["strings", "large numbers"])
def test_a_saved_result_has_the_same_ids(
    kind: str, keep: Any, trained: Trained, large: Trained, tmp_path: Path
) -> None:
    result = (trained if kind == "strings" else large).attribute(keep=keep)
    for place in (tmp_path / "result", MemoryStore()):
        result.save(place)
        again = attrib.open_result(place).dataset.load()
        xr.testing.assert_identical(again, result.dataset)
        assert again["example"].values.tolist() == (trained if kind == "strings" else large).run.examples.tolist()
        assert again["example"].dtype == result.dataset["example"].dtype
    attrib.open_result(tmp_path / "result").save(tmp_path / "result", overwrite=True)
    xr.testing.assert_identical(attrib.open_result(tmp_path / "result").dataset.load(), result.dataset)


@given(st.lists(TEXT, min_size=1, max_size=12, unique=True))
def test_any_strings_are_saved_and_chosen_by(names: list[str]) -> None:
    values, place = np.arange(2.0 * len(names)).reshape(2, -1), MemoryStore()
    arrays = {"contribution_example": (("query", "example"), values)}
    attrib.Result(xr.Dataset(arrays, {"query": [0, 1], "example": np.array(names, object)})).save(place)
    again = attrib.open_result(place)
    for n, name in enumerate(names):
        np.testing.assert_array_equal(again.by("example").sel(example=name), values[:, n])
    assert again.to_pandas("example")["example"].tolist() == names * 2


def test_the_cube_has_the_strings_beside_it(trained: Trained, plain: Trained, tmp_path: Path) -> None:
    for store, of in (("named", trained), ("plain", plain)):
        of.attribute(cube=str(tmp_path / store))
    cubes = [zarr.open_group(tmp_path / name, mode="r") for name in ("named", "plain")]
    np.testing.assert_array_equal(cubes[0]["contribution"][:], cubes[1]["contribution"][:])
    text, spans = cubes[0]["ids/text"][:], cubes[0]["ids/span"][:]
    numbers, positions = (np.asarray(cube["index"][:]) for cube in cubes)
    np.testing.assert_array_equal(numbers < 0, positions < 0)
    found = [text[a:b].tobytes().decode() for a, b in spans[numbers[numbers >= 0]]]
    assert found == [NAMES[k] for k in positions[positions >= 0]]
    assert "ids" not in cubes[1]


def test_workers_give_strings(trained: Trained, result: attrib.Result) -> None:
    with ThreadPoolExecutor(2) as pool:
        found = trained.attribute(executor=pool)
    np.testing.assert_allclose(found.by("example"), result.by("example"), rtol=0, atol=1e-14)
    assert found.dataset["example"].values.tolist() == result.dataset["example"].values.tolist()


def test_a_share_of_another_example_is_named_by_its_string(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The inputs of two slots of every batch are exchanged: sums stay, shares are another's."""
    trained = train(tmp_path / "run", OPTIMIZERS["sgd"], capture="gradients", called=named)
    rows = attrib.Run.shares

    def exchanged(run: attrib.Run, step: int) -> np.ndarray:
        return rows(run, step)[[1, 0, *range(2, len(run.index(step)))]]

    monkeypatch.setattr(attrib.Run, "shares", exchanged)
    failure = str(trained.attribute().dataset.attrs["split_failure"])
    step = int(failure.split("at step ")[1].split(",")[0])
    assert any(f"example {name!r}, group" in failure for name in trained.run.index(step)[:2])
    said = attrib.verify(trained.run, progress=False, model=trained.model, loss=trained.case.loss).failure
    assert said is not None
    assert any(f"example {name!r}, parameter" in said for name in NAMES)


def test_runs_are_compared_by_their_strings(trained: Trained, result: attrib.Result, tmp_path: Path) -> None:
    """Another run, in which the examples came in another order."""

    def later(index: Tensor) -> list[str]:
        return [NAMES[(int(k) + 5) % 12] for k in index]

    other = train(tmp_path / "run", OPTIMIZERS["adamw"], steps=9, called=later).attribute()
    assert other.dataset["example"].values.tolist() != result.dataset["example"].values.tolist()
    pairs = [
        (result.by("example")[0].sel(example=e).item(), other.by("example")[0].sel(example=e).item()) for e in NAMES
    ]
    a, b = np.array(pairs).T
    found = attrib.report.compare(result, other).queries
    assert found["common examples"][0] == 12
    assert found["correlation"][0] == pytest.approx(np.corrcoef(a, b)[0, 1], rel=1e-12)
    cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    assert attrib.similarity({"a": result, "b": other}, "example")[0, 0, 1].item() == pytest.approx(cosine, rel=1e-12)


def test_results_of_strings_and_of_numbers_have_no_example_in_common(result: attrib.Result, plain: Trained) -> None:
    other = plain.attribute()
    assert attrib.report.compare(result, other).queries["common examples"][0] == 0
    with pytest.raises(ValueError, match="no labels"):
        attrib.similarity({"a": result, "b": other}, "example")


def test_moves_are_in_the_order_of_the_examples(trained: Trained, plain: Trained) -> None:
    def matrix(of: Trained) -> xr.DataArray:
        moves = attrib.moves(of.run, of.model, of.measurement(), range(2, 4), loss=of.case.loss)
        each = [xr.DataArray(m.contributions, {"example": of.run.examples}, ("query", "example")) for m in moves]
        return xr.concat(each, "step")

    ours, theirs = matrix(trained), matrix(plain)
    for number in theirs["example"].values:
        np.testing.assert_array_equal(ours.sel(example=NAMES[number]), theirs.sel(example=number))


# trained again


def changes(call: Any) -> list[attrib.intervention.Intervention]:
    return [Drop([call(0), call(4)], slice(3, None)), Reweight({call(7): 0.5, call(2): -1.0})]


def test_a_replay_is_changed_by_strings_and_keeps_them(trained: Trained, plain: Trained, tmp_path: Path) -> None:
    again = {}
    for name, of, call in (("named", trained, NAMES.__getitem__), ("plain", plain, int)):
        again[name] = attrib.replay(of.run, 2, changes(call), model=of.model, loss=of.case.loss, store=tmp_path / name)
    ours, theirs = again["named"], again["plain"]
    assert torch.equal(ours.vector(7), theirs.vector(7))
    for step in range(7):
        assert ours.index(step).tolist() == [NAMES[k] for k in theirs.index(step)]
    dropped, weights = ours.header["replay"]["interventions"]
    assert dropped["examples"] == ["doc-17", "__proto__"]
    assert weights["weights"] == {NAMES[7]: 0.5, "nan": -1.0}


@pytest.mark.parametrize("change", [Drop(["doc-18"]), Drop([3]), Reweight({"doc-18": 2.0}), Drop([]), Drop("doc-17")])
def test_examples_that_are_not_in_the_run_are_refused(change: Any, trained: Trained, tmp_path: Path) -> None:
    match = "are a string" if change == Drop("doc-17") else "no such train examples.*such as"
    with pytest.raises(errors.ReplayError, match=match):
        attrib.replay(trained.run, 0, change, model=trained.model, loss=trained.case.loss, store=tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_a_string_is_no_number_even_if_it_looks_like_one(plain: Trained) -> None:
    with pytest.raises(errors.ReplayError, match=r"got \['3'\].*such as 0"):
        attrib.retrain(plain.run, 0, Drop(["3"]), model=plain.model, loss=plain.case.loss)


def test_a_drop_that_leaves_nothing_is_refused_before_the_replay(trained: Trained) -> None:
    with pytest.raises(errors.ReplayError, match=r"all dropped.*step 0"):
        attrib.retrain(trained.run, 0, Drop(NAMES), model=trained.model, loss=trained.case.loss)


def test_batches_beyond_the_record_are_called_by_strings(trained: Trained, tmp_path: Path) -> None:
    x, y = trained.data

    def batches(step: int) -> tuple[Any, ...]:
        return NAMES[:4], x[:4], y[:4]

    again = attrib.replay(
        trained.run, 8, Drop([NAMES[2]]), model=trained.model, loss=trained.case.loss, store=tmp_path / "again",
        until=11, batches=batches,
    )  # fmt: skip
    assert again.index(2).tolist() == [NAMES[0], NAMES[1], NAMES[3]]
    assert torch.equal(again.batch(2)[0], x[[0, 1, 3]])


def test_hooks_of_an_intervention_see_strings(trained: Trained) -> None:
    seen: list[Any] = []

    class Watch(attrib.intervention.Intervention):
        def loss(self, step: int, losses: Tensor, ids: np.ndarray) -> Tensor:
            seen.append(ids.tolist())
            return losses

    for _ in attrib.retrain(trained.run, 7, Watch(), model=trained.model, loss=trained.case.loss):
        pass
    assert seen == [named(trained.batches[s][0]) for s in (7, 8)]


# shown


def test_the_page_has_every_id_and_its_description(result: attrib.Result, large: Trained) -> None:
    for found, ids, kind in ((result, NAMES, str), (large.attribute(), LARGE, int)):
        asked: list[Any] = []

        def describe(example: Any, asked: list[Any] = asked) -> str:
            asked.append(example)
            return f"of {example}"[:300]

        page = json.loads(to_json(payload.payload(found, describe, None, None, False)))
        assert set(page["tables"][0]["ids"]) == {str(e) for e in ids}
        assert page["shown"] == {str(e): [f"of {e}"[:300], ""] for e in ids}
        assert set(asked) == set(ids)
        assert {type(e) for e in asked} == {kind}


@pytest.mark.parametrize(
    ("example", "said"),
    [
        ("doc-17", "doc-17"),
        ("", '""'),
        ('x" \n\ty', 'x" \\n\\ty'),
        ("\x1b[31mred", "\\x1b[31mred"),
        (LARGE[0], "4611686018427387905"),
        (NAMES[-1], f"corpus/{'0' * 8}...{'0' * 8}/doc-3"),
    ],
)
def test_an_id_is_said_on_one_line(example: Any, said: str) -> None:
    assert shown.said(None, example) == f"example {said}"
    assert shown.said(lambda e: "text", example) == f"{said}: text"


@pytest.mark.filterwarnings("ignore:Glyph")  # of a font
def test_figures_call_examples_by_their_ids(result: attrib.Result, large: Trained) -> None:
    for found, ids in ((result, NAMES), (large.attribute(), LARGE)):
        ax = figures.heat_map(found)
        assert {t.get_text() for t in ax.get_yticklabels()} == {figures.shortened(shown.said(None, e)) for e in ids}
        ax = figures.cumulative(found, n=12, describe=lambda e: "")
        assert {line.get_label().split("  (")[0] for line in ax.lines[2:-1]} == {
            figures.shortened(shown.said(None, e)) for e in ids
        }
        assert figures.waterfall(found, tag=str).get_yticklabels()


def test_numbers_beyond_what_a_float_holds_are_strings_in_json() -> None:
    values = [2**53 - 1, 2**53, -(2**53), 2**62 + 1, np.int64(2**62 + 1), True, 1e300]
    assert json.loads(to_json(values)) == [2**53 - 1, str(2**53), str(-(2**53)), *[str(2**62 + 1)] * 2, True, 1e300]


def test_an_article_shows_large_whole_numbers_as_they_are() -> None:
    table = pd.DataFrame({"id": LARGE[:2], "negative": [-LARGE[0], 1]}, index=pd.Index(LARGE[2:4], name="example"))
    cells = [column.cells for column in article._columns(table, 3)]
    assert cells == [[str(e) for e in LARGE[2:4]], [str(e) for e in LARGE[:2]], [f"−{LARGE[0]}", "1"]]


# read in a browser


ROWS = """() => [...document.querySelectorAll('#top tbody tr, #bottom tbody tr')].map(
    (r) => [...r.cells].map((c) => c.textContent).concat(+r.querySelector('.number').dataset.value))"""


@pytest.mark.slow  # a second or two of the browser each
@pytest.mark.parametrize("described", [True, False])
@pytest.mark.parametrize("kind", ["strings", "large numbers"])
def test_a_browser_shows_every_id(
    kind: str, described: bool, browser: Any, trained: Trained, large: Trained, tmp_path: Path
) -> None:
    from test_page import Opened

    of, ids = (trained, NAMES) if kind == "strings" else (large, LARGE)
    result = of.attribute()
    describe = (lambda e: f"[{ids.index(e)}]") if described else None
    page = Opened(browser, attrib.report.write(result, tmp_path / "report.html", describe, progress=False))
    rows = page.page.evaluate(ROWS)
    assert {row[0] for row in rows} == {str(e) or '""' for e in ids}
    if described:
        assert {row[0]: row[1] for row in rows} == {str(e) or '""': f"[{k}]" for k, e in enumerate(ids)}
    else:
        assert {row[1] for row in rows if len(row[0]) <= 24} == {
            f"example {row[0]}" for row in rows if len(row[0]) <= 24
        }
    sums = {str(e) or '""': result.by("example")[0].sel(example=e).item() for e in ids}
    for row in rows:  # float32 in the page
        assert row[-1] == pytest.approx(sums[row[0]], rel=1e-6, abs=1e-7)
    labels = page.page.evaluate("() => document.getElementById('heat').layout.yaxis.ticktext")
    assert len(set(labels)) == 12
    assert page.page.evaluate("document.documentElement.scrollWidth") <= 1280
    page.page.close()
    assert page.wrong == []


# from the shell


def printed(*arguments: str) -> str:
    with redirect_stdout(StringIO()) as out:
        assert main(list(arguments)) == 0
    return out.getvalue()


@pytest.fixture
def saved(result: attrib.Result, large: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(Path(__file__).parent)
    result.save(tmp_path / "strings")
    large.attribute().save(tmp_path / "large")
    return tmp_path


def test_top_prints_ids(saved: Path, result: attrib.Result, large: Trained) -> None:
    rows = json.loads(printed("top", str(saved / "strings"), "--setup", "setups:named", "--json"))
    assert [row["example"] for row in rows] == result.top(10)["example"].tolist()
    assert all(shown.called(row["example"]) in row["shown"] for row in rows)
    text = printed("top", str(saved / "strings"), "-n", "12")
    assert text.count("example ") == 12
    assert "example doc-17 " in text
    rows = json.loads(printed("top", str(saved / "large"), "--json"))
    assert [row["example"] for row in rows] == large.attribute().top(10)["example"].astype(str).tolist()
    assert f"example {LARGE[0]} " in printed("top", str(saved / "large"), "-n", "12")


@pytest.mark.parametrize("kind", ["strings", "large"])
def test_exported_tables_hold_the_ids(kind: str, saved: Path) -> None:
    wanted = attrib.open_result(saved / kind).to_pandas("step", "example")
    for ending in ("csv", "parquet"):
        printed("export", str(saved / kind), "-o", str(saved / f"t.{ending}"), "--axes", "step,example", "--overwrite")
    table = pd.read_parquet(saved / "t.parquet")
    pd.testing.assert_frame_equal(table, wanted, check_exact=True)
    with (saved / "t.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["example"] for row in rows] == wanted["example"].astype(str).tolist()


def test_replay_takes_strings_from_the_shell(trained: Trained, saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["replay", str(trained.run.reader.target), "--setup", "setups:named", "--start", "2", "--json"]
    given = ["--drop", "doc-17,__proto__@3:", "--drop", "@1:2@4:5", "--reweight", "nan=0.5"]
    facts = json.loads(printed(*command, "-o", str(saved / "again"), *given))
    assert facts["interventions"] == [
        {"kind": "Drop", "examples": ["doc-17", "__proto__"], "steps": [3, None]},
        {"kind": "Drop", "examples": ["@1:2"], "steps": [4, 5]},
        {"kind": "Reweight", "weights": {"nan": 0.5}, "steps": None},
    ]
    assert (
        json.loads(printed("info", str(saved / "again"), "--json"))["replay"]["interventions"] == facts["interventions"]
    )
    capsys.readouterr()
    assert main([*command, "-o", str(saved / "other"), "--drop", "doc-18"]) == 1
    assert "no such train examples: got ['doc-18']" in capsys.readouterr().err
    assert not (saved / "other").exists()


def test_an_address_among_the_ids_is_no_window(tmp_path: Path, saved: Path) -> None:
    train(tmp_path / "run", OPTIMIZERS["sgd"], called=lambda index: [f"{k}@example.com" for k in index])
    command = ["replay", str(tmp_path / "run"), "--setup", "setups:named", "-o", str(tmp_path / "again"), "--json"]
    facts = json.loads(printed(*command, "--drop", "3@example.com,4@example.com"))
    assert facts["interventions"][0]["examples"] == ["3@example.com", "4@example.com"]


def test_large_numbers_are_dropped_from_the_shell(large: Trained, saved: Path) -> None:
    command = ["replay", str(large.run.reader.target), "--setup", "setups:plain", "-o", str(saved / "again"), "--json"]
    facts = json.loads(printed(*command, "--drop", f"{LARGE[3]}"))
    assert facts["interventions"][0]["examples"] == [str(LARGE[3])]
    said = json.loads(printed("info", str(saved / "again"), "--json"))
    assert said["replay"]["interventions"] == facts["interventions"]
    run = attrib.open_run(saved / "again")
    assert run.header["replay"]["interventions"][0]["examples"] == [LARGE[3]]
    assert set(run.examples) == set(LARGE) - {LARGE[3]}
