"""The page of a study: what stands in it, that it is all text, and that figures show the numbers they are given."""

import base64
import re
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import pytest
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from attrib import errors
from attrib.report import article, panels
from attrib.report.article import Article, Claim

EVIL = '<script>alert("1")</script>&amp;'
STEPS = np.arange(0, 100, 10)


class Read(HTMLParser):
    """Tags with their attributes, and the text of each place: headings, paragraphs, rows of cells."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.rows: list[list[str]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        self.texts.append((self.open[-1] if self.open else "", data))
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += data

    def said(self, tag: str) -> list[str]:
        return [text for name, text in self.texts if name == tag]


def axes(width: float = 9, height: float = 4) -> Axes:
    return Figure(figsize=(width, height), layout="constrained").subplots()


def draw(ax: Axes) -> None:
    """As it will be: layout, texts, legend."""
    ax.figure.draw_without_rendering()  # type: ignore[union-attr]


def array(values: Any, name: str | None = "value", **coords: Any) -> xr.DataArray:
    return xr.DataArray(np.asarray(values, dtype=float), dims=list(coords), coords=coords, name=name)


def scatter(figure: Figure) -> None:
    """Too much for vector graphics."""
    x = np.random.default_rng(0).normal(size=(2, 9000))
    figure.subplots().plot(*x, ".")


def linked(figure: Figure) -> None:
    """What matplotlib puts into the file as addresses: links, clips, hatches, pictures."""
    ax = figure.subplots()
    ax.plot([1, 2])[0].set_url("https://example.org/")
    ax.imshow(np.eye(3))
    ax.bar([1], [2], hatch="//")


def everything(title: str = "Title") -> Article:
    page = Article(title, "A lead.")
    page.section("Setup", "One.", "Two.")
    page.text("Three.")
    page.figure(linked, "What is linked.")
    page.figure(lambda f: panels.grid(f.subplots(), array([[1, np.nan]], row=[0], col=[1, 2])), "A grid.", 6, 3)
    page.figure(scatter, "Many points.", 5, 3)
    page.section("Setup", "Four.")
    page.table(pd.DataFrame(np.ones((2, 15)) / 3, columns=[f"a column {k}" for k in range(15)]), "Wide.")
    page.lines("a  1\nb  2" + "-" * 300)
    page.claims([Claim("That.", "a paper, section 4", verdict, "3 of 5") for verdict in article.VERDICTS])
    return page


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    return everything().write(tmp_path_factory.mktemp("article") / "page.html").read_text(encoding="utf-8")


def test_everything_stands_in_the_page_in_the_order_it_was_put_in(text: str) -> None:
    places = [text.index(f">{t}<") for t in ("A lead.", "One.", "Two.", "Three.", "Four.")]
    found = Read(text)
    assert places == sorted(places)
    assert found.said("h1") == found.said("title") == ["Title"]
    assert found.said("h2") == ["Setup", "Setup"]
    assert found.said("b") == ["Figure 1.", "Figure 2.", "Figure 3.", "Table 1."]
    assert found.said("pre") == ["a  1\nb  2" + "-" * 300]
    assert [r[1] for r in found.rows[-3:]] == ["✓ holds", "✗ fails", "~ depends"]
    assert found.rows[-1][::2] == ["That.a paper, section 4", "3 of 5"]


def test_contents_lead_to_the_sections(text: str) -> None:
    found = Read(text)
    links = [a["href"] for tag, a in found.tags if tag == "a" and "xlink:href" not in a][:2]
    headings = [a["id"] for tag, a in found.tags if tag == "h2"]
    assert links == [f"#{name}" for name in headings] == ["#setup", "#setup-2"]


def test_page_refers_to_nothing_outside_itself(text: str) -> None:
    found = Read(text)
    for tag, given in found.tags:
        for name, value in given.items():
            if name in ("src", "href", "xlink:href", "srcset", "action", "data", "poster"):
                assert not value or value.startswith(("#", "data:image/png")), (tag, name, value)
    assert all(address.startswith("#") for address in re.findall(r"url\(\s*['\"]?(.)", text))
    assert not re.search(r"https?:|@import|<script|<link|<iframe", text)


def test_ids_of_a_page_are_its_own_and_lead_somewhere(text: str) -> None:
    """Each figure comes with ids such as axes_1: in one page the clip of one would cut another."""
    names = re.findall(r'\bid="([^"]*)"', text)
    assert len(names) == len(set(names))
    wanted = re.findall(r'(?:href="|url\()#([^")]*)', text)
    assert {w[:3] for w in wanted} >= {"f1-", "f2-"}
    assert set(wanted) <= set(names)


def test_what_is_put_in_stays_text(tmp_path: Path) -> None:
    page = Article(EVIL, EVIL)
    page.section(EVIL, EVIL)
    page.figure(lambda f: f.subplots().set_title(EVIL), EVIL)
    page.figure(scatter, EVIL)
    index = pd.MultiIndex.from_tuples([(EVIL, 1)], names=[EVIL, "n"])
    page.table(pd.DataFrame({EVIL: [EVIL]}, index=index), EVIL)
    page.lines(EVIL)
    page.claims([Claim(EVIL, EVIL, "holds", EVIL)])
    written = page.write(tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<script" not in written
    found = Read(written)
    assert [found.said(t)[0] for t in ("title", "h1", "h2", "p", "pre", "a")] == [EVIL] * 6
    assert [said.strip() for said in found.said("figcaption")[:3]] == [EVIL] * 3
    assert found.rows[:2] == [[EVIL, "n", EVIL], [EVIL, "1", EVIL]]
    assert found.rows[3] == [EVIL + EVIL, "✓ holds", EVIL]
    assert next(a["alt"] for tag, a in found.tags if tag == "img") == EVIL
    assert next(a["aria-label"] for tag, a in found.tags if tag == "svg") == EVIL


def test_placeholders_in_texts_are_left_alone(tmp_path: Path) -> None:
    page = Article("<!--body-->", r"\1 <!--style-->")
    found = Read(page.write(tmp_path / "page.html").read_text(encoding="utf-8"))
    assert found.said("h1") == ["<!--body-->"]
    assert found.said("p") == [r"\1 <!--style-->"]


def test_figures_have_the_size_asked_for_and_their_caption_as_text(text: str) -> None:
    shown = [(tag, a) for tag, a in Read(text).tags if tag in ("svg", "img")]
    sizes = [(tag, a["width"], a["height"], a.get("alt") or a.get("aria-label")) for tag, a in shown]
    assert sizes == [
        ("svg", "864", "384", "What is linked."),
        ("svg", "576", "288", "A grid."),
        ("img", "480", "288", "Many points."),  # a picture: 2 pixels each
    ]
    assert int.from_bytes(_png(text)[16:20], "big") == 960
    assert len(text) < 700_000


def _png(text: str) -> bytes:
    return base64.b64decode(re.search(r'<img src="data:image/png;base64,([^"]*)', text)[1])  # type: ignore[index]


def test_the_same_article_is_the_same_file(tmp_path: Path, text: str) -> None:
    assert everything().write(tmp_path / "again.html").read_text(encoding="utf-8") == text


def test_a_drawing_that_fails_leaves_no_trace(tmp_path: Path) -> None:
    def fail(figure: Figure) -> None:
        figure.subplots()
        raise RuntimeError("no data")

    page, same = Article("T"), Article("T")
    size, spine = matplotlib.rcParams["font.size"], matplotlib.rcParams["axes.spines.top"]
    with pytest.raises(RuntimeError, match="no data"):
        page.figure(fail, "A caption.")
    assert (size, spine) == (matplotlib.rcParams["font.size"], matplotlib.rcParams["axes.spines.top"])
    assert not list(tmp_path.iterdir())
    for p in (page, same):
        p.figure(lambda f: f.subplots(), "Another.")
    assert page.write(tmp_path / "a.html").read_bytes() == same.write(tmp_path / "b.html").read_bytes()


def test_only_a_page_of_attrib_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    assert Article("first").write(str(path)) == path
    Article("second").write(path)
    assert "second" in path.read_text() and "first" not in path.read_text()  # noqa: PT018
    path.write_text("<html>mine")
    with pytest.raises(errors.StoreExistsError, match=re.escape(str(path))):
        Article("third").write(path)
    assert path.read_text() == "<html>mine"
    with pytest.raises(errors.StoreExistsError):
        Article("third").write(tmp_path)
    with pytest.raises(NotADirectoryError):
        Article("third").write(tmp_path / "none" / "page.html")
    assert list(tmp_path.iterdir()) == [path]


def test_a_page_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    path = Article("first").write(tmp_path / "page.html")
    before = path.read_bytes()
    page = Article("second")
    page.text("\ud800")  # half a character: not to be written as UTF-8
    with pytest.raises(UnicodeEncodeError):
        page.write(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("verdict", ["Holds", "", "true", "holds "])
def test_a_claim_has_one_of_three_verdicts(verdict: str) -> None:
    with pytest.raises(ValueError, match=f"got {verdict!r}, expected one of"):
        Claim("a", "b", verdict, "c")


def test_tables_show_numbers_as_numbers(tmp_path: Path) -> None:
    page = Article("T")
    table = pd.DataFrame(
        {
            "name": ["a", None, "c"],
            "whole": [1, -2, 3],
            "gaps": [5, np.nan, -7],  # pandas holds these as floats
            "float": [0.12345, -2.0, np.nan],
            "large": [1250.25, 3.0, np.inf],
            "small": [0.25, 0.00001, 0.0],
            "yes": [True, False, True],
            "none": [np.nan] * 3,
        }
    )
    page.table(table, "A caption.")
    page.table(table[["float"]].set_index(pd.Index([1.5, 2, 3], name="x")), "Digits.", digits=1)
    found = Read(page.write(tmp_path / "page.html").read_text(encoding="utf-8"))
    assert found.rows == [
        list(table.columns),
        ["a", "1", "5", "0.123", "1250.2", "0.250", "True", "–"],
        ["–", "−2", "–", "−2.000", "3.0", "1.00e−5", "False", "–"],
        ["c", "3", "−7", "–", "∞", "0.000", "True", "–"],
        ["x", "float"],
        ["1.5", "0.1"],
        ["2.0", "−2.0"],
        ["3.0", "–"],
    ]
    right = [a.get("class") == "number" for tag, a in found.tags if tag in ("td", "th")]
    assert right[:16] == [False, True, True, True, True, True, False, True] * 2
    assert [a["scope"] for tag, a in found.tags if tag == "th"] == ["col"] * 10 + ["row"] * 3


def test_missing_matplotlib_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(errors.MissingExtraError, match=r"pip install 'attrib\[plot\]'"):
        Article("T").figure(lambda f: None, "A caption.")


@pytest.fixture
def seeds() -> xr.DataArray:
    """(seed, split, step), with gaps."""
    values = np.random.default_rng(0).uniform(0.1, 1, size=(4, 2, 10))
    values[0, 0, 3], values[:, 1, 5], values[1, 1, 7] = np.nan, np.nan, np.inf
    return array(values, "test_loss", seed=range(4), split=["train", "_test"], step=STEPS)


def test_curves_are_medians_within_what_the_seeds_span(seeds: xr.DataArray) -> None:
    ax = axes()
    assert panels.curves(ax, seeds, "step", "split", "seed", log=True, labels={"train": "on train"}) is ax
    draw(ax)
    finite = seeds.where(np.isfinite(seeds))
    for k, (line, band) in enumerate(zip(ax.lines, ax.collections, strict=True)):
        want = finite.isel(split=k)
        np.testing.assert_array_equal(line.get_xdata(), STEPS)
        np.testing.assert_array_equal(line.get_ydata(), want.median("seed").values)
        for path in band.get_paths():
            for x, y in path.vertices:
                assert np.isclose(y, [want.sel(step=x).min(), want.sel(step=x).max()]).any()
        covered = {float(x) for path in band.get_paths() for x in path.vertices[:, 0]}
        assert covered == {float(s) for s in STEPS if np.isfinite(want.sel(step=s)).any()}
    assert len(ax.collections[1].get_paths()) == 2  # nothing is drawn across the step where no seed has a number
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["on train", "\u200b_test"]
    assert (ax.get_yscale(), ax.get_xlabel(), ax.get_ylabel()) == ("log", "step", "test loss")


def test_curves_of_one_seed_have_no_band(seeds: xr.DataArray) -> None:
    ax = panels.curves(axes(), seeds.isel(seed=2), "step", "split", legend=False)
    assert len(ax.lines) == 2
    assert not ax.collections
    assert ax.get_legend() is None
    (line,) = panels.curves(axes(), seeds.isel(seed=2, split=0), "step").lines
    np.testing.assert_array_equal(line.get_ydata(), seeds.isel(seed=2, split=0))


def test_many_curves_are_told_apart() -> None:
    ax = panels.curves(axes(), array(np.ones((20, 10)), run=range(20), step=STEPS), "step", "run")
    assert len({(line.get_color(), line.get_linestyle()) for line in ax.lines}) == 20


def test_stacked_bars_are_the_changes_and_the_line_is_the_curve() -> None:
    rng = np.random.default_rng(0)
    changes = array(rng.normal(size=(300, 10)), "change", group=range(300), update_step=range(10)).T
    changes = changes.rename(group="update_step", update_step="group")
    changes = changes.assign_coords(group=[f"g{k}" for k in range(10)], update_step=np.arange(50, 350))
    curve = array(np.arange(301.0), "logit_margin", state=np.arange(50, 351))
    ax = axes()
    assert panels.stack(ax, changes, curve) is ax
    series = [np.array([[*b.get_xy(), b.get_width(), b.get_height()] for b in s]) for s in ax.containers]
    assert len(series) == 8
    for b in range(len(series[0])):
        start, width = series[0][b, 0], series[0][b, 2]
        want = changes.sel(update_step=slice(start, start + width - 1)).sum()
        np.testing.assert_allclose(sum(s[b, 3] for s in series), want, atol=1e-12)
        for sign in (1, -1):
            pieces = [s[b] for s in series if sign * s[b, 3] > 0]
            reach = max([0.0, *(sign * (p[1] + p[3]) for p in pieces)])
            np.testing.assert_allclose(reach, sum(sign * p[3] for p in pieces), atol=1e-12)
    assert ax.get_ylabel() == "change per 3 steps"
    (other,) = [a for a in ax.figure.axes if a is not ax]
    np.testing.assert_array_equal(other.lines[0].get_data(), [curve["state"], curve])
    said = [t.get_text() for t in ax.get_legend().get_texts()]
    assert said[-2:] == ["other 3 groups", "logit margin"]
    draw(ax)
    assert ax.get_legend().get_window_extent().x0 >= other.yaxis.get_tightbbox().x1


@pytest.mark.parametrize("centre", [None, 0.0, 2.0])
def test_grid_writes_each_number_where_it_can_be_read(centre: float | None) -> None:
    values = np.array([[-3.0, 0, 1], [2, np.nan, 9]])
    ax = panels.grid(axes(), array(values, row=["a", "b"], col=[0.1, 1e-5, 3]), "{:.1f}", centre, "size")
    mesh = ax.collections[0]
    low, high = mesh.get_clim()
    assert (low, high) == ((-3, 9) if centre is None else (centre - 9 + centre, 9))
    for text in ax.texts:
        j, i = (int(p) for p in text.get_position())
        value = values[i, j]
        assert text.get_text() == ("–" if np.isnan(value) else f"{value:.1f}")
        if np.isnan(value):
            continue
        assert _contrast(mesh.cmap(mesh.norm(value)), text.get_color()) >= 4.5
    assert len(ax.texts) == values.size
    (lost,) = ax.patches
    assert (lost.get_xy(), lost.get_hatch()) == ((1, 1), "////")
    assert [t.get_text() for t in ax.get_xticklabels()] == ["0.1", "1e-5", "3"]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["a", "b"]
    assert ax.get_ylim() == (2, 0)  # the first row is on top
    if centre is not None:
        np.testing.assert_allclose(mesh.cmap(mesh.norm(centre))[:3], 1, atol=0.01)


def _contrast(a: Any, b: Any) -> float:
    def light(colour: Any) -> float:
        rgb = np.array(matplotlib.colors.to_rgb(colour))
        return float(np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722])

    low, high = sorted((light(a), light(b)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("values", [[[np.nan, np.nan]], [[5.0, 5]], [[0.0, 0]]])
@pytest.mark.parametrize("centre", [None, 0.0])
def test_grid_of_nothing_or_all_the_same_is_drawn(values: list[list[float]], centre: float | None) -> None:
    ax = panels.grid(axes(), array(values, row=[0], col=[1, 2]), centre=centre, bar=False)  # a bar would mend them
    draw(ax)
    low, high = ax.collections[0].get_clim()
    assert low < high
    assert len(ax.texts) == 2


def test_dots_show_each_seed_and_count_those_missing() -> None:
    nan = np.nan
    data = array(
        [[1, 3, 2, 9], [5, nan, 6, 7], [8, nan, nan, nan], [nan] * 4], "steps", decay=[1, 0.5, 0.1, 0], seed=range(4)
    )
    ax = panels.dots(axes(), data, reference=4, reference_label="paper")
    draw(ax)
    seen: dict[int, list[float]] = {k: [] for k in range(4)}
    middles, opened = {}, []
    for line in ax.lines:
        x, y = np.asarray(line.get_xdata(), dtype=float), np.asarray(line.get_ydata(), dtype=float)
        if line.get_marker() == "o" and line.get_markerfacecolor() == "white":
            opened.append(round(y[0]))
            assert list(x) == [1]  # of the width of the axes
        elif line.get_marker() == "o":
            for a, b in zip(x, y, strict=True):
                seen[round(b)].append(a)
        elif line.get_linestyle() == "-":
            middles[round(y.mean())] = x[0]
    assert {k: sorted(v) for k, v in seen.items()} == {0: [1, 2, 3, 9], 1: [5, 6, 7], 2: [8], 3: []}
    # missing is beyond all others: half a condition missing has no median
    assert middles == {0: 2.5, 1: 6.5}
    assert opened == [1, 2, 3]
    assert [t.get_text() for t in ax.texts] == [f"{n} of 4 not reached" for n in (1, 3, 4)]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["1", "0.5", "0.1", "0"]
    assert ax.get_ylim()[0] > ax.get_ylim()[1]  # the first condition on top
    assert [line.get_xdata()[0] for line in ax.lines if line.get_linestyle() == "--"] == [4]
    assert [t.get_text() for t in _top(ax)] == ["paper"]


def _top(ax: Axes) -> list[Any]:
    (top,) = ax.child_axes
    return list(top.get_xticklabels())


@pytest.mark.parametrize("scale", ["linear", "log"])
def test_names_of_marks_do_not_run_into_each_other_nor_into_the_title(scale: str) -> None:
    ax = panels.curves(axes(5, 3), array(np.arange(1.0, 3001), step=np.arange(1, 3001)), "step")
    ax.set_xscale(scale)
    steps = {"memorised": 900.0, "circuit forms": 1000, "cleanup": 1100, "grokked": 1200, "never": np.nan, "end": 2900}
    assert panels.marks(ax, steps) is ax
    ax.set_title("A title")
    draw(ax)
    lines = [line.get_xdata()[0] for line in ax.lines[1:]]
    assert lines == [s for s in steps.values() if np.isfinite(s)]
    texts = _top(ax)
    assert [t.get_text().strip() for t in texts] == [n for n in steps if n != "never"]
    boxes = [_box(t) for t in texts]
    assert all(not a.overlaps(b) for k, a in enumerate(boxes) for b in boxes[:k])
    title = ax.title.get_window_extent()
    assert all(not box.overlaps(title) for box in boxes)
    for box, step in zip(boxes, lines, strict=True):
        np.testing.assert_allclose((box.x0 + box.x1) / 2, ax.transData.transform((step, 1))[0], atol=2)


def _box(text: Any) -> Any:
    """Of the first of its lines, which is the name; those below are empty."""
    box, rows = text.get_window_extent(), text.get_text().count("\n") + 1
    return matplotlib.transforms.Bbox([[box.x0, box.y1 - box.height / rows + 1], [box.x1, box.y1]])


def test_bars_are_the_numbers_and_those_chosen_stand_out() -> None:
    data = array([3, -1, np.nan], "power", frequency=["a", "b", "c"])
    ax = panels.bars(axes(), data, {"b"})
    (series,) = ax.containers
    np.testing.assert_array_equal([b.get_height() for b in series], data)
    colours = [b.get_facecolor() for b in series]
    assert colours[0] == colours[2] != colours[1]
    assert [(t.get_text(), t.xy[0]) for t in ax.texts] == [("–", 2)]
    assert [t.get_text() for t in ax.get_xticklabels()] == ["a", "b", "c"]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("frequency", "power")
    with pytest.raises(ValueError, match=r"got \['d'\], expected some of \['a', 'b', 'c'\], at frequency"):
        panels.bars(axes(), data, ["d"])


CUBE = array(np.ones((2, 3, 4)), "cube", a=range(2), b=range(3), c=range(4))
WRONG: dict[str, Callable[[Axes], Any]] = {
    "curves": lambda ax: panels.curves(ax, CUBE, "a", "b"),
    "curves, another": lambda ax: panels.curves(ax, CUBE, "a", "b", "seed"),
    "stack": lambda ax: panels.stack(ax, CUBE.isel(a=0)),
    "curve": lambda ax: panels.stack(ax, CUBE.isel(a=0).rename(c="group"), CUBE.isel(a=0)),
    "grid": lambda ax: panels.grid(ax, CUBE),
    "dots": lambda ax: panels.dots(ax, CUBE),
    "bars": lambda ax: panels.bars(ax, CUBE),
    "nothing": lambda ax: panels.bars(ax, CUBE[0, 0, :0]),
}


@pytest.mark.parametrize("name", WRONG)
def test_arrays_of_another_shape_are_named(name: str) -> None:
    with pytest.raises(
        ValueError, match=r"got dimensions \(.*\) of sizes \(.*\), expected \(.*\), none empty, at cube"
    ):
        WRONG[name](axes())


def test_changes_that_are_not_finite_are_not_stacked() -> None:
    with pytest.raises(ValueError, match="got 1 that are not finite, expected none, at change"):
        panels.stack(axes(), array([[1, np.nan]], "change", step=[0], group=["a", "b"]))


def test_labels_are_not_read_as_mathematics() -> None:
    ax = panels.bars(axes(), array([1], "$x$", **{"$y$": ["$z$"]}))
    draw(ax)
    said = (ax.get_xlabel(), ax.get_ylabel(), ax.get_xticklabels()[0].get_text())
    assert said == (r"\$y\$", r"\$x\$", r"\$z\$")


@pytest.mark.slow  # a browser
@pytest.mark.parametrize("width", [1280, 800])
def test_page_opens_without_a_word_and_does_not_scroll_sideways(tmp_path: Path, width: int, browser: Any) -> None:
    path = everything("A title " + "x" * 200).write(tmp_path / "page.html")
    page = browser.new_page(viewport={"width": width, "height": 900})
    wrong: list[str] = []
    page.on("console", lambda m: wrong.append(m.text))
    page.on("pageerror", lambda e: wrong.append(str(e)))
    page.on("request", lambda r: wrong.append(r.url) if not r.url.startswith(("file:", "data:")) else None)
    page.goto(path.as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    read = "[...document.querySelectorAll('figure svg, figure img')].map((f) => f.getBoundingClientRect().toJSON())"
    boxes = page.evaluate(read)
    assert [round(b["width"]) for b in boxes] == [min(864, width - 32), 576, 480]
    assert all(b["height"] > 100 for b in boxes)
    page.click("nav a >> nth=1")
    assert page.evaluate("document.querySelector(':target').textContent") == "Setup"
    assert wrong == []


def test_ratios_are_coloured_by_their_logarithm() -> None:
    data = xr.DataArray([[0.5, 1.0], [2.0, np.nan]], dims=("down", "across"))
    ax = axes()
    panels.grid(ax, data, "{:.1f}", ratio=True)
    mesh = ax.collections[0]
    np.testing.assert_allclose(np.ma.filled(mesh.get_array(), np.nan), np.log(data.values))
    assert mesh.get_clim() == pytest.approx((-np.log(2), np.log(2)))
    assert [t.get_text() for t in ax.texts] == ["0.5", "1.0", "2.0", "–"]
