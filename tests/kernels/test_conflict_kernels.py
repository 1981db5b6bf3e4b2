"""The kernels of conflict against numpy on whole arrays, at sizes around their tiles, lanes and words."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mediator_cli.kernels.conflict import count_bits, count_blocks, sum_moments
from mediator_cli.kernels.lanes import LANES, TILE, aligned, total


def reference(deltas, means, limits):
    """Count as the definition says, with matrices of 0 and 1."""
    kept = np.abs(deltas - means[:, None]) > limits[:, None]
    up, down = (kept & (deltas > 0)).astype(np.int64), (kept & (deltas < 0)).astype(np.int64)
    used, wide = up + down, deltas.astype(np.float64)
    crossed = up @ down.T
    tables = np.concatenate([(crossed + crossed.T).ravel(), (used @ used.T).ravel()])
    scalars = [(up.any(axis=0) & down.any(axis=0)).sum(), (used.sum(axis=0) >= 2).sum()]
    return np.concatenate([tables, used.sum(axis=1), scalars]), wide @ wide.T


def counted(deltas, means, limits, block):
    n, m = deltas.shape
    out = np.full((-(-m // block), 3 * n * n + n + 2), np.nan)
    count_blocks(deltas, means, limits, block, out)
    return np.concatenate([out[:, : 2 * n * n], out[:, 3 * n * n :]], axis=1), out[:, 2 * n * n : 3 * n * n]


def check(deltas, means, limits, block):
    n = len(deltas)
    counts, grams = counted(deltas, means, limits, block)
    for b, (found, gram) in enumerate(zip(counts, grams, strict=True)):
        part = deltas[:, b * block : (b + 1) * block]
        expected, products = reference(part, means, limits)
        assert found.tolist() == expected.tolist()
        scale = np.sqrt(np.outer(np.diag(products), np.diag(products)))
        assert np.all(np.abs(gram.reshape(n, n) - products) <= 1e-13 * scale)
        assert np.array_equal(gram.reshape(n, n), gram.reshape(n, n).T)


SIZES = st.integers(1, 8) | st.sampled_from([31, 32, 33, 63, 64, 65, TILE - 1, TILE, TILE + 1, 2 * TILE + 7, 3000])


@settings(max_examples=150)
@given(st.integers(1, 8), SIZES, SIZES, st.integers(0, 2**32), st.sampled_from([0.0, 0.5, 1.5]), st.booleans())
def test_counts_are_those_of_numpy(n, m, block, seed, limit, is_coarse):
    generator = np.random.default_rng(seed)
    deltas = generator.standard_normal((n, m)).astype(np.float32)
    if is_coarse:
        deltas = np.round(deltas * 2) / 2
    means = generator.choice([0.0, 0.1, -0.5], n).astype(np.float32)
    check(deltas, means, np.full(n, limit, np.float32), block)


@pytest.mark.parametrize("n", [2, 9, 64])
def test_counts_of_many_experts(n):
    deltas = np.random.default_rng(n).standard_normal((n, 1500)).astype(np.float32)
    check(deltas, np.zeros(n, np.float32), np.full(n, 0.7, np.float32), 1024)


def test_counts_of_whole_blocks():
    deltas = np.random.default_rng(0).standard_normal((4, 2 * 32768 + 100)).astype(np.float32)
    check(deltas, np.zeros(4, np.float32), np.ones(4, np.float32), 32768)


def test_counts_do_not_depend_on_the_slab():
    deltas = np.random.default_rng(1).standard_normal((3, 5000)).astype(np.float32)
    zeros = np.zeros(3, np.float32)
    whole = np.concatenate(counted(deltas, zeros, zeros, 1000), axis=1)
    slabs = [np.ascontiguousarray(deltas[:, at : at + 2000]) for at in (0, 2000, 4000)]
    parts = [np.concatenate(counted(slab, zeros, zeros, 1000), axis=1) for slab in slabs]
    assert np.array_equal(whole, np.concatenate(parts))


def test_zeros_of_both_signs_are_in_no_count():
    deltas = np.array([[0.0, -0.0, 1.0], [-1.0, 1.0, -0.0]], np.float32)
    counts, _ = counted(deltas, np.zeros(2, np.float32), np.full(2, -1.0, np.float32), 8)
    assert counts[0].tolist() == [0, 0, 0, 0, 1, 0, 0, 2, 1, 2, 0, 0]


def test_the_smallest_numbers_have_signs():
    deltas = np.array([[1e-45, -1e-45], [-1e-45, -1e-45]], np.float32)
    counts, _ = counted(deltas, np.zeros(2, np.float32), np.zeros(2, np.float32), 8)
    assert counts[0].tolist() == [0, 1, 1, 0, 2, 2, 2, 2, 2, 2, 1, 2]


@given(st.integers(0, 2**32 - 1))
def test_bits_are_counted(word):
    assert count_bits(np.uint32(word)) == word.bit_count()


@settings(max_examples=100)
@given(st.integers(1, 4), SIZES, SIZES, st.integers(0, 2**32))
def test_moments_are_those_of_numpy(n, m, block, seed):
    deltas = np.random.default_rng(seed).standard_normal((n, m)).astype(np.float32)
    out = np.full((-(-m // block), 2, n), np.nan)
    sum_moments(deltas, block, out)
    for b, (first, second) in enumerate(out):
        part = deltas[:, b * block : (b + 1) * block].astype(np.float64)
        np.testing.assert_allclose(first, part.sum(axis=1), rtol=0, atol=1e-13 * m)
        np.testing.assert_allclose(second, (part**2).sum(axis=1), rtol=1e-13)


def test_sums_are_of_fixed_lanes():
    """The order of additions is part of the result: written out here, to the bit."""
    deltas = np.random.default_rng(2).standard_normal((2, 1300)).astype(np.float32)
    wide = np.zeros((2, 3 * TILE))
    wide[:, :1300] = deltas
    tiles = wide.reshape(2, 3, 4, LANES)

    def lanes_of(values):
        sums = np.zeros(LANES)
        for a, b, c, d in values:
            sums += (a + b) + (c + d)
        while len(sums) > 1:
            sums = sums[: len(sums) // 2] + sums[len(sums) // 2 :]
        return sums[0]

    _, grams = counted(deltas, np.zeros(2, np.float32), np.zeros(2, np.float32), 2048)
    assert grams[0, 1] == lanes_of(tiles[0] * tiles[1])
    sum_moments(deltas, 2048, out := np.empty((1, 2, 2)))
    assert out[0].tolist() == [[lanes_of(t) for t in tiles], [lanes_of(t * t) for t in tiles]]


def test_an_aligned_array_starts_on_a_cache_line():
    arrays = [aligned(size) for size in (1, 7, 8, 1000)]
    assert [len(array) for array in arrays] == [1, 7, 8, 1000]
    assert all(array.ctypes.data % 64 == 0 for array in arrays)
    assert total(np.arange(8.0)) == 28.0
