"""The gates of one layer against hand-made numbers and naive computations."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mediator_cli.moe.gates.formulas import (
    centred_gates,
    condition,
    logistic_gates,
    prototype_gates,
    random_gates,
    ridge_gates,
    uniform_gates,
)
from mediator_cli.moe.gates.routing import choices, top_weights

RNG = np.random.default_rng(0)
LABELS = np.array([0] * 30 + [1] * 60 + [2] * 45)
STATES = (RNG.standard_normal((135, 6)) + 3 + 1.5 * np.eye(6)[LABELS]).astype(np.float32)


def test_centred_gates_by_hand() -> None:
    # Means are (4, 2) and (2, 2), their mean (3, 2): (1, 0) less its part along (3, 2), which is 3/13 of it.
    states = np.array([[3, 2], [5, 2], [2, 2]], np.float32)
    wanted = np.array([[1 - 9 / 13, -6 / 13], [-1 + 9 / 13, 6 / 13]])
    np.testing.assert_allclose(centred_gates(states, np.array([0, 0, 1]), 2), wanted, atol=1e-12)


def test_centred_gates_give_the_mean_state_equal_logits() -> None:
    gates = centred_gates(STATES, LABELS, 3)
    middle = np.mean([STATES[expert == LABELS].mean(axis=0, dtype=np.float64) for expert in range(3)], axis=0)
    np.testing.assert_allclose(gates @ middle, 0, atol=1e-9)
    np.testing.assert_allclose(gates.sum(axis=0), 0, atol=1e-12)


def test_ridge_gates_are_weighted_least_squares() -> None:
    """The same as least squares on rows of equal weight for each expert, with a row of √λ for each entry of a state."""
    weight = (1 / (np.bincount(LABELS)[LABELS] * 3)) ** 0.5
    targets = np.eye(3)[LABELS] - 1 / 3
    x = STATES.astype(np.float64) * weight[:, None]
    penalty = 0.2 * np.square(x).sum() / 6
    rows = np.vstack([x, np.eye(6) * penalty**0.5])
    wanted = np.linalg.lstsq(rows, np.vstack([targets * weight[:, None], np.zeros((6, 3))]), rcond=None)[0].T
    np.testing.assert_allclose(ridge_gates(STATES, LABELS, 3, 0.2), wanted, atol=1e-10)


def test_a_very_strong_penalty_leaves_the_centred_means() -> None:
    gates = ridge_gates(STATES, LABELS, 3, 1e9)
    means = np.stack([STATES[expert == LABELS].mean(axis=0) for expert in range(3)])
    centred = means - means.mean(axis=0)
    np.testing.assert_allclose(gates / np.linalg.norm(gates), centred / np.linalg.norm(centred), atol=1e-6)


@pytest.mark.parametrize("n_experts", [2, 3])
def test_logistic_gates_are_where_the_loss_is_flat(n_experts: int) -> None:
    """The gradient of the balanced, penalised log loss is zero, and not so at other gates."""
    kept = n_experts > LABELS
    states, labels = STATES[kept].astype(np.float64), LABELS[kept]
    scale = np.sqrt(np.square(states).mean(axis=0))
    share = len(labels) / (n_experts * np.bincount(labels))

    def slope(gates: np.ndarray) -> float:
        logits = states @ gates.T
        odds = np.exp(logits - logits.max(axis=1, keepdims=True))
        odds /= odds.sum(axis=1, keepdims=True)
        error = (odds - np.eye(n_experts)[labels]) * share[labels][:, None]
        # scikit-learn's two-class form has one vector w, and gates are -w/2 and w/2: half the penalty of each.
        penalty = 0.05 * gates * scale * (2 if n_experts == 2 else 1)
        return float(np.abs(error.T @ (states / scale) / len(labels) + penalty).max())

    gates = logistic_gates(STATES[kept], labels, n_experts, 0.05)
    assert slope(gates) < 2e-3
    assert slope(gates * 1.2) > 5e-3


def test_an_expert_without_tokens_gets_zeros() -> None:
    labels = np.where(LABELS == 1, 3, LABELS)
    for made in (
        centred_gates(STATES, labels, 4),
        ridge_gates(STATES, labels, 4, 0.1),
        logistic_gates(STATES, labels, 4, 0.1),
    ):
        assert made.shape == (4, 6)
        assert not made[1].any()
        assert made[[0, 2, 3]].any(axis=1).all()


def test_one_expert_alone_gets_zeros() -> None:
    assert not ridge_gates(STATES, np.zeros(135, np.int64), 1, 0.1).any()


def test_prototypes_by_hand() -> None:
    made = prototype_gates(np.array([[3.0, 5.0], [1.0, 1.0]]), np.array([[0.0, 1.0], [1.0, 1.0]]))
    np.testing.assert_allclose(made, [[0.6, 0.8], [0.0, 0.0]])


def test_drawn_gates() -> None:
    drawn = random_gates(8, 500, seed=1, layer=2)
    assert abs(drawn.std() - 1) < 0.05
    np.testing.assert_array_equal(drawn, random_gates(8, 500, seed=1, layer=2))
    assert not np.array_equal(drawn, random_gates(8, 500, seed=1, layer=3))
    even = uniform_gates(8, 500, seed=1, layer=2)
    assert 0.9 * 500**-0.5 < np.abs(even).max() <= 500**-0.5


def test_condition_by_hand() -> None:
    gates = np.diag([6.0, 3.0, 0.0])
    assert condition(gates, 3) == math.inf
    assert condition(gates, 2) == pytest.approx(2.0)


def test_weights_are_a_softmax_over_the_largest() -> None:
    logits = np.log(np.array([[1.0, 6.0, 3.0], [5.0, 1.0, 1.0]]))
    np.testing.assert_allclose(top_weights(logits, 2), [[0, 2 / 3, 1 / 3], [5 / 6, 1 / 6, 0]], atol=1e-12)
    np.testing.assert_allclose(top_weights(logits, 9), [[0.1, 0.6, 0.3], [5 / 7, 1 / 7, 1 / 7]], atol=1e-12)


def test_choices_by_hand() -> None:
    logits = np.log(np.array([[1.0, 3.0], [3.0, 1.0], [1.0, 1.0]]))
    found = choices(logits, np.array([0, 0, 2]), 3, 1)
    np.testing.assert_allclose(found.first, [[0.5, 0.5], [math.nan, math.nan], [1, 0]])
    np.testing.assert_allclose(found.weight, [[0.5, 0.5], [math.nan, math.nan], [1, 0]])
    spread = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    np.testing.assert_allclose(found.entropy, [spread, math.nan, math.log(2)])
