"""What experts share, their gates and coefficients, against naive references in float64."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mediator_cli.kernels.storage import inner_products
from mediator_cli.stages.storage import (
    agrees,
    best_directions,
    elect_task_vector,
    is_not_negative,
    is_own,
    mean_and_directions,
    rebuild,
    scale_of,
    sum_rows,
)


def rows_of(seed, n, size=500):
    """Draw deltas with many ties: quarters, zeros among them, so that sums in float32 are exact."""
    return (np.random.default_rng(seed).integers(-6, 7, (n, size)) / 4).astype(np.float32)


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_the_elected_task_vector_is_the_largest_entry_on_the_side_of_the_sum(n):
    rows = rows_of(n, n)
    expected = []
    for column in rows.T.tolist():
        side = 1 if sum(column) > 0 else -1
        expected.append(side * max([abs(x) for x in column if x * side > 0], default=0.0))
    elected = elect_task_vector(rows)
    assert elected.dtype == np.float32
    assert elected.tolist() == expected
    for row in rows:
        side = np.where(rows.astype(np.float64).sum(0) > 0, 1, -1)
        assert np.array_equal(agrees(row, elected), row * side > 0)


@pytest.mark.parametrize("factor", [0.0, 0.4, 1.0])
def test_the_mask_of_tall_asks_whether_an_entry_is_above_what_others_make_of_it(factor):
    rows = rows_of(9, 4)
    total = sum_rows(rows)
    assert total.tolist() == rows.astype(np.float64).sum(0).tolist()
    for row in rows:
        wide = row.astype(np.float64)
        others = np.abs(rows.astype(np.float64).sum(0) - wide)
        assert np.array_equal(is_own(row, total, factor), np.abs(wide) > np.float32(factor) * others)


def test_signs_count_zeros_as_positive():
    row = np.array([-1, -0.0, 0.0, 1e-45, -1e-45], np.float32)
    assert is_not_negative(row).tolist() == [False, True, True, True, False]


def test_nothing_and_empty_tensors_are_no_case_apart():
    nothing = np.zeros((3, 4), np.float32)
    assert not elect_task_vector(nothing).any()
    assert not is_own(nothing[0], sum_rows(nothing), 0.4).any()
    assert elect_task_vector(nothing[:, :0]).shape == (0,)
    assert mean_and_directions(nothing[:, :0], np.zeros((3, 1))).shape == (2, 0)
    assert scale_of(0.0, 0.0) == 1.0


@pytest.mark.parametrize("cut", [1, 7, 128, 512, 513, 2000])
def test_inner_products_are_those_of_numpy(cut):
    rows = np.random.default_rng(cut).standard_normal((3, cut)).astype(np.float32)
    np.testing.assert_allclose(inner_products(rows), rows.astype(np.float64) @ rows.astype(np.float64).T, rtol=1e-12)


def approximated(rows, count):
    coefficients = best_directions(inner_products(rows), count)
    shared = mean_and_directions(rows, coefficients)
    return np.stack([rebuild(shared, np.array([1.0, *own])) for own in coefficients]), coefficients


@settings(max_examples=30)
@given(st.integers(2, 6), st.data())
def test_no_other_directions_lose_less(n, data):
    count = data.draw(st.integers(0, n - 1))
    rows = np.random.default_rng(n).standard_normal((n, 60)).astype(np.float32)
    found, coefficients = approximated(rows, count)
    wide = rows - rows.astype(np.float64).mean(0)
    # Eckart and Young: what is lost is the squares of the singular values that are left out.
    least = np.square(np.linalg.svd(wide, compute_uv=False)[count:]).sum()
    assert np.square(found - rows.astype(np.float64)).sum() == pytest.approx(least, rel=1e-4, abs=1e-6)
    np.testing.assert_allclose(coefficients.T @ coefficients, np.eye(count), atol=1e-9)
    assert all(column[np.abs(column).argmax()] > 0 for column in coefficients.T)


def test_all_directions_give_every_expert_back():
    rows = np.random.default_rng(1).standard_normal((4, 50)).astype(np.float32)
    np.testing.assert_allclose(approximated(rows, 3)[0], rows, atol=1e-6)


def test_experts_that_are_equal_need_no_direction():
    rows = np.repeat(rows_of(3, 1), 3, axis=0)
    assert np.array_equal(approximated(rows, 0)[0], rows)
    np.testing.assert_allclose(approximated(rows, 2)[0], rows, atol=1e-6)
