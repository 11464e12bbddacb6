"""Opposing pairs and groups of matrices made by hand."""

import itertools

import numpy as np
import pytest
from attrib.kernels.opposition import help_between, opposing_groups, opposing_pairs
from hypothesis import given
from hypothesis import strategies as st


def planted(first: int, second: int, rest: int, size: float = 3.0, noise: float = 0.1, seed: int = 0) -> np.ndarray:
    """S of gradients along one direction, +size for the first, -size for the second, and noise in others."""
    rng = np.random.default_rng(seed)
    count = first + second + rest
    along = np.concatenate([np.full(first, size), np.full(second, -size), np.zeros(rest)])
    gradients = np.column_stack([along, noise * rng.normal(size=(count, 20))])
    return gradients @ gradients.T


def test_pairs_oppose_where_each_helps_itself_and_harms_the_other() -> None:
    contributions = np.array(
        [[-4.0, 1.0, -1.0, 3.0], [3.0, -1.0, -2.0, 3.0], [3.0, -2.0, -1.0, 0.0], [1.0, 1.0, 0.0, 2.0]]
    )
    found = help_between(contributions)
    assert found[0].tolist() == [4.0, -2.0, -1.0, -2.0]
    scores = opposing_pairs(contributions)
    assert scores[0, 2] == 0  # only one of them harms the other
    assert scores[0, 1] == scores[1, 0] == 2 / np.sqrt(4 * 1)
    assert scores[1, 2] == 0  # they help each other
    assert not scores[3].any()  # it harms itself


@pytest.mark.parametrize("sides", [(5, 5), (3, 8), (1, 1)])
def test_planted_groups_are_found_and_come_first(sides: tuple[int, int]) -> None:
    first, second = sides
    found = opposing_groups(planted(first, second, 40), 3)[0]
    assert {frozenset(found.first), frozenset(found.second)} == {
        frozenset(range(first)), frozenset(range(first, first + second))
    }  # fmt: skip
    whole = 9.0 * (first + second)
    assert found.strength == pytest.approx(whole, rel=0.1)
    assert found.opposition == pytest.approx(4 * first * second / (first + second) ** 2, rel=0.1)


def test_weaker_groups_follow_and_share_no_member() -> None:
    one, two = planted(4, 4, 30, 5.0), planted(4, 4, 30, 3.0, seed=1)
    both = one + np.roll(np.roll(two, 10, 0), 10, 1)
    found = opposing_groups(both, 2)
    assert set(found[0].members) == set(range(8))
    assert set(found[1].members) == set(range(10, 18))
    assert found[0].strength > found[1].strength


def test_where_all_help_each_other_there_are_no_groups() -> None:
    assert opposing_groups(np.ones((6, 6)) + np.eye(6), 2) == []
    assert opposing_groups(np.zeros((4, 4)), 1) == []
    assert opposing_groups(np.ones((1, 1)), 1) == []


@given(seed=st.integers(0, 10**6), n=st.integers(3, 7))
def test_strength_and_opposition_are_those_of_the_sides_and_no_better_than_the_best(seed: int, n: int) -> None:
    gradients = np.random.default_rng(seed).normal(size=(n, 3))
    help_ = gradients @ gradients.T
    found = opposing_groups(help_, 1)
    best = max(
        (np.array(x) @ help_ @ np.array(x)) / np.abs(x).sum() for x in itertools.product([-1, 0, 1], repeat=n) if any(x)
    )
    for group in found:
        x = np.zeros(n)
        x[group.first], x[group.second] = 1, -1
        assert group.strength == pytest.approx(x @ help_ @ x / (x @ x))
        assert group.strength <= best * (1 + 1e-12)
        harm = -help_[np.ix_(group.first, group.second)].sum()
        assert group.opposition == pytest.approx(4 * harm / (x @ help_ @ x))
        assert group.opposition >= 0.5
