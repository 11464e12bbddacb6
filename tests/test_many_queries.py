"""Many queries: products with sensitivities that are low in rank over the queries, against plain ones in float64."""

import numpy as np
import pytest
import torch
from attrib.kernels.factors import LowRank, Outer, base, lowrank
from hypothesis import given
from hypothesis import strategies as st
from test_gradients import loss, setting
from torch import Tensor

from attrib.gradients import Directions, ExampleGradients, Term

EPS = float(torch.finfo(torch.float32).eps)


def sensitivities(seed: int, queries: int, outputs: int, inputs: int, most: int, beyond: float = 0.0) -> Tensor:
    """(Q, o, i) float64: each row of a rank of its own, some of none, and of full rank times `beyond`; its columns of sizes
    between 1e-6 and 1e6, some zero; some queries without any."""
    random = np.random.default_rng(seed)
    rows = np.zeros((outputs, queries, inputs))
    for o in range(outputs):
        rank = random.integers(0, most + 1)
        rows[o] = random.standard_normal((queries, rank)) @ random.standard_normal((rank, inputs))
        rows[o] += beyond * random.standard_normal((queries, inputs))
        rows[o] *= 10.0 ** random.uniform(-6, 6, inputs) * (random.uniform(size=inputs) < 0.8)
    rows *= random.uniform(size=(queries, 1)) < 0.8
    return torch.from_numpy(rows.transpose(1, 0, 2).copy())


def factor(seed: int, count: int, positions: int, outputs: int, inputs: int, reached: float) -> Outer:
    """float32; some positions no gradient reaches."""
    random = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(count, positions, n, generator=random) for n in (outputs, inputs))
    return Outer(left * (torch.rand(count, positions, 1, generator=random) < reached), right)


def columns(directions: Tensor) -> Tensor:
    """w (o, i): sizes of the columns of each row, 1 where there is none."""
    size = directions.norm(dim=0)
    return torch.where(size > 0, size, 1.0)


@pytest.fixture
def whatever_it_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowrank, "most_pairs", lambda *sizes: 10**6)


some = st.integers(1, 9)


@pytest.mark.usefixtures("whatever_it_costs")
@given(
    seed=st.integers(0, 999),
    queries=st.integers(2, 12),
    sizes=st.tuples(some, some),
    most=st.integers(0, 4),
    beyond=st.sampled_from([0.0, 1e-10, 1e-6, 1e-3]),
)
def test_pairs_are_the_sensitivities_to_within_rounding(
    seed: int, queries: int, sizes: tuple[int, int], most: int, beyond: float
) -> None:
    outputs, inputs = sizes
    exact = sensitivities(seed, queries, outputs, inputs, most, beyond)
    found = lowrank.low_rank(exact, 1, 1, 1)
    assert found is not None
    assert not found.turned
    assert len(found.over) <= outputs * min(9 if beyond else most, queries, inputs)
    again = torch.zeros(outputs, queries, inputs, dtype=torch.float64)
    rows = torch.cat([found.rows[:0], *(found.rows[:count] for count in found.layers)]).tolist()
    for row, over, along in zip(rows, found.over.double(), found.along.double(), strict=True):
        again[row] += torch.outer(over, along)
    w = columns(exact)
    off = ((again.transpose(0, 1) - exact) / w).norm(dim=2)
    # eps / 2 is left over; both of a pair are rounded by eps / 2, and of at most 9 orthogonal ones |over| sums to three
    # times the size
    assert bool((off <= (0.5 + 3) * EPS * (exact / w).norm(dim=2)).all())


