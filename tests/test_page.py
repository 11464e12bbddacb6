"""The report in a real browser: what it shows, how it is used, what it must not do."""

import base64
import gzip
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import OPTIMIZERS
from hypothesis import given
from hypothesis import strategies as st
from setups import full
from training import Trained, train

import attrib
from attrib import errors
from attrib.report import payload, shown, write

# a second or two of the browser each: the fast tier opens the page twice, to see it whole and that text stays text
browsed = pytest.mark.slow
SETUP = full()
SHOWN = {"describe": SETUP.describe, "describe_query": SETUP.describe_query, "tag": SETUP.tag}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Forty examples, thirty steps, momentum and decay."""
    folder = tmp_path_factory.mktemp("page")
    return train(folder / "run", OPTIMIZERS["sgd nesterov decay"], steps=30, examples=40, batch=9)


@pytest.fixture(scope="module")
def result(trained: Trained) -> attrib.Result:
    return trained.attribute(SETUP.measurement["log_prob"].select([0, 1, 2]), groups=SETUP.groups)


class Opened:
    """A page that is open, and everything that went wrong in it."""

    def __init__(self, browser: Any, path: Path, width: int = 1280) -> None:
        self.page = browser.new_page(viewport={"width": width, "height": 900})
        self.wrong: list[str] = []
        self.page.on("console", lambda m: self.wrong.append(f"console: {m.text}"))
        self.page.on("pageerror", lambda e: self.wrong.append(f"error: {e}"))
        self.page.on("dialog", lambda d: (self.wrong.append(f"dialog: {d.message}"), d.dismiss()))
        self.page.on("request", lambda r: self.wrong.append(f"network: {r.url}") if r.url.startswith("http") else None)
        self.page.goto(path.as_uri())
        self.page.wait_for_selector("body[data-ready=yes]", timeout=60_000)

    def table(self, name: str) -> dict[int, float]:
        """id -> contribution, in the order of the rows."""
        read = f"""() => [...document.querySelectorAll('#{name} tbody tr')].map(
            (r) => [+r.querySelector('.id').textContent, +r.querySelector('.number').dataset.value])"""
        return {int(e): v for e, v in self.page.evaluate(read)}

    def terms(self) -> dict[str, float]:
        read = """() => [...document.querySelectorAll('#ledger tbody tr:not(.tag)')].map(
            (r) => [r.querySelector('th').textContent, +r.querySelector('.number').dataset.value])"""
        return dict(self.page.evaluate(read))

    def chart(self, name: str) -> list[dict[str, Any]]:
        """What plotly was given to draw."""
        read = f"""() => document.getElementById('{name}').data.map(
            (t) => ({{name: t.name, x: [...t.x], y: [...t.y], z: t.z && t.z.map((r) => [...r])}}))"""
        found: list[dict[str, Any]] = self.page.evaluate(read)
        return found

    def window(self) -> tuple[int, int]:
        return tuple(int(self.page.text_content(f"#{name}-step")) for name in ("from", "to"))  # type: ignore[return-value]


@pytest.fixture
def opened(browser: Any, result: attrib.Result, tmp_path: Path) -> Iterator[Opened]:
    found = Opened(browser, write(result, tmp_path / "report.html", **SHOWN))
    yield found
    found.page.close()
    assert found.wrong == []


def expect_tables(opened: Opened, result: attrib.Result, query: int, first: int, last: int) -> None:
    """The tables hold the numbers that `by` gives, all of the right examples, and nothing is missing from the sum."""
    sums = result.by("step", "example")[query].sel(step=slice(first, last - 1)).sum("step").to_series()
    tolerance = 1e-6 * float(abs(result.by("step", "example")[query]).sum())  # float32 numbers, summed
    for name, wanted in (("top", sums[sums > 0].nlargest(10)), ("bottom", sums[sums < 0].nsmallest(10))):
        found = opened.table(name)
        np.testing.assert_allclose(list(found.values()), wanted, rtol=0, atol=tolerance)
        np.testing.assert_allclose([sums[e] for e in found], wanted, rtol=0, atol=tolerance)
    listed = sum(opened.table("top").values()) + sum(opened.table("bottom").values())
    others = float(opened.page.get_attribute("#rest", "data-value"))
    np.testing.assert_allclose(listed + others, sums.sum(), rtol=0, atol=tolerance)
    layers = {trace["name"]: trace["x"] for trace in opened.chart("layers")}
    for name, kept in (("train examples", result.by("step", "group")), ("weight decay", result.decay)):
        want = kept[query].sel(step=slice(first, last - 1)).sum("step")
        np.testing.assert_allclose(layers[name], want, rtol=0, atol=tolerance)


def test_page_shows_the_ledger_and_the_whole_run(opened: Opened, result: attrib.Result) -> None:
    assert opened.terms() == pytest.approx({k: float(v[0]) for k, v in result.ledger().terms.items()}, rel=1e-12)
    classes = result.by("example")[0].groupby(result.dataset["example"] % 3).sum()
    read = "() => [...document.querySelectorAll('#ledger .tag .number')].map((c) => +c.dataset.value)"
    np.testing.assert_allclose(sorted(opened.page.evaluate(read)), sorted(classes.values), rtol=1e-12)
    expect_tables(opened, result, 0, 0, 30)
    *groups, curve = opened.chart("timeline")
    for trace, values in zip(groups, result.timeline()[0].values.T, strict=True):
        np.testing.assert_allclose(trace["y"], values, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(curve["y"], result.curve[0], rtol=1e-6)
    text = opened.page.inner_text("main")
    for word in ("batch", "step", "measurement", "SGD", "momentum 0.9", "40 train examples", "attrib 0.1.0", "torch 2"):
        assert word in text


@browsed
def test_window_by_keyboard_changes_the_tables(opened: Opened, result: attrib.Result) -> None:
    page = opened.page
    page.focus("#from")
    for _ in range(7):
        page.keyboard.press("ArrowRight")
    assert opened.window() == (7, 30)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "to"
    for _ in range(11):
        page.keyboard.press("ArrowLeft")
    assert opened.window() == (7, 19)
    expect_tables(opened, result, 0, 7, 19)
    page.keyboard.press("Home")  # never an empty window
    assert opened.window() == (0, 1)
    expect_tables(opened, result, 0, 0, 1)
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert opened.window() == (0, 30)
    expect_tables(opened, result, 0, 0, 30)


@browsed
def test_window_by_dragging_changes_the_tables(opened: Opened, result: attrib.Result) -> None:
    chart = opened.page.locator("#timeline .nsewdrag").first
    chart.scroll_into_view_if_needed()
    box = chart.bounding_box()
    across = [box["x"] + box["width"] * part for part in (10.4 / 30, 20.6 / 30)]
    middle = box["y"] + box["height"] / 2
    opened.page.mouse.move(across[0], middle)
    opened.page.mouse.down()
    opened.page.mouse.move(sum(across) / 2, middle, steps=4)
    opened.page.mouse.move(across[1], middle, steps=4)
    opened.page.mouse.up()
    opened.page.wait_for_function("document.getElementById('from-step').textContent !== '0'")
    assert opened.window() == (10, 21)  # the steps that were touched
    expect_tables(opened, result, 0, 10, 21)


@browsed
def test_query_selector_changes_everything(opened: Opened, result: attrib.Result) -> None:
    opened.page.select_option("#query", "2")
    assert opened.terms()["final"] == pytest.approx(float(result.final[2]), rel=1e-12)
    expect_tables(opened, result, 2, 0, 30)
    np.testing.assert_allclose(opened.chart("timeline")[-1]["y"], result.curve[2], rtol=1e-6)


@browsed
def test_heat_map_shows_the_examples_of_the_tables_over_the_steps(opened: Opened, result: attrib.Result) -> None:
    (trace,) = opened.chart("heat")
    chosen = [*opened.table("top"), *reversed(opened.table("bottom"))]
    want = result.by("example", "step")[0].sel(example=chosen)
    np.testing.assert_allclose(trace["z"], want, rtol=1e-6, atol=1e-7)


def test_text_from_data_stays_text(opened: Opened, result: attrib.Result) -> None:
    """Names of queries, examples, groups and tags hold <script>, <b>, <img onerror>; a dialog would be caught."""
    page = opened.page
    assert f"<script>alert({next(iter(opened.table('top')))})</script>" in page.inner_text("#top")
    assert "<script>alert(0)</script>" in page.inner_text("#question")
    assert page.evaluate("[...document.scripts].every((s) => !s.textContent.startsWith('alert'))")
    assert page.evaluate("document.querySelectorAll('main b, main i, main script, img[onerror], #query b').length") == 0
    assert "<b>sum" in page.inner_text("#query")
    assert "<i>" in page.locator("#waterfall").text_content()
    assert "rest <img src=x onerror=" in page.locator("#layers").text_content()


@browsed
def test_pictures_are_the_examples(opened: Opened) -> None:
    rows = opened.page.evaluate("[...document.querySelectorAll('#top img')].map((i) => [i.naturalWidth, i.src])")
    assert len(rows) == len(opened.table("top"))
    assert all(width == 8 and src.startswith("data:image/png;base64,") for width, src in rows)


@browsed
@pytest.mark.parametrize("width", [1280, 800])
def test_page_fits_the_screen(width: int, browser: Any, result: attrib.Result, tmp_path: Path) -> None:
    opened = Opened(browser, write(result, tmp_path / "report.html", **SHOWN), width)
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= width
    assert opened.page.screenshot(full_page=True).startswith(b"\x89PNG")
    opened.page.close()
    assert opened.wrong == []


@browsed
def test_every_control_has_a_name_and_can_be_reached(opened: Opened) -> None:
    page, reached = opened.page, []
    page.evaluate("document.activeElement.blur()")
    for _ in range(12):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id"))
    assert {"query", "from", "to", "whole"} <= set(reached)
    assert page.evaluate("[...document.querySelectorAll('select, input')].every((e) => e.labels.length === 1)")
    assert page.evaluate("[...document.querySelectorAll('.chart')].every((e) => e.getAttribute('aria-label'))")
    assert page.evaluate("[...document.querySelectorAll('table')].every((t) => t.caption)")


@browsed
def test_result_without_steps_of_examples_says_which_keep(
    browser: Any, trained: Trained, result: attrib.Result, tmp_path: Path
) -> None:
    short = trained.attribute(SETUP.measurement["log_prob"].select([0]), keep=[("example",), ("group",)])
    opened = Opened(browser, write(short, tmp_path / "report.html"))
    assert 'keep=[("step", "example"), ("step", "group")]' in opened.page.inner_text("#notices")
    assert "keep=" in opened.page.inner_text("#layers-hint")
    whole = short.by("example")[0].to_series().nlargest(10)
    found = opened.table("top")
    np.testing.assert_allclose(list(found.values()), whole[list(found)], rtol=1e-6)
    opened.page.focus("#from")
    opened.page.keyboard.press("ArrowRight")
    assert opened.table("top") == found
    opened.page.close()
    assert opened.wrong == []


@browsed
def test_numbers_that_are_not_finite_are_said(browser: Any, result: attrib.Result, tmp_path: Path) -> None:
    """log 0 early in training: the rest of the page stands."""
    dataset = result.dataset.copy(deep=True)
    dataset["initial"][0], dataset["curve"][0, 0] = -np.inf, -np.inf
    opened = Opened(browser, write(attrib.Result(dataset), tmp_path / "report.html"))
    assert "from not finite to" in opened.page.inner_text("#answer")
    expect_tables(opened, result, 0, 0, 30)
    opened.page.close()
    assert opened.wrong == []


@browsed
def test_page_that_cannot_be_shown_says_so(browser: Any, result: attrib.Result, tmp_path: Path) -> None:
    path = write(result, tmp_path / "report.html")
    text = path.read_text()
    path.write_text(re.sub(r'(id="page">)[^<]*<', r"\1AAAA<", text))
    page = browser.new_page()
    page.goto(path.as_uri())
    page.wait_for_function("document.getElementById('title').textContent !== ''")
    assert page.inner_text("#title").startswith("This page could not be shown")
    page.close()


@browsed
def test_charts_fit_the_paper(opened: Opened) -> None:
    widths = "() => [...document.querySelectorAll('.chart .main-svg')].map((s) => s.getBoundingClientRect().width)"
    before = opened.page.evaluate(widths)
    opened.page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert set(opened.page.evaluate(widths)) == {650}
    opened.page.evaluate("dispatchEvent(new Event('afterprint'))")
    opened.page.wait_for_function(f"(before) => JSON.stringify(({widths})()) === JSON.stringify(before)", arg=before)
    assert opened.page.evaluate(widths) == before


@browsed
def test_window_of_a_run_keeps_its_own_steps(browser: Any, trained: Trained, tmp_path: Path) -> None:
    short = trained.attribute(SETUP.measurement["log_prob"].select([0]), steps=slice(11, 20))
    opened = Opened(browser, write(short, tmp_path / "report.html"))
    opened.page.focus("#from")
    opened.page.keyboard.press("ArrowRight")
    assert opened.window() == (12, 20)
    expect_tables(opened, short, 0, 12, 20)
    opened.page.close()
    assert opened.wrong == []


def test_result_without_examples_is_refused(trained: Trained, tmp_path: Path) -> None:
    short = trained.attribute(keep=("step", "group"))
    with pytest.raises(errors.KeptAxesError, match=r"keep=\('example',\)"):
        write(short, tmp_path / "report.html")
    assert not list(tmp_path.iterdir())


# thinned


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits that a small result exceeds."""
    for name, value in (("RANKS", 3), ("FINE", 12), ("WINDOWS", 6), ("NUMBERS", 270), ("SERIES", 2), ("BARS", 2)):
        monkeypatch.setattr(payload, name, value)


