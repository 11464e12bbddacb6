"""Figures, the page and tables know a remainder where there is one."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from test_page import Opened
from test_remainder import Recorded, noise

import attrib
from attrib.report import figures, write


@pytest.fixture(scope="module")
def result() -> attrib.Result:
    """With both kinds: an eighth of what the gradients hold, on the clock of the updates."""
    found = Recorded(noise).attribute().dataset
    clock = {"step": "update_step"}
    rest = (found["remainder"] / 8).swap_dims(clock).drop_vars("step").assign_coords(update_step=found["update_step"])
    return attrib.Result(found.assign(update_remainder=rest, remainder=found["remainder"] * 7 / 8))


def lengths(ax: Axes) -> dict[str, float]:
    """Name -> length, of bars that lie."""
    names = [t.get_text() for t in ax.get_yticklabels()]
    return dict(zip(names, [patch.get_width() for patch in ax.patches], strict=True))


def test_the_waterfall_has_all_terms(result: attrib.Result) -> None:
    drawn = lengths(figures.waterfall(result, 1))
    assert list(drawn)[1:-1] == ["examples", "decay", "inherited", "remainder", "update remainder", "residual"]
    moves = [value for name, value in drawn.items() if name != "final"]
    np.testing.assert_allclose(sum(moves), drawn["final"], rtol=1e-12)


def test_running_sums_end_at_all_but_what_updates_hold(result: attrib.Result) -> None:
    ax = figures.cumulative(result, 1, n=3)
    ends = {line.get_label().split("  (")[0]: line.get_ydata()[-1] for line in ax.lines[:-1]}
    np.testing.assert_allclose(ends["remainder"], result.remainder[1].sum(), rtol=1e-12)
    change = result.final - result.initial - result.update_remainder.sum(("update_step", "group"))
    np.testing.assert_allclose(sum(ends.values()), change[1], rtol=1e-12)


def test_the_page_shows_it_in_ledger_and_groups(result: attrib.Result, browser: Any, tmp_path: Path) -> None:
    opened = Opened(browser, write(result, tmp_path / "report.html", progress=False))
    terms = {name.replace("_", " "): float(v[0]) for name, v in result.ledger().terms.items()}
    assert opened.terms() == pytest.approx(terms, rel=1e-12)
    assert list(opened.terms()) == list(terms)
    layers = {trace["name"]: trace["x"] for trace in opened.chart("layers")}
    want = result.remainder[0].sum("step").values
    np.testing.assert_allclose(layers["remainder"], want, rtol=0, atol=1e-6 * np.abs(want).sum())  # float32 numbers
    columns = opened.page.eval_on_selector_all("#layers-table thead th", "all => all.map((c) => c.textContent)")
    assert columns == ["group", "train examples", "weight decay", "remainder"]
    assert "of the gross" in opened.page.inner_text("#identities")
    opened.page.close()
    assert opened.wrong == []


def test_a_notebook_shows_the_names_of_the_terms(result: attrib.Result) -> None:
    shown = result._repr_html_()
    assert "<th>update remainder</th>" in shown
    assert "<p>remainder: " in shown
