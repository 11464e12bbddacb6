"""Figures show the numbers of the result: checked by what they draw, not by pixels."""

import sys
from itertools import pairwise
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest
import xarray as xr
from cases import OPTIMIZERS
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.axes import Axes
from training import train

import attrib
from attrib import errors
from attrib.report import extras, figures, text, thin

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))
from bench_report import make

SIZES = [(20, 6), (20, 160), (20_000, 6), (20_000, 160)]  # steps, groups


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> attrib.Result:
    trained = train(tmp_path_factory.mktemp("figures") / "run", OPTIMIZERS["sgd nesterov decay"], steps=9)
    return trained.attribute(steps=slice(2, None))  # a window: momentum is inherited


@pytest.fixture(params=SIZES, ids=str)
def result(request: pytest.FixtureRequest) -> attrib.Result:
    steps, groups = request.param
    return make(queries=2, steps=steps, examples=5, groups=groups)


@pytest.fixture(autouse=True)
def _closed() -> object:
    yield
    plt.close("all")


def bars(ax: Axes) -> list[np.ndarray]:
    """Per series of bars: (x, y, width, height) of each, (n, 4)."""
    return [np.array([[*b.get_xy(), b.get_width(), b.get_height()] for b in series]) for series in ax.containers]


def test_timeline_stacks_what_the_updates_changed(result: attrib.Result) -> None:
    ax = figures.timeline(result, 1)
    changes = result.timeline()[1]
    series = bars(ax)
    assert len(series) == min(8, changes.sizes["group"])
    assert len(series[0]) == {20: 20, 20_000: 120}[changes.sizes["update_step"]]
    starts, widths = series[0][:, 0].astype(int), series[0][:, 2].astype(int)
    for s in series:  # every step of every group is in one bar
        np.testing.assert_array_equal(s[:, 0], starts)
    total = np.array([changes.values[a : a + w].sum() for a, w in zip(starts, widths, strict=True)])
    np.testing.assert_allclose(
        sum(s[:, 3] for s in series), total, rtol=1e-9, atol=1e-12 * np.abs(changes.values).sum()
    )
    assert starts[-1] + widths[-1] == changes.sizes["update_step"]
    for b in range(len(starts)):  # stacked: the positive ones without gap from zero, and the negative ones
        for sign in (1, -1):
            pieces = [s[b] for s in series if sign * s[b, 3] > 0]
            reach = sum(sign * p[3] for p in pieces)
            np.testing.assert_allclose(max([0.0, *(sign * (p[1] + p[3]) for p in pieces)]), reach, rtol=1e-9)
    said = ax.get_ylabel()
    assert ("per step" in said) == (widths.max() == 1)
    assert widths.max() == 1 or f"per {widths.max()} steps" in said
    if changes.sizes["group"] > 8:
        assert f"other {changes.sizes['group'] - 7} groups" in [t.get_text() for t in ax.get_legend().get_texts()]


def test_measurement_itself_lies_over_the_timeline(real: attrib.Result) -> None:
    ax = figures.timeline(real, 1)
    (over,) = [a for a in ax.figure.axes if a is not ax]
    x, y = over.lines[0].get_data()
    np.testing.assert_array_equal(x, real.dataset["state"])
    np.testing.assert_array_equal(y, real.curve[1])


def test_largest_groups_keep_their_own_bars() -> None:
    values = xr.DataArray(np.diag([1.0, -9, 2, 8, 0.5]), dims=("step", "group"), coords={"group": list("abcde")})
    folded = thin.fold_groups(values, 3)
    assert list(folded["group"].values) == ["b", "d", "other 3 groups"]
    np.testing.assert_array_equal(folded.sum("group"), values.sum("group"))