@browsed
def test_thinned_page_says_so_and_its_tables_stay_exact(
    narrow: None, browser: Any, trained: Trained, tmp_path: Path
) -> None:
    result = trained.attribute(SETUP.measurement["log_prob"].select([0, 1, 2]))
    opened = Opened(browser, write(result, tmp_path / "report.html"))
    notices = opened.page.inner_text("#notices")
    for said in ("30 steps in bins of 3", "Windows are made of bins of", "Of 40 train examples"):
        assert said in notices
    for where in ("timeline", "bars"):
        assert f"5 groups: in the {where}, 1 that move most are apart" in notices
    names = [trace["name"] for trace in opened.chart("timeline")]
    assert names[1] == "other 4 groups"
    sums = result.by("step", "example")[0]
    seen = set()
    for _ in range(4):
        opened.page.focus("#from")
        opened.page.keyboard.press("ArrowRight")
        first, last = opened.window()
        seen.add(first)
        want = sums.sel(step=slice(first, last - 1)).sum("step").to_series()
        np.testing.assert_allclose(list(opened.table("top").values()), want[want > 0].nlargest(3), atol=1e-6)
        np.testing.assert_allclose(list(opened.table("bottom").values()), want[want < 0].nsmallest(3), atol=1e-6)
    assert len(seen) > 1
    opened.page.close()
    assert opened.wrong == []


