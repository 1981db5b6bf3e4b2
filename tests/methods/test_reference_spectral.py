"""Spectral methods against naive float64 formulas."""

import numpy as np
import pytest
from spectral_cases import decompose, draw, each_shape, merge, naive_polar, rotation

from mediator_cli.methods.registry import resolve_method


def naive_tsv_m(deltas, ranks):
    parts = [decompose(delta) for delta in deltas]
    u = np.hstack([part[0][:, :k] for part, k in zip(parts, ranks, strict=True)])
    s = np.concatenate([part[1][:k] for part, k in zip(parts, ranks, strict=True)])
    vt = np.vstack([part[2][:k] for part, k in zip(parts, ranks, strict=True)])
    return naive_polar(u) @ np.diag(s) @ naive_polar(vt)


@each_shape
def test_iso_c_weighs_before_the_sum(shape):
    deltas, weights = draw(shape), [1.0, 0.5, -0.25]
    u, s, vt = decompose(np.tensordot(weights, deltas.astype(np.float64), 1))
    np.testing.assert_allclose(
        merge("iso_c", deltas, weights, **{"lambda": 0.7}), 0.7 * s.mean() * u @ vt, rtol=1e-5, atol=1e-6
    )


def test_tsv_m_with_more_experts_than_rank_keeps_one_triplet_of_each():
    deltas = draw((3, 8), n=5)
    np.testing.assert_allclose(merge("tsv_m", deltas), naive_tsv_m(deltas, [1] * 5), rtol=1e-5, atol=1e-6)


def naive_clipped(delta, sigmas):
    limit = sigmas * np.sqrt((delta.astype(np.float64) ** 2).mean())
    return np.clip(delta.astype(np.float64), -limit, limit)


