"""Compiled loops against slow ones that follow the formulas entry by entry."""

import numpy as np
import pytest

from mediator_cli.methods import _kernels
from mediator_cli.methods._ops import drop, drop_and_rescale, elect, kth_magnitudes, majority_block, weighted_sum
from mediator_cli.methods._ranks import keep_middle, middle_of_rows, rank_chances

TILE = _kernels.TILE
SIZES = [0, 1, 5, TILE - 1, TILE, TILE + 1, 3 * TILE + 7]
each_size = pytest.mark.parametrize("m", SIZES)
f32 = np.float32


def draw(m, n=3, seed=0, levels=None):
    """Rows [n, m] in float32; with few levels many entries are equal, opposite or zero."""
    generator = np.random.default_rng(seed)
    rows = generator.standard_normal((n, m)).astype(f32)
    return rows if levels is None else np.round(rows * levels).astype(f32)


@each_size
@pytest.mark.parametrize("n", [1, 2, 5])
def test_a_weighted_sum_runs_in_order_in_float32(m, n):
    rows, weights = draw(m, n), np.linspace(-0.7, 1.3, n)
    expected = rows[0] * f32(weights[0])
    for row, weight in zip(rows[1:], weights[1:], strict=True):
        expected = expected + row * f32(weight)
    assert np.array_equal(weighted_sum(rows, weights), expected)
    assert np.array_equal(weighted_sum(rows, weights, 3.3, 0.7), expected / f32(3.3) * f32(0.7))


def elected(column, limits, votes, weights, tie, merge, floor):
    """Elect and merge one entry [n] in float32."""
    kept = [value if abs(value) >= limit else f32(0) for value, limit in zip(column, limits, strict=True)]
    total = f32(0)
    for value, vote in zip(kept, votes, strict=True):
        total = total + value * vote
    sign = f32(tie) if total == 0 else np.sign(total)
    direction = f32(1) if sign > 0 else f32(-1)
    pairs = [(value * w * direction, w) for value, w in zip(kept, weights, strict=True)]
    agreeing = [(size, w) for size, w in pairs if size > 0]
    if merge == "max":
        return max((size for size, _ in agreeing), default=f32(0)) * sign
    amount = mass = f32(0)
    for size, w in agreeing:
        amount, mass = amount + size, mass + w
    mass = max(mass, f32(floor))
    return amount * direction / (f32(1) if merge == "sum" or mass == 0 else mass)


@each_size
@pytest.mark.parametrize("levels", [None, 1.5])
@pytest.mark.parametrize("merge", ["mean", "sum", "max"])
@pytest.mark.parametrize("tie", [-1.0, 0.0, 1.0])
def test_election_follows_the_formula(m, levels, merge, tie):
    rows = draw(m, levels=levels)
    limits, votes = np.array([0, 1, 0.5], f32), np.array([1, 0.5, -0.5], f32)
    weights = np.array([0.5, 2, 1], f32)
    for floor in (-np.inf, 0.75):
        expected = [elected(column, limits, votes, weights, tie, merge, floor) for column in rows.T]
        found = elect(rows, limits, votes, weights, tie=tie, merge=merge, floor=floor)
        assert found.dtype == f32
        assert np.array_equal(found, np.array(expected, f32))
        scaled = elect(rows, limits, votes, weights, tie=tie, merge=merge, floor=floor, factor=0.3)
        assert np.array_equal(scaled, found * f32(0.3))


def test_changes_too_small_for_a_product_still_agree():
    rows = np.array([[1e-30, -1e-30], [2e-30, 1e-38]], f32)
    assert elect(rows, None, np.ones(2), np.ones(2), merge="sum").tolist() == [f32(1e-30) + f32(2e-30), f32(-1e-30)]


def test_weights_that_cancel_divide_nothing():
    rows = np.array([[2.0], [-3.0]], f32)
    assert elect(rows, None, np.array([1.0, -1.0]), np.array([1.0, -1.0])).tolist() == [5.0]