@given(st.integers(1, 9), st.integers(25, 60), st.integers(0, 10_000))
def test_every_window_finds_its_extremes_in_the_page(bins: int, examples: int, seed: int) -> None:
    values = np.random.default_rng(seed).standard_normal((bins, examples)) ** 3
    chosen = payload._in_some_window(values, 0) if bins == 1 else payload._in_some_window(values, examples - 1)
    if chosen is None:  # nearly all are needed
        return
    for a in range(bins):
        for b in range(a + 1, bins + 1):
            order = np.argsort(values[a:b].sum(0))
            assert {*order[: payload.RANKS], *order[-payload.RANKS :]} <= set(chosen)


def test_pictures_stop_where_the_page_would_grow_too_large(
    monkeypatch: pytest.MonkeyPatch, result: attrib.Result
) -> None:
    monkeypatch.setattr(payload, "IMAGES", 1000)
    found = payload.payload(result, SETUP.describe, None, None, False)
    images = [s for s in found["shown"].values() if s.image]
    assert 0 < len(images) < 40
    assert sum(len(s.image) for s in images) <= 1000
    assert all(s.text for s in found["shown"].values())
    assert any("without their picture" in n for n in found["notices"])


def test_page_stays_small_whatever_is_said(monkeypatch: pytest.MonkeyPatch, result: attrib.Result) -> None:
    monkeypatch.setattr(payload, "TEXTS", 300)
    found = payload.payload(result, lambda e: "x" * 100, None, None, False)
    assert len(found["shown"]) == 3
    assert any("37 examples are shown without" in n for n in found["notices"])


