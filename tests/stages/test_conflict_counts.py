"""Conflict counts and scores against plain loops, and denoising."""

import math
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mediator_cli.stages.conflict import (
    Rule,
    block_moments,
    count_conflicts,
    far_from_mean,
    keep_at_least,
    keep_nonzero,
    score_counts,
    unpack_counts,
)

BLOCK = 1 << 15
shape = st.tuples(st.integers(1, 4), st.integers(0, 12))
halves = st.integers(-2, 6).map(lambda k: k / 2)
blocks = shape.flatmap(
    lambda nm: st.tuples(
        hnp.arrays(np.int8, nm, elements=st.integers(-3, 3)),
        hnp.arrays(np.float32, nm[0], elements=halves),
        hnp.arrays(np.float32, nm[0], elements=halves),
    )
)


def naive(deltas, kept):
    """Count with loops over entries."""
    n, m = deltas.shape
    used = [[bool(kept[i, k]) and deltas[i, k] != 0 for k in range(m)] for i in range(n)]
    opposite, both = [[0] * n for _ in range(n)], [[0] * n for _ in range(n)]
    gram = [[sum(float(deltas[i, k]) * float(deltas[j, k]) for k in range(m)) for j in range(n)] for i in range(n)]
    any_opposite = shared = 0
    for k in range(m):
        users = [i for i in range(n) if used[i][k]]
        shared += len(users) >= 2
        any_opposite += any(deltas[i, k] > 0 for i in users) and any(deltas[i, k] < 0 for i in users)
        for i in users:
            for j in users:
                both[i][j] += 1
                opposite[i][j] += (deltas[i, k] > 0) != (deltas[j, k] > 0)
    return opposite, both, [sum(row) for row in used], any_opposite, shared, gram


def counted(deltas, rule=None, block=BLOCK):
    deltas = np.asarray(deltas, np.float32)
    rule = rule or keep_nonzero(len(deltas))
    return unpack_counts(count_conflicts(deltas, rule, block).sum(axis=0), len(deltas))


@settings(max_examples=200)
@given(blocks)
def test_counts_equal_loops(drawn):
    deltas, means, limits = drawn
    kept = np.abs(deltas - means[:, None]) > limits[:, None]
    opposite, both, support, any_opposite, shared, gram = naive(deltas, kept)
    counts = counted(deltas, Rule(means, limits))
    assert [list(row) for row in counts.opposite] == opposite
    assert [list(row) for row in counts.both] == both
    assert list(counts.support) == support
    assert (counts.any_opposite, counts.shared) == (any_opposite, shared)
    assert [list(row) for row in counts.gram] == gram


@settings(max_examples=100)
@given(blocks.filter(lambda drawn: drawn[0].shape[1] > 0), st.integers(1, 13))
def test_counts_of_blocks_are_those_of_each_and_add_up(drawn, block):
    deltas, rule = drawn[0].astype(np.float32), Rule(*drawn[1:])
    found = count_conflicts(deltas, rule, block)
    each = [deltas[:, start : start + block] for start in range(0, deltas.shape[1], block)]
    assert found.tolist() == [count_conflicts(part.copy(), rule, BLOCK)[0].tolist() for part in each]
    assert found.sum(axis=0).tolist() == count_conflicts(deltas, rule, BLOCK)[0].tolist()


@settings(max_examples=100)
@given(st.lists(hnp.arrays(np.int8, (3, 8), elements=st.integers(-2, 2)), min_size=1, max_size=3))
def test_scores_of_a_unit_are_those_of_its_tensors_together(parts):
    opposite, both, support, any_opposite, shared, gram = naive(whole := np.concatenate(parts, axis=1), whole != 0)
    pairs = list(combinations(range(3), 2))
    scores = score_counts([counted(part) for part in parts])
    assert scores.sign == pytest.approx(sum(opposite[i][j] / max(1, both[i][j]) for i, j in pairs) / 3)
    assert scores.any_sign == pytest.approx(any_opposite / max(1, shared))
    union = {(i, j): support[i] + support[j] - both[i][j] for i, j in pairs}
    assert scores.overlap == pytest.approx(sum(both[i][j] / max(1, union[i, j]) for i, j in pairs) / 3)
    norms = [math.sqrt(gram[i][i]) for i in range(3)]
    cosines = [gram[i][j] / (norms[i] * norms[j]) if norms[i] * norms[j] else 0.0 for i, j in pairs]
    assert scores.cosine == pytest.approx(sum(cosines) / 3)


def test_an_example_in_the_head():
    counts = counted([[1.0, -1.0, 2.0, 0.0], [3.0, 1.0, -1.0, 1.0]])
    assert counts.opposite == ((0, 2), (2, 0))
    assert counts.both == ((3, 3), (3, 4))
    assert (counts.any_opposite, counts.shared) == (2, 3)
    assert score_counts([counts]).sign == pytest.approx(2 / 3)
    assert score_counts([counts]).overlap == pytest.approx(3 / 4)