@each_size
def test_the_majority_is_that_of_the_elected_signs(m):
    rows, limits, weights = draw(m, levels=1.5), np.array([0, 1, 2], f32), np.array([1.0, 0.5, 1.0])
    total = sum(np.where(abs(row) >= t, row, 0) * f32(w) for row, t, w in zip(rows, limits, weights, strict=True))
    assert majority_block(rows, limits, weights).tolist() == [np.sign(total).sum()]


@each_size
def test_an_entry_stays_where_its_number_lies_below_its_chance(m):
    rows, generator = draw(m), np.random.default_rng(1)
    drawn, chances = generator.random((2, 3, m), f32)
    assert np.array_equal(drop(rows, drawn, 0.4), np.where(drawn < f32(0.4), rows, 0))
    assert np.array_equal(drop(rows, drawn, chances), np.where(drawn < chances, rows, 0))
    by_chance = drop_and_rescale(rows, drawn, chances, "expected", None)
    assert np.array_equal(by_chance, np.divide(rows, chances, where=drawn < chances, out=np.zeros_like(rows)))
    np.testing.assert_allclose(
        drop_and_rescale(rows, drawn, 0.4, "expected", None), np.where(drawn < f32(0.4), rows, 0) / f32(0.4), rtol=2e-7
    )


def test_a_number_equal_to_the_chance_drops():
    rows = np.ones((1, 2), f32)
    assert drop(rows, np.array([[0.5, 0.4999]], f32), 0.5).tolist() == [[0.0, 1.0]]


@pytest.mark.parametrize("each", [False, True])
def test_norms_are_restored_row_by_row(each):
    rows, drawn = draw(2000), np.random.default_rng(1).random((3, 2000), f32)
    chances = np.full(rows.shape, 0.3, f32) if each else 0.3
    kept = drop_and_rescale(rows, drawn, chances, "l1", None)
    np.testing.assert_allclose(abs(kept).sum(axis=1), abs(rows).sum(axis=1), rtol=1e-5)
    given = np.array([[2.0, 3.0, 4.0], [1.0, 2.0, 0.0]])
    by_given = drop_and_rescale(rows, drawn, chances, "l1", given)
    assert np.array_equal(by_given, drop(rows, drawn, chances) * np.array([[2], [1.5], [1]], f32))


@each_size
def test_sums_in_float64_are_exact_enough(m):
    rows, norms = draw(m), np.empty(3)
    _kernels.magnitude_sums(rows, norms)
    np.testing.assert_allclose(norms, abs(rows.astype(np.float64)).sum(axis=1), rtol=1e-14)
    exact = (rows[0].astype(np.float64) * rows[1]).sum()
    assert _kernels.dot(rows[0], rows[1]) == pytest.approx(exact, rel=1e-12)


