"""The report in use, in a real browser: search, long texts, groups as a tree, tokens, keys."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases import OPTIMIZERS
from setups import full
from test_page import Opened, browsed
from training import Trained, train

import attrib
from attrib import measure
from attrib.report import payload, shown, write
from attrib.report.words import TOKENS

COLOURS = ("red", "green", "blue")
WINDS = ("north", "east", "south", "west")
LONG = " ".join(f"word{k}" for k in range(300))
NAMES = ["The", " cat", "\n"]
Open = Callable[..., Opened]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("use")
    return train(folder / "run", OPTIMIZERS["sgd nesterov decay"], steps=20, examples=40, batch=9)


@pytest.fixture(scope="module")
def result(trained: Trained) -> attrib.Result:
    """Three queries, one group a tensor."""
    return trained.attribute(full().measurement["log_prob"].select([0, 1, 2]))


@pytest.fixture(scope="module")
def of_tokens(result: attrib.Result) -> attrib.Result:
    """The same as if each query were a token of a text."""
    named = result.dataset.assign_coords(query_name=("query", NAMES)).assign_attrs(measurement=TOKENS)
    return attrib.Result(named)


@pytest.fixture
def opened(browser: Any, tmp_path: Path) -> Iterator[Open]:
    pages = []

    def open_page(result: attrib.Result, **options: Any) -> Opened:
        pages.append(Opened(browser, write(result, tmp_path / "report.html", progress=False, **options)))
        return pages[-1]

    yield open_page
    for page in pages:
        page.page.close()
        assert page.wrong == []


def described(example: int) -> str:
    return f"A {COLOURS[example % 3]} thing"


def expect_found(page: Opened, result: attrib.Result, ids: list[int]) -> None:
    """The tables are those of these examples alone."""
    sums = result.by("example")[0].to_series()[ids]
    for name, wanted in (("top", sums[sums > 0].nlargest(10)), ("bottom", sums[sums < 0].nsmallest(10))):
        found = page.table(name)
        assert list(found) == list(wanted.index)
        np.testing.assert_allclose(list(found.values()), wanted, rtol=1e-5, atol=1e-6)  # float32 numbers, summed
    assert f": {len(ids)} example{'' if len(ids) == 1 else 's'} found" in page.page.inner_text("#found")


@browsed
def test_search_finds_by_text_tag_and_id(opened: Open, result: attrib.Result) -> None:
    page = opened(result, describe=described, tag=lambda i: WINDS[i % 4])
    page.page.fill("#search", "RED")
    expect_found(page, result, list(range(0, 40, 3)))
    page.page.fill("#search", "thing red")
    page.page.select_option("#tag", "east")
    expect_found(page, result, [9, 21, 33])
    page.page.fill("#search", "21")
    expect_found(page, result, [21])
    page.page.select_option("#tag", "")
    page.page.fill("#search", "West")
    expect_found(page, result, [e for e in range(40) if e % 4 == 3])
    page.page.fill("#search", "yellow")
    expect_found(page, result, [])
    assert not page.page.is_visible("#heat")
    page.page.fill("#search", "")
    assert page.page.inner_text("#found") == ""
    assert list(page.table("bottom")) == list(result.by("example")[0].to_series().nsmallest(10).index)


@browsed
def test_search_says_where_it_cannot_look(opened: Open, result: attrib.Result, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(payload, "RANKS", 3)
    monkeypatch.setattr(payload, "NUMBERS", 60)
    page = opened(result, describe=described)
    page.page.fill("#search", "thing")
    found = page.page.inner_text("#found")
    assert "6 examples found" in found
    assert "Not searched: 34 examples" in found


@browsed
def test_long_text_folds_out_at_whole_words(opened: Open, result: attrib.Result) -> None:
    page = opened(result, describe=lambda i: f"No {i} {LONG}")
    cell = page.page.locator("#top .shown").first
    folded = cell.locator("span").inner_text()
    assert len(folded) < 200
    assert folded.endswith(" …")
    shown = folded.removesuffix(" …").split(maxsplit=2)[2]
    assert LONG.startswith(f"{shown} ")
    more = cell.locator("button")
    more.focus()
    page.page.keyboard.press("Enter")
    assert cell.locator("span").inner_text().endswith(LONG)
    assert more.get_attribute("aria-expanded") == "true"
    page.page.focus("#to")
    page.page.keyboard.press("ArrowLeft")  # the tables are made anew: what was unfolded stays so
    page.page.click("#whole")
    assert cell.locator("span").inner_text().endswith(LONG)
    cell.locator("button").click()
    assert cell.locator("span").inner_text() == folded


def tree(page: Opened) -> dict[str, float]:
    """Name -> what it says of the examples, of the lines that can be seen."""
    read = """() => [...document.querySelectorAll('#tree .branch:not(.head)')].filter((e) => e.checkVisibility()).map(
        (e) => [e.querySelector('.name').textContent, +e.querySelector('.number').dataset.value])"""
    found: list[tuple[str, float]] = page.page.evaluate(read)
    return dict(found)


@browsed
def test_groups_are_a_tree_that_folds_with_sums_at_each_level(opened: Open, result: attrib.Result) -> None:
    page = opened(result)
    kept = result.by("step", "group")[0]

    def expect_tree(first: int, last: int, unfolded: bool) -> None:
        sums = kept.sel(step=slice(first, last - 1)).sum("step").to_series()
        want = {"all 5 groups": sums.sum(), "embedding.weight": sums["embedding.weight"]}
        for layer in ("hidden", "output"):
            want[layer] = sums[f"{layer}.weight"] + sums[f"{layer}.bias"]
        if unfolded:
            want |= {"weight": sums["hidden.weight"], "bias": sums["hidden.bias"]}
        assert tree(page) == pytest.approx(want, rel=1e-5, abs=1e-6)  # float32 numbers, summed

    expect_tree(0, 20, unfolded=False)
    layer = page.page.locator("#tree summary").nth(1)
    layer.focus()
    page.page.keyboard.press("ArrowRight")
    expect_tree(0, 20, unfolded=True)
    page.page.focus("#from")
    page.page.keyboard.press("ArrowRight")
    expect_tree(1, 20, unfolded=True)
    layer.focus()
    page.page.keyboard.press("ArrowLeft")
    expect_tree(1, 20, unfolded=False)
    page.page.click("#unfold")
    assert page.page.locator("#tree .branch:visible").count() == 1 + 1 + 3 + 4  # its head, all, layers, tensors
    page.page.click("#fold")
    expect_tree(1, 20, unfolded=False)


@browsed
def test_tree_too_large_for_windows_is_of_all_steps_and_says_so(
    opened: Open, result: attrib.Result, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(payload, "SUMS", 400)
    monkeypatch.setattr(payload, "BARS", 2)
    page = opened(result)
    assert "Over all steps" in page.page.inner_text("#tree-said")
    whole = float(result.by("step", "group")[0].sum())
    page.page.focus("#from")
    page.page.keyboard.press("ArrowRight")
    assert tree(page)["all 5 groups"] == pytest.approx(whole, rel=1e-5, abs=1e-6)


@browsed
def test_groups_of_names_without_layers_are_no_tree(opened: Open, result: attrib.Result) -> None:
    named = attrib.Result(result.dataset.assign_coords(group=list("abcde")))
    assert not opened(named).page.is_visible("#tree-section")


def shades(page: Opened) -> list[float | None]:
    read = "() => [...document.querySelectorAll('#tokens button')].map((b) => b.dataset.value)"
    return [None if v == "null" else float(v) for v in page.page.evaluate(read)]


@browsed
def test_tokens_are_shaded_by_what_was_done_to_each(opened: Open, of_tokens: attrib.Result) -> None:
    assert measure.tokens([1, 2, 3]).name == TOKENS
    page = opened(of_tokens, describe=described)
    tokens = page.page.locator("#tokens button")
    assert tokens.all_text_contents() == ["The", " cat", "⏎"]
    change = of_tokens.final - of_tokens.initial
    np.testing.assert_allclose(shades(page), change, rtol=1e-12)
    assert [("up" if v > 0 else "down") for v in change] == [t.get_attribute("class") for t in tokens.all()]
    example = list(page.table("top"))[2]
    page.page.select_option("#token-by", str(example))
    want = of_tokens.by("example").sel(example=example)
    np.testing.assert_allclose(shades(page), want, rtol=1e-5, atol=1e-6)  # float32 numbers, summed
    assert f"contribution of {example}" in page.page.inner_text("#tokens-said")
    tokens.nth(1).click()
    assert page.page.input_value("#query") == "1"
    assert page.terms()["final"] == pytest.approx(float(of_tokens.final[1]), rel=1e-12)
    np.testing.assert_allclose(shades(page), want, rtol=1e-5, atol=1e-6)
    page.page.keyboard.press("ArrowRight")  # and the focus goes along
    assert page.page.evaluate("document.activeElement.textContent") == "⏎"
    assert [t.get_attribute("aria-pressed") for t in tokens.all()] == ["false", "false", "true"]


@browsed
def test_token_for_which_the_file_lacks_an_example_is_not_shaded(
    opened: Open, of_tokens: attrib.Result, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(payload, "RANKS", 2)
    monkeypatch.setattr(payload, "NUMBERS", 30)
    page = opened(of_tokens)
    ids = [set(t["ids"]) for t in page.page.evaluate("page.tables.map((t) => ({ ids: t.ids }))")]
    lone = next(iter(ids[0] - ids[1]))
    page.page.select_option("#token-by", lone)
    assert shades(page)[0] is not None
    assert shades(page)[1] is None
    assert "not in this file" in (page.page.locator("#tokens button").nth(1).get_attribute("title") or "")


@browsed
def test_queries_that_are_no_tokens_are_no_line_of_them(opened: Open, result: attrib.Result) -> None:
    assert not opened(result).page.is_visible("#tokens-section")


@browsed
def test_keys_choose_the_query_and_begin_a_search(opened: Open, result: attrib.Result) -> None:
    page = opened(result, describe=described)
    for key, query in (("ArrowRight", 1), ("ArrowRight", 2), ("ArrowRight", 2), ("ArrowLeft", 1)):
        page.page.keyboard.press(key)
        assert page.terms()["final"] == pytest.approx(float(result.final[query]), rel=1e-12)
        assert page.page.input_value("#query") == str(query)
    page.page.keyboard.press("/")
    page.page.keyboard.type("red/")
    assert page.page.input_value("#search") == "red/"
    page.page.keyboard.press("ArrowLeft")  # within the field
    assert page.page.input_value("#query") == "1"


def test_text_is_cut_between_words_and_longer_where_there_is_room(result: attrib.Result) -> None:
    text, _ = shown.show(lambda _: f"No {LONG}", 0)
    assert 290 < len(text) <= 300
    assert f"No {LONG}".startswith(text.removesuffix("...") + " ")
    for word, left in ((" whole", " whole"), (" broken", "")):  # the first just fits
        assert shown.show(lambda _, word=word: "a" * 291 + word + " and more", 0).text == "a" * 291 + left + "..."
    found = payload.payload(result, lambda i: LONG, lambda q: LONG, None, False)
    assert {s.text for s in found["shown"].values()} == {LONG}
    assert found["queries"][0]["shown"].text == LONG
