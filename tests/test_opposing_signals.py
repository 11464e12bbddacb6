"""The study of opposing signals: its measures against cases by hand, its matrix exact, a planted signal found."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr

import attrib
from attrib.studies.opposing_signals import measures, recipe, setting
from attrib.studies.opposing_signals.claims import claims
from attrib.studies.opposing_signals.setting import SETTINGS
from attrib.studies.opposing_signals.tables import Tables
from attrib.studies.parts import Parts, SeedParts

TOY = SETTINGS["toy"]


def test_movement_is_that_of_the_two_groups() -> None:
    # the losses of the first two go up and down, of the next two down and up; the last one falls by 0.1
    steps = np.arange(5)[:, None]
    swing = (steps % 2) * np.array([1.0, 1.0, -0.5, -0.5, 0.0])
    losses = 3.0 + swing - 0.1 * steps * np.array([0, 0, 0, 0, 1.0])
    found = measures.movement(losses, np.array([0, 1]), np.array([2, 3]))
    assert found["data"] == 4 / 5
    assert found["gross"] == pytest.approx(3.0 / 3.1)
    assert found["correlation"] == pytest.approx(-1)
    assert found["opposite"] == found["flips"] == 1.0
    mean, size = np.abs(np.array([1.0, -1.0, 1.0, -1.0]) - 0.1), 3.1
    assert found["calm"] == pytest.approx(np.median(mean / size))
    same = measures.movement(losses, np.array([0]), np.array([1]))
    assert same["opposite"] == 0.0
    assert same["correlation"] == pytest.approx(1)


def test_controls_are_groups_of_the_same_sizes_and_the_matched_ones_are_others() -> None:
    rng = np.random.default_rng(0)
    losses = rng.normal(size=(20, 30)).cumsum(0)
    first, second, own = np.arange(3), np.arange(3, 8), rng.uniform(size=30)
    found = measures.controls(losses, first, second, own, draws=5)
    everyone = measures.controls(losses, first, second, own, draws=200)
    assert len({round(row["gross"], 12) for row in everyone["random"]}) > 100
    moved = np.zeros((5, 30))
    moved[:, :8] = rng.normal(size=(5, 8))  # the groups alone move: other groups do not
    still = measures.controls(moved, first, second, own, draws=5)
    assert all(row["gross"] == 0 for rows in still.values() for row in rows)
    assert {name: len(rows) for name, rows in found.items()} == {"random": 5, "matched in gradient norm": 5}
    assert all(row["data"] == 8 / 30 for rows in found.values() for row in rows)
    alike = measures.matched(own, np.arange(8))
    assert len(set(alike.tolist())) == 8
    assert not set(alike.tolist()) & set(range(8))
    assert measures.matched(np.array([5.0, 1.0, 4.9, 1.1, 9.0]), np.array([0, 1])).tolist() == [2, 3]
    few = measures.controls(losses, np.arange(10), np.arange(10, 20), own, draws=5)
    assert len(few["matched in gradient norm"]) == 0  # 10 others are not as many as 20


def test_unrest_counts_rises_of_the_mean() -> None:
    mean = np.array([1.0, 1.05, 0.5, 0.6, 0.2])
    found = measures.unrest(mean)
    assert found["ascent"] == pytest.approx(0.15)
    assert found["spikes"] == 1.0  # of a tenth or more


def test_what_is_recovered_is_counted_by_member_and_by_side() -> None:
    found = measures.recovered({"first": [4, 5, 9], "second": [1, 2]}, ([1, 2, 3], [4, 5, 6]))
    assert found == {"precision": 4 / 5, "recall": 4 / 6, "sides": 1.0}
    mixed = measures.recovered({"first": [1, 4], "second": [2, 5]}, ([1, 2], [4, 5]))
    assert mixed == {"precision": 1.0, "recall": 1.0, "sides": 0.5}
    assert measures.recovered({"first": [], "second": []}, ([1], [2])) == {
        "precision": 0.0,
        "recall": 0.0,
        "sides": 0.0,
    }


def test_planted_corners_are_where_they_are_said_to_be() -> None:
    x, y, (threes, eights) = setting.planted(100, 3, 7.0, 1)
    plain, labels = setting.images(100, 1)
    assert torch.equal(y, labels)
    assert y[threes].tolist() == [3] * len(threes)
    assert y[eights].tolist() == [8] * len(eights)
    marked = torch.cat([threes, eights])
    assert (x[marked, 0, :2, :2] == 7.0).all()
    left = torch.ones(100, dtype=torch.bool)
    left[marked] = False
    assert torch.equal(x[left], plain[left])
    _, shuffled = setting.images(100, 1, shuffled=True)
    assert not torch.equal(shuffled, labels)
    assert torch.equal(shuffled.sort().values, labels.sort().values)


@pytest.mark.slow  # trains to the edge of stability and explains it
def test_planted_signal_is_found_and_the_matrix_is_exact(tmp_path: Path) -> None:
    parts = SeedParts(Parts(tmp_path / "study", {}), 0, lambda text: None)
    parts.folder.mkdir()
    found = recipe._planted(TOY, parts, 10.0)
    assert found["precision"] >= 0.95
    assert found["recall"] >= 0.95
    assert found["sides"] == 1.0
    x, y, _ = setting.planted(TOY.planted_images, TOY.planted, 10.0, 0)
    run = attrib.open_run(parts.folder / "planted 10.zarr")
    told = recipe._told(run, recipe.DigitsCnn(), x, y, range(20, 26), 2, 0)
    assert float(told["gap"].max()) < 1e-5  # float32 gradients
    assert not told["left"].any()
    curve = attrib.evaluate(run, recipe.DigitsCnn(), attrib.measure.loss(x, y), [20, 24, 26], torch.float64).values
    for steps, change in (("all", curve[2] - curve[0]), ("brief", curve[2] - curve[1])):
        gross = np.abs(told[steps].values).sum(1)
        np.testing.assert_array_less(np.abs(told[steps].values.sum(1) - change), 1e-5 * gross)
    pairs = recipe.grouped(told["all"].values)["pairs"]["largest"]
    assert all(y[i] != y[j] for i, j, _ in pairs)


def seen(losses: np.ndarray, groups: list[dict[str, list[int]]], reached: bool = True) -> dict[str, Any]:
    """What the recipe gives of a run, from losses (states, N) of which the second half of the window is all."""
    matrix = xr.Dataset({"gap": ("step", [1e-7]), "left": ("step", [0.1])})
    sharp = xr.DataArray([1.0, 20.0, 21.0], {"look": [0, 10, 20]}, name="eigenvalue")
    return {
        "groups": groups, "brief": groups, "losses": losses, "half": 0, "first": 0, "last": len(losses) - 1,
        "reached": reached,
        "own": np.ones(losses.shape[1]).tolist(), "matrix": matrix, "sharpness": sharp,
        "labels": np.zeros(losses.shape[1], int),
    }  # fmt: skip


def study_of(opposed: bool, shuffled: list[dict[str, list[int]]], adam: list[dict[str, list[int]]]) -> Tables:
    """Twenty examples of which two by two swing against each other, or with each other."""
    steps, rng = np.arange(21)[:, None], np.random.default_rng(0)
    swing = np.zeros(20)
    swing[:4] = [1, 1, -1, -1] if opposed else [1, 1, 1, 1]
    losses = 5.0 + (steps % 2) * swing + 0.02 * rng.normal(size=(21, 20))
    group = [{"first": [0, 1], "second": [2, 3]}]
    names = ("untouched", "groups left out", "random left out", "matched left out", "groups down-weighted")
    calm = {name: 0.1 if name.startswith("groups") == opposed else 1.0 for name in names}
    weights = {"untouched": [], "random left out": [4, 5, 6, 7], "matched left out": [8, 9, 10, 11]}
    trials = {
        name: {"weights": {str(i): 0.0 for i in weights.get(name, range(4))}, "states": [0, 10, 20],
               "sharpness": [20.0, 20.0, 20 * calm[name]], "losses": (5.0 + calm[name] * (steps[:, 0] % 2)).tolist()}
        for name in names
    }  # fmt: skip
    rows = [{"step": 0.0, "first": 1.0, "first length": 2.0, "second": -1.0 if opposed else 1.0, "second length": 4.0}]
    planted = [{"brightness": b, "precision": float(opposed), "recall": 1.0, "sides": 1.0} for b in TOY.brightness]
    run = {
        "seed": 0, "sgd": seen(losses, group), "shuffled": seen(losses, shuffled, reached=False), "adam": seen(losses, adam),
        "projections": rows, "trials": trials, "planted": planted,
    }  # fmt: skip
    return Tables(setting.Setting(name="s", about="a", seeds=1, lr=0.1, brightness=TOY.brightness), [run])


CLAIMED = ("alternate", "opposite signs", "calmer", "less sharp", "planted signal")


def test_claims_follow_from_what_was_measured() -> None:
    for opposed, verdict in ((True, "holds"), (False, "fails")):
        made = {c.said: c.verdict for c in claims(study_of(opposed, [], []))}
        for word in CLAIMED:
            assert next(v for said, v in made.items() if word in said) == verdict, word


def test_runs_without_groups_or_short_of_the_edge_leave_a_claim_undecided() -> None:
    group = [{"first": [0, 1], "second": [2, 3]}]
    for shuffled, adam in (([], []), (group, [])):
        made = {c.said: c.verdict for c in claims(study_of(True, shuffled, adam))}
        assert next(v for said, v in made.items() if "real labels" in said) == "depends"
        assert next(v for said, v in made.items() if "Adam" in said) == "depends"
    t = study_of(True, [], [])
    t.everyone[0]["sgd"]["reached"] = False
    assert Tables(t.setting, t.everyone).failed == [0]
    assert next(c.verdict for c in claims(Tables(t.setting, t.everyone)) if "edge" in c.said) == "fails"