@each_size
@pytest.mark.parametrize("n", [2, 3, 4])
def test_variances_are_those_over_the_rows(m, n):
    rows, found = draw(m, n), np.empty(m, f32)
    rows[:, ::3] = rows[0, ::3]
    _kernels.variances(rows, found)
    assert not found[::3].any()
    np.testing.assert_allclose(found, rows.astype(np.float64).var(axis=0), rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("shape", [(2, 3, 1), (2, 3, 2), (1, 1, 4000), (3, 40, 64), (1, 0, 8), (1, 1, 0)])
@pytest.mark.parametrize("levels", [None, 2, 1e-30])
def test_chances_grow_with_the_rank_in_the_row(shape, levels):
    rows = np.random.default_rng(2).standard_normal(shape)
    rows = (rows if levels is None else np.round(rows * levels) if levels == 2 else rows * levels).astype(f32)
    length = shape[-1]
    # Equal magnitudes rank by position, as a stable sort leaves them.
    ranks = np.argsort(np.argsort(abs(rows), axis=-1, kind="stable"), axis=-1, kind="stable")
    expected = 0.6 - 0.1 + 0.2 * ranks / (length - 1) if length > 1 else np.full(shape, 0.6)
    found = rank_chances(rows, {"density": 0.6, "epsilon": 0.1})
    assert found.dtype == f32
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize(("k", "expected"), [(0, np.inf), (1, 4.0), (2, 3.0), (3, 2.0), (4, 0.0), (9, 0.0)])
def test_magnitudes_are_counted_from_the_largest(k, expected):
    assert kth_magnitudes(np.array([[1, -4, 3, 2]], f32), k).tolist() == [expected]


MIDDLE = {"density": 0.4, "gamma": 0.2, "keep": "paper"}


def test_the_middle_is_that_of_each_row_or_of_the_tensor():
    rows = np.array([[5, -4, 3, -2, 1, 50, -40, 30, -20, 10]], f32)
    by_row = {**MIDDLE, "over": "row"}
    middle = middle_of_rows(rows.reshape(1, 2, 5), by_row).reshape(1, 10)
    assert keep_middle(rows, by_row, None, None, middle).tolist() == [[0, -4, 3, 0, 0, 0, -40, 30, 0, 0]]
    assert keep_middle(rows, by_row, None, None, None).tolist() == [[5, 0, 0, 0, 0, 0, 0, 30, -20, 10]]
    by_tensor = {**MIDDLE, "over": "tensor"}
    assert keep_middle(rows, by_tensor, None, None, None).tolist() == [[5, 0, 0, 0, 0, 0, 0, 30, -20, 10]]
    given = keep_middle(rows, by_tensor, np.array([2], f32), np.array([4], f32), None)
    assert given.tolist() == [[0, -4, 3, -2, 0, 0, 0, 0, 0, 0]]


@pytest.mark.parametrize("over", ["row", "tensor"])
def test_entries_equal_to_a_limit_all_stay(over):
    rows = np.array([[9, 3, -3, 3, 2, -2, 2, 1, 0, 1]], f32)
    # Of ten the second to fifth largest stay: magnitudes 3, 3, 3 and 2, and so all that are 2.
    kept = keep_middle(rows, {"density": 0.4, "gamma": 0.1, "keep": "paper", "over": over}, None, None, None)
    assert kept.tolist() == [[0, 3, -3, 3, 2, -2, 2, 0, 0, 0]]
    # The two largest are dropped, but the second is equal to the third.
    kept = keep_middle(rows, {"density": 0.2, "gamma": 0.2, "keep": "paper", "over": over}, None, None, None)
    assert kept.tolist() == [[0, 3, -3, 3, 0, 0, 0, 0, 0, 0]]


@pytest.mark.parametrize("over", ["row", "tensor"])
@pytest.mark.parametrize("values", [[7.0], [7.0, -5.0]])
def test_tiny_tensors_lose_no_outliers(over, values):
    params = {"density": 1.0, "gamma": 0.9, "keep": "paper", "over": over}
    assert keep_middle(np.array([values], f32), params, None, None, None).tolist() == [values]


@pytest.mark.parametrize("over", ["row", "tensor"])
def test_nothing_stays_where_the_share_is_less_than_one_entry(over):
    params = {"density": 0.2, "gamma": 0.0, "keep": "paper", "over": over}
    assert not keep_middle(np.array([[7, -5, 7, 7]], f32), params, None, None, None).any()


@pytest.mark.parametrize("epsilon", [0.0, 0.2])
def test_dropping_by_rank_keeps_the_expectation(epsilon):
    row = np.array([[3, -1, 2, -4, 0.5]], f32)
    chances = rank_chances(row[:, None], {"density": 0.5, "epsilon": epsilon})[:, 0]
    many = np.repeat(row, 20_000, axis=0)
    drawn = np.random.default_rng(0).random(many.shape, f32)
    kept = drop_and_rescale(many, drawn, np.repeat(chances, len(many), axis=0), "expected", None)
    np.testing.assert_allclose(np.mean(kept != 0, axis=0), chances[0], atol=0.015)
    np.testing.assert_allclose(kept.mean(axis=0), row[0], rtol=0.05)
