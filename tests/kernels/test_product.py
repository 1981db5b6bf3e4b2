"""The kernel of products against sums written out in numpy, at sizes around its tiles, pairs of rows and terms."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mediator_cli.kernels.product import TILE, add_product


def summed(left, right, scale):
    """Sum term by term in float64, as the kernel must."""
    sums = np.zeros((len(left), right.shape[1]))
    for k in range(len(right)):
        sums = sums + left[:, k : k + 1] * right[k].astype(np.float64)
    return (sums * scale).reshape(-1)


def draw(rows, rank, columns, seed=0, dtype=np.float32):
    generator = np.random.default_rng(seed)
    return generator.standard_normal((rows, rank)), generator.standard_normal((rank, columns)).astype(dtype)


def add_slabs(left, right, scale, cuts, out):
    """Add a product slab by slab, each with only those rows of the left factor that it needs."""
    columns = right.shape[1]
    for start, stop in pairwise(cuts):
        row = start // columns
        add_product(left[row : -(-stop // columns)], right, scale, start - row * columns, out[start:stop])


RANKS = st.integers(1, 9) | st.sampled_from([16, 33])
COLUMNS = st.integers(1, 9) | st.sampled_from([TILE - 1, TILE, TILE + 1, 2 * TILE + 7])
DTYPES = st.sampled_from([np.float32, np.float64])


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 6), RANKS, COLUMNS, DTYPES, DTYPES, st.integers(0, 2**32))
def test_terms_are_summed_in_order_to_the_bit(rows, rank, columns, dtype, out_dtype, seed):
    left, right = draw(rows, rank, columns, seed, dtype)
    out = np.random.default_rng(seed + 1).standard_normal(rows * columns).astype(out_dtype)
    expected = out + summed(left, right, 1.7).astype(out_dtype)
    add_product(left, right, 1.7, 0, out)
    assert np.array_equal(out, expected)


@settings(max_examples=150, deadline=None)
@given(st.data(), st.integers(1, 7), RANKS, COLUMNS, st.integers(0, 2**32))
def test_slabs_change_no_bit(data, rows, rank, columns, seed):
    left, right = draw(rows, rank, columns, seed)
    # Terms that cancel out leave the rounding error of their sum, which shows in what order it was made.
    left, right = np.hstack([left, -left]), np.vstack([right, right])
    inner = data.draw(st.lists(st.integers(0, rows * columns), max_size=6))
    found = np.zeros(rows * columns, np.float32)
    add_slabs(left, right, 0.3, [0, *sorted(inner), rows * columns], found)
    expected = summed(left, right, 0.3).astype(np.float32)
    assert np.array_equal(found.view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("rank", [1, 4, 7, 8, 64, 129])
def test_a_product_is_that_of_numpy_within_its_last_bit(rank):
    left, right = draw(13, rank, 1500)
    found = np.zeros(13 * 1500, np.float32)
    add_product(left, right, 1.5, 0, found)
    exact = (1.5 * (left @ right.astype(np.float64))).reshape(-1)
    assert np.all(np.abs(found - exact) <= np.spacing(np.abs(exact).astype(np.float32)))


@pytest.mark.parametrize(
    ("rows", "rank", "columns", "size"), [(3, 0, 5, 15), (0, 4, 5, 0), (3, 4, 0, 0), (3, 4, 5, 0), (0, 0, 0, 0)]
)
def test_an_empty_product_changes_nothing(rows, rank, columns, size):
    left, right = draw(rows, rank, columns)
    out = np.arange(1, size + 1, dtype=np.float32)
    add_product(left, right, 2.0, 0, out)
    assert out.tolist() == list(range(1, size + 1))


def test_rows_beyond_the_slab_are_left_alone():
    left, right = draw(9, 3, 10)
    room = np.zeros(40, np.float32)
    add_product(left, right, 1.0, 4, room[10:33])
    expected = summed(left, right, 1.0).astype(np.float32)[4:27]
    assert np.array_equal(room[10:33], expected)
    assert not room[:10].any()
    assert not room[33:].any()


def test_what_is_too_large_becomes_infinite():
    out = np.zeros(4, np.float32)
    add_product(np.array([[1e30], [-1e30]]), np.array([[1e30, 1.0]], np.float32), 1.0, 0, out)
    assert out.tolist() == [np.inf, np.float32(1e30), -np.inf, np.float32(-1e30)]
