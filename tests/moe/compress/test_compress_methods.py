"""The arithmetic of each method against naive references in float64."""

from __future__ import annotations

from itertools import combinations, permutations

import numpy as np
import pytest

from mediator_cli.moe.compress.align import best_order, by_activations, by_weights
from mediator_cli.moe.compress.decide import new_gates
from mediator_cli.moe.compress.groups import Group, make_groups
from mediator_cli.moe.compress.hc_smoe import average_linkage, hc_smoe
from mediator_cli.moe.compress.job import Job
from mediator_cli.moe.compress.m_smoe import m_smoe
from mediator_cli.moe.compress.matrices import Matrices, project, weighted_mean
from mediator_cli.moe.compress.ream import ream, similarity
from mediator_cli.moe.compress.reap import reap
from mediator_cli.moe.compress.statistics import LayerStatistics
from mediator_cli.moe.compress.sub_moe import k_means, sub_moe


def statistics(logits: np.ndarray, outputs: np.ndarray, top_k: int = 2) -> LayerStatistics:
    """Sum over tokens one by one; logits [tokens, experts], outputs [experts, tokens, hidden]."""
    n, (tokens, experts) = outputs.shape[2], logits.shape
    routed, saliency = np.zeros(experts), np.zeros(experts)
    out, gated, cosines = np.zeros((experts, n)), np.zeros((experts, n)), np.zeros((experts, experts))
    for t in range(tokens):
        p = np.exp(logits[t]) / np.exp(logits[t]).sum()
        chosen = np.argsort(-p)[:top_k]
        for e in range(experts):
            out[e] += outputs[e, t]
            gated[e] += p[e] * outputs[e, t]
            for f in range(experts):
                a, b = outputs[e, t], outputs[f, t]
                cosines[e, f] += a @ b / np.sqrt((a @ a) * (b @ b))
        for e in chosen:
            routed[e] += 1
            saliency[e] += p[e] / p[chosen].sum() * np.sqrt(outputs[e, t] @ outputs[e, t])
    return LayerStatistics(np.array([float(tokens)]), routed, saliency, logits.T @ logits, out, gated, cosines)


@pytest.fixture(scope="module")
def drawn() -> tuple[np.ndarray, np.ndarray, LayerStatistics]:
    rng = np.random.default_rng(3)
    logits, outputs = rng.normal(size=(40, 7)) + rng.normal(size=7), rng.normal(size=(7, 40, 5))
    outputs += 2 * rng.normal(size=(7, 1, 5))
    return logits, outputs, statistics(logits, outputs)


def members(groups) -> set[frozenset[int]]:
    return {frozenset(group.members) for group in groups}


def test_reap_drops_what_adds_least_by_hand():
    # Two tokens, one expert each: expert 0 says 3, expert 2 says 5, expert 1 is never asked.
    found = statistics(
        np.array([[9.0, 0.0, 1.0], [0.0, 1.0, 9.0]]), np.array([[[3.0], [9]], [[7], [8]], [[1], [5]]]), 1
    )
    assert found.saliency.tolist() == [3, 0, 5]
    assert [group.members for group in reap(found, 1)] == [(2,)]
    assert [group.members for group in reap(found, 2)] == [(0,), (2,)]
    assert all(group.weights == (1.0,) for group in reap(found, 2))


def test_m_smoe_joins_the_dominant_expert_of_the_nearest_logits(drawn):
    logits, _, found = drawn
    dominant = sorted(range(7), key=lambda e: (-found.n_routed[e], e))[:3]
    expected = {d: {d} for d in dominant}
    for e in set(range(7)) - set(dominant):
        near = {
            d: logits[:, e] @ logits[:, d] / np.linalg.norm(logits[:, e]) / np.linalg.norm(logits[:, d])
            for d in dominant
        }
        expected[max(near, key=near.get)].add(e)
    groups = m_smoe(found, 3)
    assert members(groups) == {frozenset(group) for group in expected.values()}
    assert {group.centre for group in groups} == set(dominant)
    for group in groups:
        counts = found.n_routed[list(group.members)]
        assert np.allclose(group.weights, counts / counts.sum())


def test_hc_smoe_clusters_by_mean_outputs(drawn):
    _, outputs, found = drawn
    means = outputs.mean(axis=1)
    assert np.allclose(found.mean_output, means)
    clusters = [[e] for e in range(7)]
    while len(clusters) > 3:
        pairs = combinations(range(len(clusters)), 2)
        a, b = min(
            pairs,
            key=lambda pair: np.mean(
                [np.linalg.norm(means[i] - means[j]) for i in clusters[pair[0]] for j in clusters[pair[1]]]
            ),
        )
        clusters[a] += clusters.pop(b)
    assert members(hc_smoe(found, 3)) == {frozenset(cluster) for cluster in clusters}


def test_average_linkage_leaves_as_many_as_asked_also_of_equal_points():
    for n in range(1, 5):
        assert len(average_linkage(np.zeros((4, 2)), n)) == n
    assert average_linkage(np.zeros((1, 2)), 1) == [[0]]


def test_sub_moe_finds_the_experts_that_answer_alike():
    rng = np.random.default_rng(0)
    kinds = rng.normal(size=(3, 30, 8))
    outputs = np.stack([kinds[e % 3] + 0.1 * rng.normal(size=(30, 8)) for e in range(7)])
    found = statistics(rng.normal(size=(30, 7)), outputs)
    assert members(sub_moe(found, 3, 0)) == {frozenset({0, 3, 6}), frozenset({1, 4}), frozenset({2, 5})}
    assert [len(k_means(np.zeros((5, 5)), n, 0)) for n in (1, 3, 4)] == [1, 3, 4]