@pytest.mark.usefixtures("whatever_it_costs")
@given(
    seed=st.integers(0, 999),
    queries=st.integers(2, 12),
    count=some,
    positions=st.integers(1, 4),
    sizes=st.tuples(some, some),
    reached=st.sampled_from([0.0, 0.5, 1.0]),
    turned=st.booleans(),
)
def test_products_with_pairs_are_the_plain_ones(
    seed: int, queries: int, count: int, positions: int, sizes: tuple[int, int], reached: float, turned: bool
) -> None:
    outputs, inputs = sizes
    exact = sensitivities(seed, queries, outputs, inputs, 4)
    shares = factor(seed, count, positions, outputs, inputs, reached)
    found = lowrank.low_rank(exact, 1, 1, 1)
    assert found is not None
    left, right = shares.left.double(), shares.right.double()
    want = torch.einsum("bto,qoi,bti->qb", left, exact, right)
    w = columns(exact)
    size = torch.einsum("bto,qo,bto->qb", left.abs(), (exact / w).norm(dim=2), (right.unsqueeze(2) * w).norm(dim=3))
    if turned:  # as a weight that stands on the other side
        shares, found = Outer(shares.right, shares.left), found._replace(turned=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base, "SLICE_BYTES", 200)
        patch.setattr(lowrank, "AT_LEAST", 4)
        got = shares.contract(found)
    # what is left over and the rounding of pairs (above), of <along, a> over 9 inputs, of the product with d, and of the sum
    # over at most 36 pairs and 4 positions, which |over| of 4 orthogonal pairs a row bounds by twice the size
    assert bool(((got - want).abs() <= (2.5 + 2 * (9 + 1 + 40)) * EPS * size).all())


def test_pairs_are_of_the_columns_where_those_are_low_in_rank() -> None:
    exact = sensitivities(0, 30, 24, 20, 2)
    shares = factor(0, 400, 1, 20, 24, 1.0)
    found = shares.low_rank(exact.transpose(1, 2).contiguous(), 1)
    assert found is not None
    assert found.turned
    assert len(found.over) <= 2 * 24


def test_pairs_are_taken_only_where_they_cost_less() -> None:
    shares = factor(0, 400, 1, 24, 20, 1.0)
    low, full = sensitivities(0, 30, 24, 20, 2), torch.randn(30, 24, 20, dtype=torch.float64)
    assert shares.low_rank(low, 1) is not None
    assert shares.low_rank(full, 1) is None  # a rank of 20 takes as many products as there are
    assert shares.low_rank(low[:1], 1) is None
    few = factor(0, 4, 1, 24, 20, 1.0)
    assert few.low_rank(low, 1) is None
    assert few.low_rank(low, 100) is not None  # as one of a hundred slices


def test_pairs_are_of_float32_shares_alone() -> None:
    shares = factor(0, 400, 1, 24, 20, 1.0)
    assert Outer(shares.left.double(), shares.right.double()).low_rank(sensitivities(0, 30, 24, 20, 2), 1) is None


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_what_is_not_finite_is_never_left_out(wrong: float) -> None:
    shares, exact = factor(0, 400, 1, 24, 20, 1.0), sensitivities(0, 30, 24, 20, 2)
    exact[3, 4, 5] = wrong
    assert shares.low_rank(exact, 1) is None
    directions = Directions({"w": exact}, {"w": exact.float()}, 400)
    assert not bool(directions.contract(Term("w", shares, None))[3].isfinite().any())


@pytest.mark.usefixtures("whatever_it_costs")
def test_a_batch_is_multiplied_by_pairs_as_without_and_they_are_found_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, layout, theta, x, expected = setting("attention, batch second", 7)
    looked, used = [], []
    contract, low_rank = LowRank.contract, Outer.low_rank
    monkeypatch.setattr(LowRank, "contract", lambda self, *sides: (used.append(1), contract(self, *sides))[1])
    monkeypatch.setattr(Outer, "low_rank", lambda self, *given: (looked.append(1), low_rank(self, *given))[1])
    model.float()
    random = torch.Generator().manual_seed(0)
    weights, parts = torch.randn(5, 2, generator=random, dtype=torch.float64), []
    for _, part in layout.slices():  # two directions for five queries
        parts.append(weights @ torch.randn(2, part.stop - part.start, generator=random, dtype=torch.float64))
    directions = torch.cat(parts, 1)
    want = directions.numpy() @ expected.T
    matrices = []
    for slices in (1, None):  # examples one by one, and at once
        shares = ExampleGradients(loss, model, layout, torch.float32, slices=slices)
        shares.contract(theta.float(), (x.float(),), directions)  # assigns the sites
        looked.clear()
        used.clear()
        contracted = shares.contract(theta.float(), (x.float(),), directions)[1].sum(-1)
        np.testing.assert_allclose(contracted, want, rtol=0, atol=1e-5 * np.abs(want).max())
        matrices.append(len(looked))
        assert len(used) == len(looked) * (7 if slices else 1)
    assert matrices[0] == matrices[1] > 0