@given(st.integers(1, 500), st.integers(1, 130))
def test_bins_cover_every_step_once(steps: int, most: int) -> None:
    bins = thin.bin_steps(steps, most)
    assert bins.count <= most
    assert bins.edges[0] == 0
    assert bins.edges[-1] == steps
    assert len(bins.edges) == bins.count + 1
    assert set(np.diff(bins.edges)[:-1]) <= {bins.width}  # equal, so that bars can be compared; the last may be shorter
    assert bins.width == 1 or thin.Bins(steps, bins.width - 1).count > most
    assert set(bins.merged(3).edges) <= set(bins.edges)
    values = np.arange(steps)
    np.testing.assert_array_equal(bins.sum(values, 0), [values[a:b].sum() for a, b in pairwise(bins.edges)])


def test_cumulative_ends_at_the_contributions(real: attrib.Result) -> None:
    ax = figures.cumulative(real, 1, n=3, describe=lambda e: f"nr {e}")
    by_example = real.by("example")[1].to_series()
    largest = by_example.abs().nlargest(3).index
    ends = {line.get_label().split("  (")[0]: line.get_ydata()[-1] for line in ax.lines[:-1]}
    assert set(ends) == {"all 9 other examples", "weight decay", *(f"{e}: nr {e}" for e in largest)}
    for e in largest:
        np.testing.assert_allclose(ends[f"{e}: nr {e}"], by_example[e])
    # everything but what was inherited and the residual
    change = real.final - real.initial - real.inherited.sum("group") - real.residual
    np.testing.assert_allclose(sum(ends.values()), change[1], rtol=1e-12)


def test_heat_map_holds_the_examples_that_count(result: attrib.Result) -> None:
    ax = figures.heat_map(result, 1, n=3)
    mesh = ax.collections[0]
    values = result.by("step", "example")[1]
    total = values.sum("step").to_series()
    labels = [t.get_text() for t in ax.get_yticklabels()]
    assert labels == [f"example {e}" for e in total[total.abs().nlargest(3).index].sort_values(ascending=False).index]
    array = mesh.get_array().reshape(3, -1)
    assert array.shape[1] == {20: 20, 20_000: 120}[values.sizes["step"]]
    np.testing.assert_allclose(array.sum(1), [total[int(e.split()[1])] for e in labels])
    low, high = mesh.get_clim()
    assert low == -high  # white is zero


def test_gross_is_never_less_than_net(result: attrib.Result) -> None:
    ax = figures.gross_net(result, 0)
    gross, net = (b[:, 2] for b in bars(ax))
    changes = result.timeline()[0]
    assert len(gross) == min(24, changes.sizes["group"])
    np.testing.assert_allclose(gross.sum(), np.abs(changes).sum())
    np.testing.assert_allclose(net.sum(), changes.sum(), rtol=1e-9)
    assert (gross >= np.abs(net) - 1e-9 * gross).all()


@pytest.mark.parametrize("tag", [None, lambda e: f"class {e % 3}", lambda e: e])
def test_waterfall_leads_from_the_initial_to_the_final_value(real: attrib.Result, tag: object) -> None:
    ax = figures.waterfall(real, 1, tag)
    drawn = {t.get_text(): b[0] for t, b in zip(ax.get_yticklabels(), bars(ax), strict=True)}
    terms = real.ledger().terms.isel(query=1)
    for name in ("initial", "decay", "inherited", "residual", "final"):
        np.testing.assert_allclose(
            drawn[name][2], terms[name], rtol=1e-12, atol=1e-15
        )  # an end less the other: 2 ulp of 2
    names = list(drawn)
    level = 0.0
    for name in names[:-1]:
        np.testing.assert_allclose(drawn[name][0], level, rtol=1e-12, atol=1e-14)
        level += drawn[name][2]
    np.testing.assert_allclose(level, drawn["final"][2], rtol=1e-12)
    if tag is None:
        assert names[1] == "examples"
    elif "class 0" in names:
        by_example = real.by("example")[1]
        want = by_example.values[by_example["example"].values % 3 == 0].sum()
        np.testing.assert_allclose(drawn["class 0"][2], want, rtol=1e-12)


def test_many_tags_are_folded() -> None:
    values = np.arange(40.0)
    found = thin.by_tag(values, [str(k) for k in range(40)], most=5)
    assert [name for name, _ in found] == ["39", "38", "37", "36", "other 36 tags"]
    assert sum(value for _, value in found) == values.sum()
    assert thin.by_tag(values, ["a", "b"] * 20) == [("b", values[1::2].sum()), ("a", values[::2].sum())]


