"""Kinship of deltas: values against numpy's own, forms of the authors' code, clusters and proposals by hand."""

import numpy as np
import pytest

from mediator_cli.stages.kinship import (
    block_sums,
    cluster,
    complementary,
    measure_kinship,
    to_int8,
    unpack_sums,
    without_sign,
)


def sums_of(rows, block=7):
    n, m = rows.shape
    return unpack_sums(block_sums(rows, block).sum(axis=0), n, m)


@pytest.fixture
def rows():
    generator = np.random.default_rng(0)
    shared = generator.normal(size=1000)
    noise = generator.normal(size=(4, 1000))
    return (noise + np.array([0.0, 1.0, 2.0, -1.0])[:, None] * shared + 0.3).astype(np.float32)


def test_kinship_is_what_numpy_says(rows):
    found = measure_kinship([sums_of(rows[:, :400]), sums_of(rows[:, 400:])])
    wide = rows.astype(np.float64)
    norms = np.linalg.norm(wide, axis=1)
    np.testing.assert_allclose(found.pcc, np.corrcoef(wide), rtol=1e-12)
    np.testing.assert_allclose(found.cosine, wide @ wide.T / np.outer(norms, norms), rtol=1e-12)
    distances = np.linalg.norm(wide[:, None] - wide[None], axis=2)
    np.testing.assert_allclose(found.euclidean, distances, rtol=1e-10, atol=1e-12)


def test_the_authors_cosine_has_no_sign(rows):
    found = measure_kinship([sums_of(rows)])
    assert found.cosine.min() < 0
    np.testing.assert_array_equal(without_sign(found).cosine, np.abs(found.cosine))


def test_blocks_change_no_sum_but_for_rounding(rows):
    one, other = sums_of(rows, 7), sums_of(rows, 1000)
    np.testing.assert_allclose(one.gram, other.gram, rtol=1e-12)
    np.testing.assert_allclose(one.first, other.first, rtol=1e-12)


def test_an_expert_and_its_copy_are_as_near_as_can_be(rows):
    found = measure_kinship([sums_of(rows[[0, 0, 1]])])
    assert found.euclidean[0, 1] == 0.0
    assert found.pcc[0, 1] == pytest.approx(1.0, abs=1e-12)
    assert found.pcc.max() <= 1.0


def test_zero_and_constant_deltas_have_no_correlation(rows):
    rows[1], rows[2] = 0.0, 0.25
    found = measure_kinship([sums_of(rows)])
    assert np.isnan(found.pcc[1]).all()
    assert np.isnan(found.pcc[2]).all()
    assert np.isnan(found.cosine[1]).all()
    assert not np.isnan(found.cosine[2, [0, 2, 3]]).any()
    assert not np.isnan(found.euclidean).any()


def test_a_split_is_the_mean_by_size_of_what_is_defined(rows):
    first, second, third = rows[:, :100], rows[:, 100:400].copy(), rows[:, 400:]
    second[1] = 0.0
    parts = [sums_of(np.ascontiguousarray(part)) for part in (first, second, third)]
    found = measure_kinship(parts, split=True)
    alone = [measure_kinship([part]) for part in parts]
    assert found.pcc[0, 1] == pytest.approx((100 * alone[0].pcc[0, 1] + 600 * alone[2].pcc[0, 1]) / 700)
    by_hand = sum(n * one.pcc[0, 2] for n, one in zip((100, 300, 600), alone, strict=True)) / 1000
    assert found.pcc[0, 2] == pytest.approx(by_hand)


def test_eight_bits_are_whole_numbers_up_to_127(rows):
    largest = np.abs(rows).max(axis=1)
    largest[3], rows[3] = 0.0, 0.0
    found = to_int8(rows, largest)
    assert found.dtype == np.float32
    assert (found == np.rint(found)).all()
    assert np.abs(found[:3]).max(axis=1).tolist() == [127, 127, 127]
    assert not found[3].any()


KIN = np.array(
    [
        [1.0, 0.9, 0.2, 0.1],
        [0.9, 1.0, 0.3, 0.0],
        [0.2, 0.3, 1.0, 0.5],
        [0.1, 0.0, 0.5, 1.0],
    ]
)


def test_clusters_join_the_nearest_kin_first():
    joined = [(branch.left, branch.right, round(branch.kinship, 6)) for branch in cluster(KIN)]
    assert joined == [((0,), (1,), 0.9), ((2,), (3,), 0.5), ((0, 1), (2, 3), 0.15)]


def test_groups_begin_with_the_strangest_pair_and_grow_by_whoever_is_least_kin():
    found = complementary(KIN)
    assert [at for at, _ in found] == [1, 3, 2, 0]
    assert found[1][1] == 0.0
    assert found[2][1] == pytest.approx((0.0 + 0.3 + 0.5) / 3)
    assert found[3][1] == pytest.approx((0.9 + 0.2 + 0.1 + 0.3 + 0.0 + 0.5) / 6)


def test_experts_without_kinship_take_no_part_in_proposals():
    kin = KIN.copy()
    kin[3], kin[:, 3] = np.nan, np.nan
    assert [at for at, _ in complementary(kin)] == [0, 2, 1]
    assert len(cluster(kin)) == 3
    assert complementary(np.full((2, 2), np.nan)) == []