def test_file_holds_everything_and_nothing_in_the_clear(result: attrib.Result, tmp_path: Path) -> None:
    text = write(result, tmp_path / "report.html", title="<script>alert(7)</script>", **SHOWN).read_text()
    assert "<script>alert" not in text
    assert not re.search(r"(src|href)=.https?:", text)
    packed = re.search(r'id="page">([^<]*)<', text)
    assert packed
    page = json.loads(gzip.decompress(base64.b64decode(packed[1])))
    assert page["title"] == "<script>alert(7)</script>"
    assert len(page["queries"]) == 3


# describing


@pytest.mark.parametrize(
    ("value", "size"),
    [
        (np.zeros((5, 7)), (7, 5)),
        (torch.rand(3, 5, 7), (7, 5)),
        (torch.rand(1, 5, 7, requires_grad=True), (7, 5)),
        (np.zeros((5, 7, 3), np.uint8), (7, 5)),
        (np.full((4, 4), np.nan), (4, 4)),
        (np.eye(200, dtype=bool), (96, 96)),
    ],
)
def test_images_of_many_kinds_are_shown(value: Any, size: tuple[int, int]) -> None:
    from io import BytesIO

    from PIL import Image

    text, uri = shown.show(lambda _: (value, "a word"), 0)
    assert text == "a word"
    picture = Image.open(BytesIO(base64.b64decode(uri.split(",")[1])))
    assert picture.size == size


