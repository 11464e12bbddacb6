"""The page of the influence bench says what its files hold, and nothing that they do not."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import spearmanr

import attrib
from attrib.counterfactual.outcomes import outcomes_of, packed

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))
import influence_table as table

EXAMPLES, QUERIES, RETRAININGS = 12, 4, 20
NAME = "mlp sgd gelu"


def scores(method: str, seed: int) -> np.ndarray:
    rng = np.random.default_rng([*method.encode(), seed])
    return rng.standard_normal((QUERIES, EXAMPLES))


def subsets(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).random((RETRAININGS, EXAMPLES)) < 0.3


def measured(seed: int, weight: float | None) -> np.ndarray:
    """(retrainings, queries): what the influence says, and noise."""
    rng = np.random.default_rng(seed + 100)
    lost = 1 if weight is None else 1 - weight
    return -lost * subsets(seed) @ scores("influence", seed).T + rng.standard_normal((RETRAININGS, QUERIES))


def write(
    folder: Path, seed: int, methods: dict[str, str], weight: float | None = None, upto: int = RETRAININGS
) -> Path:
    """A seed's files, some of them in the folder of other packages; `upto` retrainings are done."""
    place = folder / NAME.replace(" ", "-") / f"seed{seed}"
    place.mkdir(parents=True, exist_ok=True)
    facts = {"machine": "an abacus", "losses": [0.25, 0.5 + seed]}
    (place / "setting.json").write_text(json.dumps(facts))
    for method, where in methods.items():
        (place / where).mkdir(exist_ok=True)
        np.savez(place / where / f"{method}.npz", scores=scores(method, seed), seconds=1.5 + seed)
    header = {
        "kind": "outcomes", "format": 1, "run": "a run", "steps": 3, "examples": list(range(EXAMPLES)),
        "changed": [packed(row) for row in subsets(seed)], "weight": [weight] * RETRAININGS, "measurement": "m",
        "units": "nats", "names": [], "dtype": "float64", "start": [0.0] * QUERIES, "base": [0.0] * QUERIES,
    }  # fmt: skip
    done = {n: row.tolist() for n, row in enumerate(measured(seed, weight)[:upto])}
    end = "" if weight is None else f"-weight{weight:g}"
    outcomes_of(header, done).save(place / f"outcomes-0.3-{RETRAININGS}{end}.jsonl")
    return place


def cells(page: str, row: str) -> list[str]:
    (line,) = [line for line in page.splitlines() if line.startswith(f"| {row} |")]
    return [c.strip() for c in line.split("|")[2:-1]]


def by_hand(method: str, seeds: range, upto: int = RETRAININGS) -> float:
    """scipy's correlation, query by query."""
    found = [
        spearmanr(-1.0 * subsets(s)[:upto] @ scores(method, s)[q], measured(s, None)[:upto, q]).statistic
        for s in seeds
        for q in range(QUERIES)
    ]
    return float(np.mean(found))


def held_by_lds(method: str, seed: int) -> float:
    """Half the interval of one seed."""
    ids = [np.flatnonzero(row) for row in subsets(seed)]
    found = attrib.lds(scores(method, seed), ids, measured(seed, None))
    return float(found["mean_high"] - found["mean_low"]) / 2


METHODS = {"influence": "own", "random": "own", "kronfluence EK-FAC": "scores"}


def test_a_cell_is_the_mean_correlation_over_queries_and_seeds_within_its_interval(tmp_path: Path) -> None:
    for seed in range(3):
        write(tmp_path, seed, METHODS)
    (found,) = table.results(tmp_path)
    page = table.page([found])
    for method in METHODS:
        cell, seconds = cells(page, table.METHODS[method])
        mean, low, high = (float(n) for n in re.findall(r"-?\d*\.\d+", cell))
        assert mean == pytest.approx(by_hand(method, range(3)), abs=0.0051)  # two digits are printed
        halves = [held_by_lds(method, seed) for seed in range(3)]
        expected = 2 * float(np.linalg.norm(halves)) / 3
        assert high - low == pytest.approx(expected, abs=0.011)  # both ends are rounded
        assert seconds == "2.5"  # the median of 1.5, 2.5, 3.5
    assert "an abacus" in page
    assert "Not run yet: mlp adamw gelu, " in page
    assert "3 seeds, 20 retrainings" in page
    assert "Loss at the end: 0.25 on what it was trained on, 1.5 on the queries" in page


def test_methods_that_did_not_run_have_no_row(tmp_path: Path) -> None:
    write(tmp_path, 0, METHODS)
    page = table.page(list(table.results(tmp_path)))
    assert [m for m in table.METHODS if f"| {table.METHODS[m]} |" in page] == [
        "influence",
        "kronfluence EK-FAC",
        "random",
    ]


def test_fewer_seeds_and_unfinished_retrainings_are_marked(tmp_path: Path) -> None:
    write(tmp_path, 0, METHODS)
    write(tmp_path, 1, {"influence": "own"})
    page = table.page(list(table.results(tmp_path)))
    assert "[1 x 20]" in cells(page, "random")[0]
    assert "[" not in cells(page, "influence")[0]
    row = cells(table.short(list(table.results(tmp_path)), (0.2, 0.3)), f"{NAME} (2)")
    expected = [table.number(by_hand(method, range(1))) for method in ("kronfluence EK-FAC", "random")]
    assert [c for c in row[1:] if c] == [f"{number} [1]" for number in expected]
    other = tmp_path / "unfinished"
    write(other, 0, METHODS, upto=9)
    (found,) = table.results(other)
    assert "9 retrainings each" in table.section(found)
    assert found.held("random", 0.3)[0].mean == pytest.approx(by_hand("random", range(1), upto=9), abs=1e-12)


def test_the_interval_narrows_as_variances_of_independent_seeds_do() -> None:
    one = table.Held(0.5, 0.2, 50)
    assert table.cell([one]) == ".50 (.30 to .70)"
    assert table.cell([one] * 4) == ".50 (.40 to .60)"
    assert table.cell([table.Held(-0.99, 0.2, 50)]) == "-.99 (-1.00 to -.79)"
    assert [table.number(v) for v in (-0.004, 0.004, 0.999, -0.04)] == [".00", ".00", "1.00", "-.04"]


def test_where_examples_weigh_less_the_derivative_itself_is_held_against_what_came(tmp_path: Path) -> None:
    place = write(tmp_path, 0, METHODS)
    write(tmp_path, 0, METHODS, weight=0.5)
    assert table.limits(list(table.results(tmp_path))) == ""  # there is no derivative to hold against it
    by = scores("influence", 0)
    np.savez(place / "influence-exact.npz", by=by, growth=np.array([7.0, 9.0, 3.0, 2.0]))
    (found,) = table.results(tmp_path)
    expected = [spearmanr(-0.5 * subsets(0) @ by[q], measured(0, 0.5)[:, q]).statistic for q in range(QUERIES)]
    assert found.weighed(0.3, 0.5)[0].mean == pytest.approx(np.mean(expected), abs=1e-12)
    assert len(cells(table.limits([found]), NAME)) == 2
    write(tmp_path, 1, METHODS)  # a seed that was not weighed does not stand beside one that was
    (both,) = table.results(tmp_path)
    assert both.weighed(0.3, None) == found.weighed(0.3, None)
    assert found.growth == 5.0  # the median of 7, 9, 3, 2


def test_a_setting_that_has_no_influence_yet_is_left_out(tmp_path: Path) -> None:
    write(tmp_path, 0, {"random": "own"})
    assert list(table.results(tmp_path)) == []
