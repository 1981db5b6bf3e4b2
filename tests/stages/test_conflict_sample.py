"""Scores from a sample of blocks, and whether their bounds hold."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mediator_cli.stages.conflict import count_conflicts, keep_nonzero, score_counts, unpack_counts
from mediator_cli.stages.sample import LEAST_BLOCKS, BlockSample, ScoreBounds, draw_blocks, score_sample, student

MEASURES = ("sign", "any_sign", "cosine", "overlap")
BLOCK, N = 64, 3


def tensor(seed, n_blocks, last=BLOCK):
    """Counts of the blocks of three deltas whose correlation and gaps drift along the tensor."""
    generator = np.random.default_rng(seed)
    m = (n_blocks - 1) * BLOCK + last
    drift = np.repeat(generator.random(n_blocks), BLOCK)[:m]
    common = generator.standard_normal(m)
    deltas = common * drift + generator.standard_normal((N, m)) * (1.2 - drift)
    deltas[generator.random((N, m)) < 0.3 * drift] = 0
    return count_conflicts(deltas.astype(np.float32), keep_nonzero(N), BLOCK)


def sample_of(counts, key, share):
    return BlockSample(counts[draw_blocks(key, len(counts), share)], len(counts))


def exact(tensors):
    return score_counts([unpack_counts(counts.sum(axis=0), N) for counts in tensors])


UNIT = [tensor(0, 400), tensor(1, 150, 20), tensor(2, 3), tensor(3, 60)]


@pytest.mark.parametrize("share", [0.1, 0.3])
def test_bounds_hold_for_95_of_100_samples(share):
    truth, n_samples = exact(UNIT), 600
    hits = dict.fromkeys(MEASURES, 0)
    for seed in range(n_samples):
        scores, bounds = score_sample([sample_of(c, 10 * seed + k, share) for k, c in enumerate(UNIT)], N)
        for name in MEASURES:
            hits[name] += abs(getattr(scores, name) - getattr(truth, name)) <= getattr(bounds, name)
    # Three standard deviations of a share of 600 are 0.027.
    for name in MEASURES:
        assert hits[name] / n_samples == pytest.approx(0.95, abs=0.035), name


def test_bounds_of_few_blocks_hold_too():
    counts = [tensor(7, 80), tensor(8, 50)]
    truth, hits = exact(counts), 0
    for seed in range(600):
        scores, bounds = score_sample([sample_of(c, 10 * seed + k, 0.0) for k, c in enumerate(counts)], N)
        hits += abs(scores.sign - truth.sign) <= bounds.sign
    assert 0.91 < hits / 600 < 0.99


def test_bounds_are_no_wider_than_they_must_be():
    truth, errors, bounds = exact(UNIT), [], []
    for seed in range(200):
        scores, bound = score_sample([sample_of(c, 10 * seed + k, 0.2) for k, c in enumerate(UNIT)], N)
        errors.append(scores.sign - truth.sign)
        bounds.append(bound.sign)
    assert np.mean(bounds) == pytest.approx(2 * np.std(errors), rel=0.25)


def test_all_blocks_give_the_score_itself():
    scores, bounds = score_sample([sample_of(counts, 5, 1.0) for counts in UNIT], N)
    truth = exact(UNIT)
    for name in ("sign", "any_sign", "overlap"):
        assert getattr(scores, name) == getattr(truth, name)
    assert scores.cosine == pytest.approx(truth.cosine, rel=1e-12)
    assert bounds == ScoreBounds(0.0, 0.0, 0.0, 0.0)


def test_a_tensor_taken_whole_adds_nothing_to_the_bound():
    part = sample_of(UNIT[0], 1, 0.1)
    alone = score_sample([part], N)[1]
    whole = BlockSample(UNIT[1] * 1e-9, len(UNIT[1]))
    assert score_sample([part, whole], N)[1].sign == pytest.approx(alone.sign, rel=1e-6)


def test_more_blocks_bound_closer():
    def mean_bound(share):
        return np.mean([score_sample([sample_of(UNIT[0], seed, share)], N)[1].sign for seed in range(30)])

    few, some, most = (mean_bound(share) for share in (0.05, 0.2, 0.9))
    # With the correction for the finite tensor the bound goes as sqrt((1 - share) / share).
    assert some / few == pytest.approx(math.sqrt(0.8 / 0.2 / (0.95 / 0.05)), rel=0.15)
    assert most / some == pytest.approx(math.sqrt(0.1 / 0.9 / (0.8 / 0.2)), rel=0.15)


def test_equal_blocks_leave_no_doubt():
    counts = np.tile(tensor(0, 1), (50, 1))
    scores, bounds = score_sample([sample_of(counts, 0, 0.2)], N)
    assert scores.sign == pytest.approx(exact([counts]).sign)
    assert bounds.sign == pytest.approx(0.0, abs=1e-9)


def test_a_bound_is_in_the_unit_of_its_measure():
    bounds = ScoreBounds(sign=0.1, any_sign=0.2, cosine=0.3, overlap=0.4)
    assert [bounds.by(measure) for measure in ("sign", "any_sign", "cosine")] == [0.1, 0.2, 0.15]


@pytest.mark.parametrize("samples", [[], [BlockSample(np.zeros((4, 32)), 9)]], ids=["nothing", "zeros"])
def test_nothing_changed_is_no_conflict_and_no_doubt(samples):
    scores, bounds = score_sample(samples, N)
    assert (scores.sign, scores.any_sign, scores.overlap) == (0.0, 0.0, 0.0)
    assert bounds == ScoreBounds(0.0, 0.0, 0.0, 0.0)


def test_one_expert_has_no_conflict_and_no_doubt():
    counts = count_conflicts(np.ones((1, 640), np.float32), keep_nonzero(1), BLOCK)
    scores, bounds = score_sample([sample_of(counts, 0, 0.4)], 1)
    assert (scores.sign, bounds) == (0.0, ScoreBounds(0.0, 0.0, 0.0, 0.0))


def test_an_empty_tensor_changes_nothing():
    part, empty = sample_of(UNIT[0], 1, 0.1), BlockSample(np.zeros((0, 32)), 0)
    assert score_sample([part, empty], N) == score_sample([part], N)


@pytest.mark.parametrize(("drawn", "n_blocks"), [(0, 1), (0, 5), (1, 2)])
def test_one_block_of_several_is_no_sample(drawn, n_blocks):
    with pytest.raises(ValueError, match=f"{drawn} of {n_blocks} blocks are no sample"):
        BlockSample(np.zeros((drawn, 32)), n_blocks)


@settings(max_examples=100)
@given(st.integers(0, 2**62), st.integers(1, 300), st.floats(0, 1))
def test_blocks_are_drawn_once_and_enough_of_them(key, n_blocks, share):
    drawn = draw_blocks(key, n_blocks, share).tolist()
    assert drawn == sorted(set(drawn))
    assert set(drawn) <= set(range(n_blocks))
    assert len(drawn) == min(n_blocks, max(LEAST_BLOCKS, math.ceil(share * n_blocks)))
    assert drawn == draw_blocks(key, n_blocks, share).tolist()


def test_every_block_is_drawn_as_often():
    times = np.zeros(40)
    for key in np.random.default_rng(0).integers(0, 2**62, 2000).tolist():
        times[draw_blocks(key, 40, 0.25)] += 1
    # Of 2000 draws with a chance of a fourth, the standard deviation is 19.
    assert np.abs(times - 500).max() < 4 * 19.4


@pytest.mark.parametrize(("freedom", "expected"), [(3, 3.182446), (5, 2.570582), (30, 2.042272), (1e9, 1.959964)])
def test_students_t_is_that_of_the_tables(freedom, expected):
    assert student(freedom) == pytest.approx(expected, rel=2e-3)