def test_figures_draw_on_the_axes_they_are_given(real: attrib.Result) -> None:
    for draw in (figures.timeline, figures.cumulative, figures.heat_map, figures.gross_net, figures.waterfall):
        _, ax = plt.subplots()
        assert draw(real, ax=ax) is ax


@pytest.mark.parametrize("draw", [figures.cumulative, figures.heat_map])
def test_missing_axes_are_named_and_nothing_is_drawn(draw: object, real: attrib.Result) -> None:
    short = attrib.Result(
        real.dataset.drop_vars([v for v in real.dataset if str(v).startswith("contribution")]).assign(
            contribution_example=real.by("example")
        )
    )
    before = plt.get_fignums()
    with pytest.raises(errors.KeptAxesError, match=r"keep=\('step', 'example'\)"):
        draw(short)  # type: ignore[operator]
    assert plt.get_fignums() == before


def test_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, real: attrib.Result, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(errors.MissingExtraError, match=r"pip install 'attrib\[plot\]'"):
        figures.gross_net(real)
    with pytest.raises(errors.MissingExtraError, match=r"pip install 'attrib\[report\]'"):
        attrib.report.write(real, tmp_path / "report.html")
    assert not list(tmp_path.iterdir())
    assert extras.need("json", "plot").loads("1") == 1


def test_labels_are_text_as_it_stands(real: attrib.Result) -> None:
    """Neither hidden for an underscore, as torch.compile makes them, nor read as mathematics, nor endless."""
    names = ["_orig_mod.a", "$x$", "c" * 99, "d", "e"]
    renamed = attrib.Result(real.dataset.assign_coords(group=names))
    shown = [t.get_text() for t in figures.timeline(renamed).get_legend().get_texts()]
    assert shown == ["\u200b_orig_mod.a", r"\$x\$", "c" * 37 + "...", "d", "e", "measurement"]
    picture = np.zeros((2, 2))
    ax = figures.cumulative(real, n=2, describe=lambda e: (picture, f"_nr {e}"))
    assert sum("_nr" in t.get_text() for t in ax.get_legend().get_texts()) == 2


def test_terminal_timeline_adds_up(result: attrib.Result) -> None:
    found = text.binned(result, 1, 7)
    changes = result.timeline()[1]
    assert len(found["edges"]) == 8
    for k, values in enumerate(found["groups"].values()):
        np.testing.assert_allclose(sum(values), changes.values[:, k].sum(), rtol=1e-9)
    assert found["measurement"][-1] == float(result.final[1])
    assert len(text.timeline(result, 1, 7).splitlines()) == 9


def test_three_hundred_groups_are_printed_as_the_few_that_count() -> None:
    many, other = (make(queries=2, steps=6, examples=5, groups=300, seed=seed) for seed in (0, 1))
    head, *lines = text.timeline(many, 0, 3).splitlines()
    assert "other 293 groups" in head
    assert max(map(len, [head, *lines])) < 200
    assert len(text.binned(many, 0, 3)["groups"]) == 300  # for other programs, all
    numbers = [float(n) for n in lines[-1].split()[1:]]
    np.testing.assert_allclose(sum(numbers), float(many.timeline()[0].sum()), atol=8 * 5e-5)  # as printed
    found = attrib.report.compare(many, other)
    shown = str(found).split("net change per group\n")[1].splitlines()[1:]
    assert len(shown) == 2 * 12
    assert "other 289 groups" in shown[11]
    for column, one in ((-2, many), (-1, other)):
        total = sum(float(line.split()[column]) for line in shown[:12])
        np.testing.assert_allclose(total, float(one.timeline()[0].sum()), atol=12 * 5e-5)  # as printed
    apart = found.groups[found.groups["query"] == "0"].set_index("group").eval("abs(a - b)")
    assert set(apart.nlargest(11).index) == {line.split()[1] for line in shown[:11]}