@pytest.mark.parametrize("n", [2, 4])
def test_independent_signs_conflict_in_half_of_the_entries(n):
    signs = np.random.default_rng(n).standard_normal((n, 60_000))
    scores = score_counts([counted(signs)])
    assert scores.sign == pytest.approx(0.5, abs=0.01)
    assert scores.any_sign == pytest.approx(1 - 2 ** (1 - n), abs=0.01)
    assert scores.cosine == pytest.approx(0.0, abs=0.02)
    assert scores.overlap == 1.0


@pytest.mark.parametrize(("factor", "sign", "cosine"), [(2.0, 0.0, 1.0), (-2.0, 1.0, -1.0)])
def test_equal_and_opposite_experts_are_the_two_ends(factor, sign, cosine):
    delta = np.random.default_rng(0).standard_normal(1000)
    scores = score_counts([counted([delta, factor * delta])])
    assert (scores.sign, scores.any_sign, scores.overlap) == (sign, sign, 1.0)
    assert scores.cosine == pytest.approx(cosine)


def test_every_measure_is_higher_for_more_conflict():
    delta = np.random.default_rng(0).standard_normal(1000)
    same, against = (score_counts([counted([delta, f * delta])]) for f in (1.0, -1.0))
    for measure in ("sign", "any_sign", "cosine"):
        assert same.by(measure) == pytest.approx(0.0)
        assert against.by(measure) == pytest.approx(1.0)


def test_experts_that_change_other_entries_do_not_conflict():
    scores = score_counts([counted([[1.0, 0.0], [0.0, -1.0]])])
    assert (scores.sign, scores.any_sign, scores.cosine, scores.overlap) == (0.0, 0.0, 0.0, 0.0)


@pytest.mark.parametrize("parts", [[], [np.zeros((2, 5))], [np.ones((1, 5))]], ids=["none", "zeros", "one expert"])
def test_nothing_to_compare_is_no_conflict(parts):
    scores = score_counts([counted(part) for part in parts])
    assert (scores.sign, scores.any_sign, scores.overlap) == (0.0, 0.0, 0.0)


def kept(deltas, rule):
    return np.abs(deltas - rule.means[:, None]) > rule.limits[:, None]


def far(deltas, n_std):
    moments = block_moments(deltas, BLOCK).sum(axis=0)
    return kept(deltas, far_from_mean(moments, deltas.shape[1], n_std))


@settings(max_examples=100)
@given(hnp.arrays(np.float32, (2, 30), elements=st.floats(-5, 5, width=32)), st.floats(0.25, 3))
def test_far_from_mean_equals_numpy(deltas, n_std):
    mask = far(deltas, n_std)
    wide = deltas.astype(np.float64)
    distance = np.abs(wide - wide.mean(1, keepdims=True)) - n_std * wide.std(1, keepdims=True)
    clear = np.abs(distance) > 1e-4
    assert np.array_equal(mask[clear], (distance > 0)[clear])


def test_a_constant_delta_has_no_entry_far_from_its_mean():
    assert not far(np.full((1, 100), 0.5, np.float32), 1.0).any()


def test_one_std_keeps_the_tails_of_a_normal_delta():
    deltas = np.random.default_rng(0).standard_normal((1, 100_000)).astype(np.float32)
    assert far(deltas, 1.0).mean() == pytest.approx(0.3173, abs=0.01)


def test_the_rule_that_kept_entries_is_that_of_the_counts():
    deltas = np.random.default_rng(1).standard_normal((3, 5000)).astype(np.float32)
    rule = far_from_mean(block_moments(deltas, BLOCK)[0], 5000, 1.5)
    assert counted(deltas, rule).support == tuple(kept(deltas, rule).sum(axis=1))


def test_at_least_keeps_entries_equal_to_the_threshold():
    deltas = np.array([[1.0, -2.0, 3.0], [1.0, -2.0, 3.0], [0.0, -1e-45, 3.0]], np.float32)
    rule = keep_at_least(np.array([2.0, 2.5, 0.0], np.float32))
    assert kept(deltas, rule).tolist() == [[False, True, True], [False, False, True], [True, True, True]]
    assert counted(deltas, rule).support == (2, 1, 2)


@settings(max_examples=200)
@given(hnp.arrays(np.float32, 40, elements=st.floats(width=32, allow_nan=False, allow_infinity=False)))
def test_at_least_is_exact_for_every_threshold(values):
    thresholds = np.abs(values)
    mask = kept(np.tile(values, (40, 1)), keep_at_least(thresholds))
    assert np.array_equal(mask, np.abs(values)[None] >= thresholds[:, None])


@pytest.mark.parametrize("m", [0, 1, 511, 512, 513, 4000])
def test_moments_are_those_of_numpy(m):
    deltas = np.random.default_rng(m).standard_normal((3, m)).astype(np.float32)
    found, wide = block_moments(deltas, 1000), deltas.astype(np.float64)
    assert found.shape == (-(-m // 1000), 2, 3)
    for b, moments in enumerate(found):
        part = wide[:, b * 1000 : (b + 1) * 1000]
        np.testing.assert_allclose(moments, [part.sum(axis=1), (part**2).sum(axis=1)], rtol=1e-12, atol=1e-12)
