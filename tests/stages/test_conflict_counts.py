"""Conflict counts and scores against plain loops, and denoising."""

import math
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mediator_cli.stages.conflict import (
    at_least,
    count_block,
    far_from_mean,
    moments_block,
    score_counts,
    unpack_counts,
)

shape = st.tuples(st.integers(1, 4), st.integers(0, 12))
blocks = shape.flatmap(
    lambda nm: st.tuples(hnp.arrays(np.int8, nm, elements=st.integers(-3, 3)), hnp.arrays(np.bool_, nm))
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


def counted(deltas, kept=None):
    deltas = torch.as_tensor(deltas, dtype=torch.float32)
    kept = deltas != 0 if kept is None else torch.as_tensor(kept)
    return unpack_counts(count_block(deltas, kept), len(deltas))


@settings(max_examples=200)
@given(blocks.filter(lambda block: block[0].shape[1] > 0))
def test_counts_equal_loops(block):
    opposite, both, support, any_opposite, shared, gram = naive(*block)
    counts = counted(*block)
    assert [list(row) for row in counts.opposite] == opposite
    assert [list(row) for row in counts.both] == both
    assert list(counts.support) == support
    assert (counts.any_opposite, counts.shared) == (any_opposite, shared)
    assert [list(row) for row in counts.gram] == gram


@settings(max_examples=100)
@given(blocks.filter(lambda block: block[0].shape[1] > 1), st.data())
def test_counts_of_parts_add_up(block, data):
    deltas, kept = torch.from_numpy(block[0]).float(), torch.from_numpy(block[1])
    cut = data.draw(st.integers(1, deltas.shape[1] - 1))
    parts = count_block(deltas[:, :cut], kept[:, :cut]) + count_block(deltas[:, cut:], kept[:, cut:])
    assert torch.equal(parts, count_block(deltas, kept))


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
    signs = torch.randn(n, 60_000, generator=torch.Generator().manual_seed(n))
    scores = score_counts([counted(signs)])
    assert scores.sign == pytest.approx(0.5, abs=0.01)
    assert scores.any_sign == pytest.approx(1 - 2 ** (1 - n), abs=0.01)
    assert scores.cosine == pytest.approx(0.0, abs=0.02)
    assert scores.overlap == 1.0


@pytest.mark.parametrize(("factor", "sign", "cosine"), [(2.0, 0.0, 1.0), (-2.0, 1.0, -1.0)])
def test_equal_and_opposite_experts_are_the_two_ends(factor, sign, cosine):
    delta = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    scores = score_counts([counted(torch.stack([delta, factor * delta]))])
    assert (scores.sign, scores.any_sign, scores.overlap) == (sign, sign, 1.0)
    assert scores.cosine == pytest.approx(cosine)


def test_every_measure_is_higher_for_more_conflict():
    delta = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    same, against = (score_counts([counted(torch.stack([delta, f * delta]))]) for f in (1.0, -1.0))
    for measure in ("sign", "any_sign", "cosine"):
        assert same.by(measure) == pytest.approx(0.0)
        assert against.by(measure) == pytest.approx(1.0)


def test_experts_that_change_other_entries_do_not_conflict():
    scores = score_counts([counted([[1.0, 0.0], [0.0, -1.0]])])
    assert (scores.sign, scores.any_sign, scores.cosine, scores.overlap) == (0.0, 0.0, 0.0, 0.0)


@pytest.mark.parametrize("parts", [[], [torch.zeros(2, 5)], [torch.ones(1, 5)]], ids=["none", "zeros", "one expert"])
def test_nothing_to_compare_is_no_conflict(parts):
    scores = score_counts([counted(part) for part in parts])
    assert (scores.sign, scores.any_sign, scores.overlap) == (0.0, 0.0, 0.0)


@settings(max_examples=100)
@given(hnp.arrays(np.float32, (2, 30), elements=st.floats(-5, 5, width=32)), st.floats(0.25, 3))
def test_far_from_mean_equals_numpy(data, n_std):
    deltas = torch.from_numpy(data)
    mask = far_from_mean(deltas, moments_block(deltas), 30, n_std)
    wide = data.astype(np.float64)
    distance = np.abs(wide - wide.mean(1, keepdims=True)) - n_std * wide.std(1, keepdims=True)
    clear = np.abs(distance) > 1e-4
    assert np.array_equal(mask.numpy()[clear], (distance > 0)[clear])


def test_a_constant_delta_has_no_entry_far_from_its_mean():
    deltas = torch.full((1, 100), 0.5)
    assert not far_from_mean(deltas, moments_block(deltas), 100, 1.0).any()


def test_one_std_keeps_the_tails_of_a_normal_delta():
    deltas = torch.randn(1, 100_000, generator=torch.Generator().manual_seed(0))
    share = far_from_mean(deltas, moments_block(deltas), 100_000, 1.0).float().mean().item()
    assert share == pytest.approx(0.3173, abs=0.01)


def test_at_least_keeps_entries_equal_to_the_threshold():
    deltas = torch.tensor([[1.0, -2.0, 3.0], [1.0, -2.0, 3.0]])
    assert at_least(deltas, torch.tensor([2.0, 2.5])).tolist() == [[False, True, True], [False, False, True]]