def test_ream_similarity_and_groups(drawn):
    logits, outputs, found = drawn
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    gated = np.stack([(p[:, e, None] * outputs[e]).mean(axis=0) for e in range(7)])
    columns = logits / np.linalg.norm(logits, axis=0)
    apart = np.array([[np.linalg.norm(columns[:, i] - columns[:, j]) for j in range(7)] for i in range(7)])
    cosine = np.array([[a @ b / np.linalg.norm(a) / np.linalg.norm(b) for b in gated] for a in gated])
    expected = ((cosine + 1) / 2 + 1 - apart / apart.max()) / 2
    assert np.allclose(similarity(found), expected, atol=1e-7)

    order = sorted(range(7), key=lambda e: -found.saliency[e])
    left, wanted = order[2:], []
    for centroid in order[:2]:
        near = sorted(left, key=lambda e: -expected[centroid, e])[:3]
        wanted.append(frozenset({centroid, *near}))
        left = [e for e in left if e not in near]
    assert members(ream(found, 2, cap=3)) == set(wanted)
    # With room for all, the most salient takes all others and the second stays alone.
    assert sorted(len(group.members) for group in ream(found, 2, cap=16)) == [1, 6]


def test_ream_raises_a_cap_that_would_leave_experts_over(drawn):
    assert [len(group.members) for group in ream(drawn[2], 1, cap=1)] == [7]
    assert sorted(len(group.members) for group in ream(drawn[2], 3, cap=1)) == [1, 3, 3]


def test_groups_of_unused_experts_weigh_all_the_same():
    (group,) = make_groups([[0, 1]], np.zeros(2))
    assert group.weights == (0.5, 0.5)
    (group,) = make_groups([[0, 1]], np.array([0.0, 3.0]))
    assert (group.members, group.weights) == ((1, 0), (1.0, 0.0))


def test_the_best_order_is_that_of_all_permutations():
    rng = np.random.default_rng(1)
    for _ in range(20):
        scores = rng.normal(size=(5, 5))
        best = max(permutations(range(5)), key=lambda order: sum(scores[i, j] for i, j in enumerate(order)))
        found = best_order(scores)
        assert (found.tolist() if found is not None else list(range(5))) == list(best)
    assert best_order(np.eye(4)) is None
    assert best_order(np.ones((4, 4))) is None


def expert(seed: int, inner: int = 12, hidden: int = 40) -> Matrices:
    rng = np.random.default_rng(seed)
    return Matrices(*(rng.normal(size=(inner, hidden)).astype(np.float32) for _ in range(3)))


def shuffled(one: Matrices, order: np.ndarray) -> Matrices:
    return Matrices(*(rows[order] for rows in one.rows))


def activations(one: Matrices, states: np.ndarray) -> np.ndarray:
    gate = states @ one.gate.T
    said = gate / (1 + np.exp(-gate)) * (states @ one.up.T)
    return said / np.linalg.norm(said, axis=0)


@pytest.mark.parametrize("rule", ["weights", "activations"])
@pytest.mark.parametrize("inner", [12, 90])
def test_alignment_finds_a_shuffle_again(rule, inner):
    one = expert(0, inner)
    order = np.random.default_rng(5).permutation(inner)
    other = shuffled(one, order)
    if rule == "weights":
        found = by_weights(one, other)
    else:
        states = np.random.default_rng(6).normal(size=(50, 40))
        found = by_activations(activations(one, states).T @ activations(other, states), one, other, 0)
    assert (order[found] == np.arange(inner)).all()
    mean = weighted_mean([one.down_t.T, other.down_t.T], (0.3, 0.7), (None, found), "down_proj")
    assert np.allclose(mean, one.down_t.T, atol=1e-6)
    mean = weighted_mean([one.gate, other.gate], (0.3, 0.7), (None, found), "gate_proj")
    assert np.allclose(mean, one.gate, atol=1e-6)


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (9, 2)])
@pytest.mark.parametrize("share", [0.3, 0.5, 1.0])
def test_the_projection_is_the_joint_svd(shape, share):
    rng = np.random.default_rng(2)
    members = [rng.normal(size=shape) for _ in range(3)]
    weights = (0.5, 0.3, 0.2)
    u, s, vt = np.linalg.svd(np.concatenate(members, axis=1), full_matrices=False)
    kept = int(np.ceil(share * min(shape[0], 3 * shape[1])))
    parts = np.split(vt[:kept], 3, axis=1)
    expected = (u[:, :kept] * s[:kept]) @ sum(w * part for w, part in zip(weights, parts, strict=True))
    mean = sum(w * member for w, member in zip(weights, members, strict=True))
    found = project(mean, [member.astype(np.float32) for member in members], share)
    assert np.allclose(found, expected, atol=1e-6)
    assert np.allclose(found, mean, atol=1e-6) == (share == 1.0)


def test_the_rows_of_the_gates():
    gates = np.arange(8, dtype=np.float32).reshape(4, 2)
    groups = (Group((1, 0), (0.75, 0.25)), Group((3,), (1.0,)))
    assert new_gates(Job("m_smoe", 2), groups, gates).tolist() == [[2, 3], [6, 7]]
    assert new_gates(Job("m_smoe", 2, "mean"), groups, gates).tolist() == [[1.5, 2.5], [6, 7]]
    assert new_gates(Job("m_smoe", 2, "tied"), groups, gates) is gates
