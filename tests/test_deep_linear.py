"""The study of deep linear networks: its theory against plain computations, its networks against the theory."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import attrib
from attrib.studies.deep_linear import data, recipe, theory
from attrib.studies.deep_linear.claims import claims
from attrib.studies.deep_linear.recipe import SETTINGS, squared_error
from attrib.studies.deep_linear.tables import Tables
from attrib.studies.frame import Page
from attrib.studies.parts import Parts, SeedParts
from attrib.studies.verdicts import span, verdict


def test_closed_form_is_the_discrete_oracle_of_small_steps() -> None:
    s, a0, eta = 1.7, 1e-3, 1e-4
    steps = np.arange(60_001)
    np.testing.assert_allclose(theory.deep(s, a0, eta, steps), theory.discrete(s, a0, eta, 60_000), atol=s * s * eta)
    assert theory.deep(s, a0, eta, np.array([theory.half_rise(s, a0, eta)])) == pytest.approx(s / 2)
    np.testing.assert_allclose(theory.shallow(s, 0.2, eta, np.array([0, 1e9])), [0.2, s])
    assert theory.crossing(np.array([0.0, 1.0, 2.0, 3.0]), 1.5) == 1  # the update of step 1 leads to 2.0
    assert theory.crossing(np.zeros(3), 1.0) is None


def test_tree_has_the_eigenvalues_of_its_correlations() -> None:
    depth, flip = 5, 0.1
    q = (1 - 2 * flip) ** (2.0 * (depth - 1 - data.branches(depth)))  # of two leaves, by the level at which they part
    vectors = data.contrasts(depth)
    whole = np.hstack(vectors)
    np.testing.assert_allclose(whole.T @ whole, np.eye(16), atol=1e-12)
    for value, level in zip(theory.eigenvalues(depth, flip), vectors, strict=True):
        np.testing.assert_allclose(q @ level, value * level, atol=1e-12)
    np.testing.assert_allclose(theory.eigenvalues(4, 0.15), [2.4408, 1.4996, 1.0098, 0.51], atol=5e-5)


def test_tree_flips_at_every_branch_with_its_probability() -> None:
    values = data.tree(4, 0.2, 40_000, np.random.default_rng(0))
    assert values.shape == (40_000, 8)
    found = values.T @ values / len(values)
    expected = 0.6 ** (2.0 * (3 - data.branches(4)))
    np.testing.assert_allclose(found, expected, atol=5 / np.sqrt(len(values)))  # five standard errors


def test_category_has_its_signal_to_noise() -> None:
    count, size, snr = 300, 60, 2.0
    y = data.category(count, size, snr, 0.2, np.random.default_rng(0))
    p = 0.2 + np.sqrt(snr * 0.16 * count) / size
    scale = np.sqrt(count * 0.16)
    assert y[:size, :size].mean() * scale == pytest.approx(p - 0.2, abs=5 * 0.5 / size)
    assert y[size:].mean() * scale == pytest.approx(0, abs=5 * 0.4 / count)
    assert y[size:].std() == pytest.approx(1 / np.sqrt(count), rel=0.02)
    np.testing.assert_allclose(theory.overlap(np.array([0.5, 1.0, 2.0])), [0, 0, 0.5])


def test_first_thing_a_network_learns_is_the_first_mode() -> None:
    rng = np.random.default_rng(1)
    u, v = (np.linalg.qr(rng.normal(size=(n, 2)))[0] for n in (30, 20))
    y = u @ np.diag([2.0, 1.0]) @ v.T
    assert abs(recipe.first_learned(y, 2.0, rng) @ v[:, 0]) > 0.99


@pytest.mark.slow  # 700 steps, explained on two paths
def test_aligned_network_does_what_the_theory_says(tmp_path: Path) -> None:
    setting = SETTINGS["quick"]
    items, model, measurement, steps = recipe.networks(setting, 0)["aligned"]
    parts = SeedParts(Parts(tmp_path / "study", {}), 0, print)
    parts.folder.mkdir()
    recipe._explained(setting, parts, "aligned", items, model, measurement, steps)
    result = attrib.open_result(parts.folder / "aligned result.zarr")
    curves = result.curve.values
    for curve, s, half in zip(curves[:4], items.s, (194, 283, 462, 462), strict=True):
        oracle = theory.discrete(s, setting.a0, setting.eta, steps)
        np.testing.assert_allclose(curve, oracle, atol=1e-10)  # 700 steps of rounding, on values up to 2.7
        assert abs(theory.crossing(curve, s / 2) - half) <= 1
    given = result.by("example").values[:4]
    np.testing.assert_allclose(given / given.sum(1, keepdims=True), items.v.T**2, atol=1e-3)
    assert curves[4].max() == pytest.approx(0.430, abs=5e-4)
    assert int(curves[4].argmax()) - 1 == 345
    assert abs(curves[4][-1]) < 0.005
    run = attrib.open_run(parts.folder / "aligned.zarr")
    assert recipe._paths(run, model, measurement)["difference"] <= 1e-14


def test_what_is_learned_to_the_last_bit_is_not_taken_for_another_loss(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    setting = replace(SETTINGS["quick"], eta=0.1)
    items, model, asked, _ = recipe.networks(setting, 0)["aligned"]
    optimizer = torch.optim.SGD(model.parameters(), lr=setting.eta * 4)
    x, y = items.batch
    with attrib.record(optimizer, model, squared_error, tmp_path / "run") as recorder:
        for _ in range(150):  # the first mode is then known to the last bit: what items contribute to it is rounding
            recorder.zero_grad()
            squared_error(model, x, y).mean().backward()
            recorder.step(torch.arange(4), x, y)
    run = attrib.open_run(tmp_path / "run")
    result = attrib.attribute(run, model, asked, loss=squared_error, progress=False)
    assert not caplog.records
    assert result.check(1e-12).identities["batch"] < 1e-8
    attrib.attribute(run, model, asked, loss=lambda m, x, y: 1.001 * squared_error(m, x, y), progress=False)
    assert "miss the recorded gradient" in caplog.text


def test_spans_of_what_is_the_same_say_it_once() -> None:
    assert span([4, 4, 4]) == "4"
    assert span([0.101, 0.099], 1) == "0.1"
    assert verdict([]) == "depends"
    assert span([4, 4, float("nan")]) == "4 (4 to 4, 1 of 3 not reached)"


@pytest.mark.slow  # trains and explains every network of a seed
def test_tables_are_those_of_the_results(tmp_path: Path) -> None:
    setting = SETTINGS["toy"]
    parts = Parts(tmp_path / "study", {})
    with torch.random.fork_rng(devices=()):
        run = recipe.study_seed(setting, SeedParts(parts, 0, lambda text: None))
    t = Tables(setting, [run])
    grown = t.grown("random", "item")
    strength = t.strengths("random").isel(seed=0).values
    np.testing.assert_allclose(grown.sum("item").values, strength[:, 1:] - strength[:, :1], atol=1e-12)
    growth = strength[:, -1] - strength[:, 0]
    given = run["results"]["random"].by("example", "group").values[:4]
    shares = t.shares("random").sel(of="contribution", seed=0)
    np.testing.assert_allclose(shares * growth[:, None], given.sum(2), atol=1e-12)
    np.testing.assert_allclose(t.layers("random").sel(seed=0) * growth[:, None], given.sum(1), atol=1e-12)
    illusion = t.illusion().sel(network="aligned", seed=0).dropna("step").values
    found = t.deceivers(run).sum("group").cumsum("step")
    np.testing.assert_allclose(found, illusion[1:] - illusion[0], atol=1e-12)
    far = t.distances(run, 3)
    hidden = run["runs"]["tree"].parameters(3)["hidden.weight"].numpy()
    assert far[1, 4] == pytest.approx(np.sqrt(np.square(hidden[:, 1] - hidden[:, 4]).sum()))
    middle, last = (t.distances(run, int(t.looks[k]))[:4, 4:].mean() for k in (30, -1))  # halves part at the root
    assert float(t.separations()[0, 0, 30]) == pytest.approx(middle / last)
    half = t.by_level().sel(seed=0)
    assert float(half[0]) == float(t.half_rises("tree").sel(mode="mode 1", of="network", seed=0))
    held = {claim.said[:24]: claim.verdict for claim in claims(t)}
    assert (
        held["From small balanced weig"]
        == held["At depth 2 one secant is"]
        == held["A shallow network has no"]
        == "holds"
    )
    wrong = [{**run, "paths": {"difference": 1e-13}}]
    assert next(c for c in claims(Tables(setting, wrong)) if "secant" in c.said).verdict == "fails"
    page = Page("t", "l", tmp_path)
    kept = page.keep("shares", t.shares("random"))
    assert kept.dims == ("mode", "item", "seed", "of")
