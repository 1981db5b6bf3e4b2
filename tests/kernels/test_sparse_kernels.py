"""The kernels of sparse experts against numpy and the codec."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mediator_cli.bundle.sparse import decode_gaps, encode_gaps
from mediator_cli.kernels.floats import narrow_bf16, widen_bf16
from mediator_cli.kernels.lanes import TILE
from mediator_cli.kernels.sparse import (
    add_kept,
    count_gap_bytes,
    find_differing,
    find_kept,
    gather,
    give_steps,
    mask_largest,
    mask_random,
    square_sums,
    subtract_bf16,
    take_signs,
    take_steps,
    write_gaps,
)

SIZES = st.integers(0, 20) | st.sampled_from([TILE - 1, TILE, TILE + 1, 2 * TILE, 3 * TILE + 5, 5 * TILE + 8])


@st.composite
def masks(draw):
    m, share = draw(SIZES), draw(st.sampled_from([0.0, 0.003, 0.1, 0.5, 1.0]))
    return np.random.default_rng(draw(st.integers(0, 2**32))).random(m) < share


def places_of(mask):
    return np.flatnonzero(mask).astype(np.uint32)


def normal(m, seed=0):
    return np.random.default_rng(seed).standard_normal(m).astype(np.float32)


@settings(max_examples=150)
@given(st.integers(1, 3000), st.integers(0, 2**32), st.data())
def test_exactly_the_count_is_kept_with_ties(m, seed, data):
    delta = np.round(normal(m, seed) * 3) / 4
    count = data.draw(st.integers(0, m))
    ranked = np.sort(np.abs(delta))[::-1]
    threshold = float(ranked[count - 1]) if count else float("inf")
    n_ties = count - np.count_nonzero(np.abs(delta) > threshold)
    used = mask_largest(delta, threshold, n_ties, mask := np.ones(m, np.bool_))
    assert mask.sum() == min(count, np.count_nonzero(delta))
    assert used == (n_ties if threshold > 0 else 0)
    dropped, kept = np.abs(delta[~mask]), np.abs(delta[mask])
    assert dropped.max(initial=0) <= kept.min(initial=np.inf)
    first = np.flatnonzero(np.abs(delta) == np.float32(threshold))[:used]
    assert mask[first].all()


def test_ties_are_kept_in_order_across_tiles():
    delta = np.ones(5 * TILE, np.float32)
    for n_ties in (0, 1, TILE, 2 * TILE + 3, 5 * TILE):
        assert mask_largest(delta, 1.0, n_ties, mask := np.ones(len(delta), np.bool_)) == n_ties
        assert np.array_equal(mask, np.arange(len(delta)) < n_ties)


def test_the_first_of_equal_entries_are_kept():
    delta, mask = np.array([2.0, -3.0, -2.0, 2.0, 1.0], np.float32), np.empty(5, np.bool_)
    assert mask_largest(delta, 2.0, 2, mask) == 2
    assert mask.tolist() == [True, True, True, False, False]
    assert mask_largest(delta, 2.0, 0, mask) == 0
    assert mask.tolist() == [False, True, False, False, False]


def test_zeros_are_never_kept():
    mask = np.empty(3, np.bool_)
    assert mask_largest(np.array([0.0, -0.0, 1.0], np.float32), 0.0, 3, mask) == 0
    assert mask.tolist() == [False, False, True]
    mask_random(np.array([0.0, -0.0, 1.0], np.float32), np.zeros(3, np.float32), 0.5, mask)
    assert mask.tolist() == [False, False, True]


def test_random_entries_are_kept_below_the_density():
    uniforms, mask = np.array([0.0, 0.29, 0.3, 0.9], np.float32), np.empty(4, np.bool_)
    mask_random(np.ones(4, np.float32), uniforms, 0.3, mask)
    assert mask.tolist() == [True, True, False, False]


@settings(max_examples=150)
@given(masks())
def test_places_are_those_of_kept_entries_in_order(mask):
    count = int(mask.sum())
    room = np.full(count + 3, 7, np.uint32)
    assert find_kept(mask, room[: count + 1]) == count
    assert np.array_equal(room[:count], np.flatnonzero(mask))
    assert room[count + 1 :].tolist() == [7, 7]


@settings(max_examples=150)
@given(masks(), st.integers(0, 2**40), st.integers(0, 2000))
def test_gaps_are_those_of_the_codec(mask, position, lead):
    first = position + lead
    codes = encode_gaps(np.flatnonzero(mask) + first, position)
    n_bytes, behind = count_gap_bytes(places_of(mask), first, position)
    assert n_bytes == len(codes)
    assert behind == (first + np.flatnonzero(mask)[-1] + 1 if mask.any() else position)
    out = np.full(n_bytes + 1, 7, np.uint8)
    assert write_gaps(places_of(mask), first, position, out) == (n_bytes, behind)
    assert np.array_equal(out[:-1], codes)
    assert out[-1] == 7


@settings(max_examples=100)
@given(masks(), st.lists(st.integers(0, 2000), max_size=4))
def test_gaps_of_slabs_join_to_those_of_the_whole(mask, cuts):
    position, written = 0, []
    places = sorted({0, len(mask), *(cut for cut in cuts if cut < len(mask))})
    for start, stop in pairwise(places):
        kept = places_of(mask[start:stop])
        out = np.empty(count_gap_bytes(kept, start, position)[0], np.uint8)
        _, position = write_gaps(kept, start, position, out)
        written.append(out)
    joined = np.concatenate([np.empty(0, np.uint8), *written])
    assert np.array_equal(joined, encode_gaps(np.flatnonzero(mask), 0))
    assert np.array_equal(decode_gaps(joined), np.flatnonzero(mask))


@settings(max_examples=100)
@given(masks(), st.sampled_from([1.0, 4.0, 0.3, 2.5]))
def test_kept_values_are_gathered_in_order(mask, factor):
    delta = normal(len(mask))
    n = int(mask.sum())
    out = np.full(n + 3, 7.0, np.float32)
    gather(delta, places_of(mask), factor, out)
    assert np.array_equal(out[:n], delta[mask] * np.float32(factor))
    assert (out[n:] == 7.0).all()


@settings(max_examples=100)
@given(SIZES, st.integers(0, 2**32))
def test_a_difference_is_that_of_rounded_values(m, seed):
    values, dense, rounded, base = normal(m, seed), np.empty(m, np.uint16), *np.empty((2, m), np.float32)
    values[::5] = 0.0
    values[1::7] = 1 + 2.0**-8
    narrow_bf16(values, dense)
    widen_bf16(dense, rounded)
    narrow_bf16(normal(m, seed + 1), dense)
    widen_bf16(dense, base)
    subtract_bf16(values, dense, out := np.empty(m, np.float32))
    assert np.array_equal(out.view(np.uint32), (rounded - base).view(np.uint32))


@pytest.mark.parametrize("scale", [0.1, 1e39])
def test_signs_are_plus_or_minus_the_scale(scale):
    take_signs(np.array([True, False, True]), scale, out := np.empty(3, np.float32))
    expected = np.float32(0.1) if scale == 0.1 else np.float32(np.inf)
    assert out.tolist() == [expected, -expected, expected]


def test_steps_are_rounded_to_even_and_bounded():
    values = np.array([0.25, 0.75, -0.25, 0.3, 1e30, -1e30, 63.5], np.float32)
    give_steps(values, 0.5, steps := np.empty(len(values), np.int8))
    assert steps.tolist() == [0, 2, 0, 1, 127, -127, 127]
    take_steps(steps, 0.1, out := np.empty(len(values), np.float32))
    assert out.tolist() == (steps.astype(np.float64) * 0.1).astype(np.float32).tolist()


@settings(max_examples=100)
@given(masks())
def test_decoded_values_are_added_to_kept_entries_alone(mask):
    dense, decoded = normal(len(mask)), normal(int(mask.sum()), 1)
    dense[::3] = -0.0
    out = np.empty(len(mask), np.float32)
    add_kept(dense, mask, decoded, out)
    expected = dense.copy()
    expected[mask] += decoded
    assert np.array_equal(out.view(np.uint32), expected.view(np.uint32))


@settings(max_examples=100)
@given(masks(), st.sampled_from([np.uint16, np.uint32]), st.integers(0, 2**40))
def test_differing_entries_are_listed(mask, dtype, first):
    left = np.random.default_rng(0).integers(0, 2**16, len(mask)).astype(dtype)
    right = left + mask.astype(dtype)
    out = np.empty(len(mask), np.int64)
    n = find_differing(left, right, first, out)
    assert out[:n].tolist() == (np.flatnonzero(mask) + first).tolist()


def squares(delta, mask, decoded, inverse, block):
    ends = np.minimum(np.arange(0, len(mask) + block, block), len(mask))
    bounds = np.searchsorted(np.flatnonzero(mask), ends)
    return square_sums(delta, places_of(mask), bounds, decoded, inverse, block)


@settings(max_examples=100)
@given(masks(), st.sampled_from([100, TILE, 1000]), st.sampled_from([1.0, 4.0, 0.3]))
def test_squares_are_of_the_delta_and_of_what_is_lost(mask, block, factor):
    delta, decoded = normal(len(mask)), normal(int(mask.sum()), 1)
    lost = delta.astype(np.float64)
    lost[mask] -= decoded.astype(np.float64) / factor
    found = squares(delta, mask, decoded, 1 / factor, block)
    assert found.shape == (-(-len(mask) // block), 2)
    for b, sums in enumerate(found):
        part = slice(b * block, (b + 1) * block)
        expected = [np.square(delta[part], dtype=np.float64).sum(), np.square(lost[part]).sum()]
        np.testing.assert_allclose(sums, expected, rtol=1e-12, atol=1e-14 * expected[0])


@pytest.mark.parametrize("size", [1, TILE, 2000, 40_000])
def test_what_is_stored_exactly_is_not_lost(size):
    delta = normal(size)
    mask = np.abs(delta) > 1
    for b, error in enumerate(squares(delta, mask, delta[mask], 1.0, 32768)[:, 1]):
        dropped = (delta * ~mask)[b * 32768 : (b + 1) * 32768]
        assert error == pytest.approx(np.square(dropped, dtype=np.float64).sum(), rel=1e-12)
    everything = np.ones(size, np.bool_)
    for energy, error in squares(delta, everything, delta, 1.0, 32768):
        assert 0 <= error <= 1e-14 * energy


@settings(max_examples=50)
@given(hnp.arrays(np.float32, 1500, elements=st.sampled_from([-2.0, 0.0, 1.0])), st.integers(1, 1400))
def test_squares_do_not_depend_on_the_slab(delta, cut):
    mask = delta > 0
    block = -(-cut // 2)
    whole = squares(delta, mask, delta[mask], 1.0, block)
    stop = 2 * block
    parts = [squares(d, k, d[k], 1.0, block) for d, k in ((delta[:stop], mask[:stop]), (delta[stop:], mask[stop:]))]
    assert np.array_equal(whole, np.concatenate(parts))