@each_shape
def test_r_tsvm_like_clips_and_cuts_the_rank_by_sparsity(shape):
    deltas, weights = draw(shape) ** 3, [1.0, 0.5, 2.0]
    clipped = [weight * naive_clipped(delta, 2.0) for weight, delta in zip(weights, deltas, strict=True)]
    root = np.sqrt(clipped[0].size)
    ratios = [abs(delta).sum() / np.sqrt((delta**2).sum()) for delta in clipped]
    most = max(1, min(shape) // 3)
    ranks = [max(1, round((ratio - 1) / (root - 1) * most)) for ratio in ratios]
    found = merge("r_tsvm_like", deltas, weights, sigmas=2.0)
    np.testing.assert_allclose(found, naive_tsv_m(clipped, ranks), rtol=1e-5, atol=1e-5)


def test_r_tsvm_like_is_tsv_m_where_nothing_is_clipped_nor_cut():
    deltas = draw((12, 9))
    found = merge("r_tsvm_like", deltas, sigmas=100.0, rank="shared")
    np.testing.assert_array_equal(found, merge("tsv_m", deltas))


def test_r_tsvm_like_keeps_fewer_triplets_of_a_sparse_delta():
    dense = np.sign(draw((32, 32), n=1)[0])
    sparse = np.where(np.random.default_rng(2).random((32, 32)) < 0.05, dense, np.float32(0))
    assert np.linalg.matrix_rank(merge("r_tsvm_like", [dense])) == 32
    assert np.linalg.matrix_rank(merge("r_tsvm_like", [sparse], sigmas=100.0)) < 10


@each_shape
@pytest.mark.parametrize("alpha", [0.05, 0.5, 1.0])
def test_svc_scales_each_direction_by_what_experts_do_in_it(shape, alpha):
    deltas, weights = draw(shape).astype(np.float64), [1.0, 0.5, 2.0]
    u, s, vt = decompose(np.tensordot(weights, deltas, 1) / 3.5)
    factors = []
    for r in range(len(s)):
        mine = [u[:, r] @ delta for delta in deltas]
        factors.append(3 / sum(max(alpha, (s[r] * vt[r]) @ row / (row @ row)) for row in mine))
    found = merge("svc", deltas, weights, alpha=alpha)
    np.testing.assert_allclose(found, u @ np.diag(factors * s) @ vt, rtol=1e-4, atol=1e-5)


@each_shape
@pytest.mark.parametrize("features", [0.5, 1.0])
def test_stf_like_solves_the_system_of_all_features(shape, features):
    deltas, weights = draw(shape, n=2), [1.0, 0.5]
    k = int(np.ceil(features * min(shape)))
    parts = [decompose(w * d.astype(np.float64)) for w, d in zip(weights, deltas, strict=True)]
    u = [part[0][:, i] for part in parts for i in range(k)]
    v = [part[2][i] for part in parts for i in range(k)]
    s = np.array([part[1][i] for part in parts for i in range(k)])
    gram = np.array([[(a @ b) * (c @ d) for b, d in zip(u, v, strict=True)] for a, c in zip(u, v, strict=True)])
    a = np.linalg.lstsq(gram + 1e-6 * np.eye(len(s)), s, rcond=None)[0]
    expected = sum(x * np.outer(left, right) for x, left, right in zip(a, u, v, strict=True))
    found = merge("stf_like", deltas, weights, features=features)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_stf_like_answers_to_features_as_each_expert_does():
    deltas = draw((20, 16), n=2).astype(np.float64)
    found = merge("stf_like", deltas, features=0.25).astype(np.float64)
    for delta in deltas:
        u, s, vt = decompose(delta)
        np.testing.assert_allclose([u[:, i] @ found @ vt[i] for i in range(4)], s[:4], rtol=1e-4)


def naive_lore(tensors, shares, mu, iterations):
    deltas = np.zeros_like(tensors)
    base = np.tensordot(shares, tensors, 1)
    for _ in range(iterations):
        for i, tensor in enumerate(tensors):
            u, s, vt = decompose(tensor - base)
            deltas[i] = u @ np.diag(np.maximum(s - mu, 0)) @ vt
        base = np.tensordot(shares, tensors - deltas, 1)
    return base, deltas


@each_shape
def test_lore_like_estimates_base_and_deltas_in_turns(shape):
    tensors, weights = draw(shape).astype(np.float64), np.array([1.0, 0.5, 2.0])
    base, deltas = naive_lore(tensors, weights / 3.5, 0.6, 4)
    how = {"mu": 0.6, "iterations": 4, "lambda": 0.5}
    found = merge("lore_like", tensors, weights, merge="sum", **how)
    np.testing.assert_allclose(found, base + 0.5 * np.tensordot(weights, deltas, 1), rtol=1e-5, atol=1e-5)
    found = merge("lore_like", tensors, weights, merge="mean", **how)
    np.testing.assert_allclose(found, base + 0.5 * np.tensordot(weights / 3.5, deltas, 1), rtol=1e-5, atol=1e-5)
    signs = np.where(np.tensordot(weights, deltas, 1) >= 0, 1, -1)
    factors = weights[:, None, None] * (deltas * signs > 0)
    agreed = (factors * deltas).sum(axis=0) / np.maximum(factors.sum(axis=0), 1e-9)
    found = merge("lore_like", tensors, weights, merge="elect", **how)
    np.testing.assert_allclose(found, base + 0.5 * agreed, rtol=1e-5, atol=1e-5)


def test_lore_like_by_mean_is_the_mean_of_experts_exactly():
    tensors, weights = draw((6, 5)), [1.0, 0.5, 2.0]
    plain = resolve_method("linear", None, {}, str)(tensors.reshape(3, -1), np.array(weights)).reshape(6, 5)
    np.testing.assert_array_equal(merge("lore_like", tensors, weights, merge="mean", mu=3.0), plain)
    nearly = merge("lore_like", tensors, weights, merge="mean", mu=3.0, **{"lambda": 1 + 1e-7})
    np.testing.assert_allclose(nearly, plain, rtol=1e-5, atol=1e-6)


def test_lore_like_drops_deltas_below_mu():
    tensors = draw((6, 5))
    np.testing.assert_allclose(merge("lore_like", tensors, mu=100.0), tensors.mean(axis=0), rtol=1e-5, atol=1e-6)


def test_vertical_drm_is_horizontal_drm_of_transposed_matrices():
    deltas, weights = draw((12, 7)), [1.0, 0.5, 2.0]
    across = merge("drm", deltas.swapaxes(1, 2), weights, direction="horizontal")
    np.testing.assert_array_equal(merge("drm", deltas, weights, direction="vertical"), across.T)


def test_drm_drops_singular_values_below_a_hundredth():
    delta = np.diag([100.0, 2.0, 0.9])
    np.testing.assert_allclose(merge("drm", [delta], density=1.0), np.diag([100.0, 2.0, 0.0]), atol=1e-5)


def test_drm_leaves_out_an_expert_without_a_part_in_a_direction():
    """Its part there is rounding, which would else be scaled up to a unit vector and halve the mean."""
    turn = rotation(8, 1)
    first, second = turn[:, :3] @ draw((3, 8), 1)[0], turn[:, 3:6] @ draw((3, 8), 1, seed=1)[0]
    found = merge("drm", [first, second], density=1.0)
    np.testing.assert_allclose(found, np.float32(first) + np.float32(second), rtol=1e-4, atol=1e-5)


def test_drm_trims_vectors_by_the_threshold_it_is_given():
    deltas = np.array([[3, -2, 1, 0.5], [-1, -2, 4, 0.5]], np.float32)
    method = resolve_method("drm", None, {"vector_density": 0.5}, str)
    thresholds = np.array([2.0, 2.0], np.float32)
    found = method(deltas, np.array([1.0, 0.5]), {"thresholds": thresholds})
    assert found.tolist() == [3.0, -1.5, 2.0, 0.0]
    # By itself it keeps round(4 · 0.25) + 1 of each row.
    alone = resolve_method("drm", None, {"vector_density": 0.25}, str)
    np.testing.assert_array_equal(alone(deltas, np.array([1.0, 0.5])), found)


@pytest.mark.parametrize(("majority", "expected"), [(5.0, 2.0), (-3.0, -2.0), (0.0, 0.0)])
def test_a_tie_of_drm_takes_the_sign_of_the_majority(majority, expected):
    method = resolve_method("drm", None, {}, str)
    found = method(np.array([[2], [-2]], np.float32), np.ones(2), {"majority": np.array([majority])})
    assert found.tolist() == [expected]


def test_drm_without_direction_averages_what_has_changed():
    deltas = [[[2, 0], [4, -3]], [[0, 0], [2, 1]]]
    assert merge("drm", deltas, [1.0, 0.5], direction="none").tolist() == [[2.0, 0.0], [2.5, -1.25]]
