"""Pure kernels against plain numpy."""

import numpy as np
import pytest
import torch
from attrib.kernels.contraction import COMPILED, contract_rows, nonzero_rows, row_dots
from attrib.kernels.hashing import combine, hash_rows
from attrib.kernels.keys import SMALLEST, KeyTable
from attrib.kernels.recurrence import Coefficients, Matrix
from hypothesis import given
from hypothesis import strategies as st


@given(
    q=st.integers(1, 12),
    b=st.integers(1, 9),
    sizes=st.lists(st.integers(0, 7), min_size=1, max_size=4),
    seed=st.integers(0, 9),
)
def test_contraction_is_the_sum_over_each_tensor(q: int, b: int, sizes: list[int], seed: int) -> None:
    random = np.random.default_rng(seed)
    bounds = np.cumsum([0, *sizes])
    u = random.normal(size=(q, bounds[-1]))
    g = random.normal(size=(b, bounds[-1])).astype(np.float32)
    want = np.zeros((q, b, len(sizes)))
    for k in range(len(sizes)):
        want[:, :, k] = u[:, bounds[k] : bounds[k + 1]] @ g[:, bounds[k] : bounds[k + 1]].astype(np.float64).T
    np.testing.assert_allclose(contract_rows(u, g, bounds), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("width", [5000, COMPILED // 3 + 1])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_row_dots_accumulate_in_float64(dtype: type, width: int) -> None:
    random = np.random.default_rng(0)
    a, b = random.normal(size=(2, 3, width)).astype(dtype)
    want = (a.astype(np.float64) * b.astype(np.float64)).sum(1)
    # float32 accumulation would be off by about 1e-5
    np.testing.assert_allclose(row_dots(a, b), want, rtol=1e-11, atol=1e-11)


@given(seed=st.integers(0, 10**6), width=st.integers(1, 9))
def test_rows_are_nonzero_where_any_of_their_numbers_is(seed: int, width: int) -> None:
    random = np.random.default_rng(seed)
    rows = random.normal(size=(40, width)).astype(np.float32) * (random.random(size=(40, width)) < 0.1)
    want = [any(v != 0 for v in row) for row in rows.tolist()]
    assert nonzero_rows(rows).tolist() == want


@given(seed=st.integers(0, 10**6), width=st.integers(1, 20), kind=st.sampled_from(["f4", "f8", "i8", "u1"]))
def test_rows_hash_alike_exactly_when_their_bytes_are_alike(seed: int, width: int, kind: str) -> None:
    random = np.random.default_rng(seed)
    rows = random.integers(0, 3, size=(30, width)).astype(kind)
    same = (rows[:, None] == rows[None]).all(-1)
    hashes = hash_rows(rows)
    np.testing.assert_array_equal(hashes[:, None] == hashes[None], same)


def test_sign_bits_alone_make_different_hashes() -> None:
    """Words that differ in their top bit only, twice: a plain multiply-and-add hash would cancel them."""
    rows = np.array([[1.0, 2.0], [-1.0, -2.0]])
    assert len(set(hash_rows(rows).tolist())) == 2


def test_combined_hashes_depend_on_the_order() -> None:
    a, b = hash_rows(np.arange(4)), hash_rows(np.arange(4) + 7)
    assert (combine(a, b) != combine(b, a)).all()


def rows_by_dict(known: dict[int, int], keys: list[int], start: int) -> tuple[list[int], list[int]]:
    """What `KeyTable.rows` gives, by a dict that is changed alike."""
    rows, first = [], []
    for place, key in enumerate(keys):
        if key not in known:
            known[key] = start + len(first)
            first.append(place)
        rows.append(known[key])
    return rows, first


few = st.integers(0, 12)  # that come again, within a batch and later
collide = st.sampled_from([0, SMALLEST, 1 << 63, SMALLEST - 1, 2 * SMALLEST - 1, 2**64 - 1])  # first and last slot
many = st.integers(0, 2**64 - 1)


@given(batches=st.lists(st.lists(few | collide | many, max_size=20), max_size=8), skipped=st.integers(0, 5))
def test_a_key_table_gives_the_rows_of_a_dict(batches: list[list[int]], skipped: int) -> None:
    table, known, start = KeyTable(), {}, 0
    for keys in batches:
        want_rows, want_first = rows_by_dict(known, keys, start)
        rows, first = table.rows(np.array(keys, np.uint64), start)
        assert (rows.tolist(), first.tolist(), len(table)) == (want_rows, want_first, len(known))
        start += len(first) + skipped  # rows need not follow each other: a chunk of the store begins


@given(seed=st.integers(0, 10**6), batch=st.integers(1, 4 * SMALLEST))
def test_a_key_table_that_grows_forgets_no_key(seed: int, batch: int) -> None:
    keys = np.random.default_rng(seed).integers(0, 2**64, 5 * SMALLEST, dtype=np.uint64)
    table = KeyTable()
    rows = [table.rows(keys[lo : lo + batch], lo)[0] for lo in range(0, len(keys), batch)]
    np.testing.assert_array_equal(np.concatenate(rows), np.arange(len(keys)))
    again, new = table.rows(keys, len(keys))
    np.testing.assert_array_equal(again, np.arange(len(keys)))
    assert not len(new)


@given(seed=st.integers(0, 10**6), vectors=st.booleans())
def test_the_transpose_of_a_step_is_its_exact_adjoint(seed: int, vectors: bool) -> None:
    """Small integers in float64: nothing is rounded, and the two sides are equal."""
    random = torch.Generator().manual_seed(seed)

    def whole(*shape: int) -> torch.Tensor:
        return torch.randint(-9, 10, shape, generator=random).double()

    names = ("keep", "feed", "apply_old", "apply_new")
    values = {name: whole(7) if vectors else float(whole()) for name in names}
    step = Coefficients(**values, coupled=float(whole()), decoupled=float(whole()))
    momentum, gradient, theta, to_momentum, to_update = whole(5, 7)
    update, after = step.apply(momentum, gradient, theta)
    to_gradient, to_earlier = step.transpose(to_momentum, to_update)
    decay = step.coupled * (to_gradient @ theta) - step.decoupled * (to_update @ theta)
    assert to_update @ update + to_momentum @ after == to_gradient @ gradient + to_earlier @ momentum + decay


@given(seed=st.integers(0, 10**6), from_right=st.booleans())
def test_the_transpose_of_a_step_through_a_matrix_is_its_exact_adjoint(seed: int, from_right: bool) -> None:
    """A map that is not symmetric, of 2 x 3 matrices, and a decay that is coupled entry by entry."""
    random = torch.Generator().manual_seed(seed)

    def whole(*shape: int) -> torch.Tensor:
        return torch.randint(-9, 10, shape, generator=random).double()

    size = 3 if from_right else 2
    matrix = Matrix(factor=whole(size, size), shape=(2, 3), from_right=from_right, along=whole(6), rise=whole(6))
    numbers = {name: float(whole()) for name in ("keep", "feed", "apply_old", "apply_new", "decoupled")}
    step = Coefficients(**numbers, coupled=whole(6), matrix=matrix)
    momentum, gradient, theta, to_momentum, to_update = whole(5, 6)
    update, after = step.apply(momentum, gradient, theta)
    (to_gradient,), (to_earlier,) = step.transpose(to_momentum[None], to_update[None])
    decay = to_gradient @ (step.coupled * theta) - step.decoupled * (to_update @ theta)
    assert to_update @ update + to_momentum @ after == to_gradient @ gradient + to_earlier @ momentum + decay
    x = momentum.view(2, 3)
    product = x @ matrix.factor if from_right else matrix.factor @ x
    assert torch.equal(matrix.apply(momentum), product.flatten() + (matrix.along @ momentum) * matrix.rise)
    moved = step.to(torch.device("meta"))
    assert moved.matrix is not None
    assert moved.matrix.factor.is_meta
    assert moved.matrix.rise.is_meta


def test_a_step_moves_to_a_device_as_a_new_one() -> None:
    step = Coefficients(keep=0.5, feed=torch.ones(3), apply_old=torch.ones(3), apply_new=1.0, decoupled=0.1)
    moved = step.to(torch.device("meta"))
    assert isinstance(moved.feed, torch.Tensor)
    assert isinstance(moved.apply_old, torch.Tensor)
    assert moved.feed.is_meta
    assert moved.apply_old.is_meta
    assert (moved.keep, moved.apply_new, moved.coupled, moved.decoupled) == (0.5, 1.0, 0.0, 0.1)
    assert step.feed.device.type == "cpu"