def test_long_text_is_cut_and_what_is_no_description_is_refused() -> None:
    assert len(shown.show(lambda _: "x" * 1000, 0).text) == 300
    for value in (None, 3, np.zeros(4), np.zeros((2, 2, 5)), np.zeros((0, 4)), ("a", "b"), [1, 2]):
        with pytest.raises(errors.DescriptionError, match=r"no text and no image.*at 17"):
            shown.show(lambda _, value=value: value, 17)


# the file


def test_report_replaces_a_report_and_nothing_else(result: attrib.Result, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write(result, path)
    write(result, path)
    (tmp_path / "thesis.html").write_text("years of work")
    for place in (tmp_path / "thesis.html", tmp_path):
        with pytest.raises(errors.StoreExistsError):
            write(result, place)
    assert (tmp_path / "thesis.html").read_text() == "years of work"
    with pytest.raises(NotADirectoryError, match="no such folder"):
        write(result, tmp_path / "nowhere" / "report.html")


def test_failing_description_leaves_no_half_page(result: attrib.Result, tmp_path: Path) -> None:
    for option in ("describe", "describe_query", "tag"):
        with pytest.raises(errors.DescriptionError, match="ZeroDivisionError"):
            write(result, tmp_path / "report.html", **{option: lambda e: str(1 / 0)})
    assert not list(tmp_path.iterdir())
