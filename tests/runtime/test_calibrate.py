"""Temperature, log loss, calibration error, confusion and AUROC against scikit-learn, scipy and hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mediator_cli.runtime.calibrate import (
    auroc,
    calibration_error,
    confusion,
    fit_temperature,
    log_loss,
    softmax,
)


def noisy_logits(seed: int, n_rows: int = 200, n_experts: int = 4, size: float = 2.0):
    """Draw logits that favour the true expert of each row, with errors."""
    draw = np.random.default_rng(seed)
    labels = draw.integers(0, n_experts, n_rows)
    logits = draw.normal(size=(n_rows, n_experts)) * size
    logits[np.arange(n_rows), labels] += size
    return logits, labels


def test_softmax_by_hand_and_without_overflow():
    rows = np.array([[0.0, math.log(3)], [1e4, 0.0]])
    assert softmax(rows) == pytest.approx(np.array([[0.25, 0.75], [1, 0]]))
    assert softmax(rows, 0.5)[0] == pytest.approx([0.1, 0.9])
    assert softmax(rows, 1e9) == pytest.approx(np.full((2, 2), 0.5), abs=1e-5)


@given(st.integers(0, 50), st.floats(0.1, 10))
def test_softmax_is_scipys(seed, temperature):
    from scipy.special import softmax as reference

    logits, _ = noisy_logits(seed, n_rows=5)
    assert softmax(logits, temperature) == pytest.approx(reference(logits / temperature, axis=1), abs=1e-12)


@given(st.integers(0, 20), st.floats(0.2, 20))
def test_temperature_is_where_scipy_finds_the_least_loss(seed, size):
    from scipy.optimize import minimize_scalar

    logits, labels = noisy_logits(seed, size=size)

    def loss(log_temperature: float) -> float:
        p = softmax(logits, math.exp(log_temperature))
        # the row of unknown expert, in the mean over rows of its log loss
        unknown = -np.log(np.maximum(p, 1e-300)).mean()
        true = -np.log(np.maximum(p[np.arange(len(labels)), labels], 1e-300)).mean()
        return float(len(labels) * true + unknown)

    best = minimize_scalar(loss, bounds=(-6, 9), method="bounded", options={"xatol": 1e-9})
    assert fit_temperature(logits, labels) == pytest.approx(math.exp(best.x), rel=1e-4)


def test_temperature_undoes_a_scale_that_was_put_on_true_log_odds():
    draw = np.random.default_rng(0)
    logits = draw.normal(size=(20000, 3))
    labels = (softmax(logits).cumsum(axis=1) < draw.random((20000, 1))).sum(axis=1)
    assert fit_temperature(7 * logits, labels) == pytest.approx(7, rel=0.05)
    assert fit_temperature(logits / 50, labels) == pytest.approx(0.02, rel=0.05)


@given(st.integers(0, 20), st.floats(1e-3, 1e3), st.floats(-5, 5))
def test_temperature_scales_with_the_logits_and_ignores_shifts(seed, factor, shift):
    logits, labels = noisy_logits(seed, n_rows=30)
    expected = factor * fit_temperature(logits, labels)
    assert fit_temperature(factor * (logits + shift), labels) == pytest.approx(expected, rel=1e-9)


def test_temperature_of_a_set_without_errors_stays_finite():
    """Two rows, gap 1: the row of unknown expert makes the target 2.5 of 3 right, so p = 5/6 and 1/T = ln 5."""
    logits = np.array([[1.0, 0.0], [0.0, 1.0]])
    assert fit_temperature(logits, np.array([0, 1])) == pytest.approx(1 / math.log(5))
    rows, labels = np.tile(logits, (500, 1)), np.tile([0, 1], 500)
    assert fit_temperature(rows, labels) == pytest.approx(1 / math.log(1000.5 / 0.5))


def test_temperature_of_useless_logits():
    assert fit_temperature(np.full((3, 2), 4.0), np.array([0, 1, 0])) == 1.0
    assert fit_temperature(np.zeros((2, 1)), np.array([0, 0])) == 1.0
    wrong = np.array([[0.0, 1.0], [1.0, 0.0]])
    probabilities = softmax(wrong, fit_temperature(wrong, np.array([0, 1])))
    assert probabilities == pytest.approx(np.full((2, 2), 0.5), abs=1e-3)


@given(st.integers(0, 50))
def test_log_loss_is_scikit_learns(seed):
    from sklearn.metrics import log_loss as reference

    logits, labels = noisy_logits(seed, n_rows=12, size=40.0 if seed % 2 else 1.0)
    p = softmax(logits)
    assert log_loss(p, labels) == pytest.approx(reference(labels, p, labels=range(4)), rel=1e-9)


def test_log_loss_by_hand():
    assert log_loss(np.array([[0.5, 0.5], [0.1, 0.9]]), np.array([0, 1])) == pytest.approx(-math.log(0.45) / 2)
    assert math.isfinite(log_loss(np.array([[0.0, 1.0]]), np.array([0])))


def test_calibration_error_by_hand():
    p = np.array([[0.9, 0.1], [0.92, 0.08], [0.4, 0.6], [0.35, 0.65]])
    # fifteen bins: 0.9 lies in (13/15, 14/15] with 0.92; 0.6 on the edge of (8/15, 9/15]; 0.65 in (9/15, 10/15]
    labels = np.array([0, 1, 1, 0])
    assert calibration_error(p, labels) == pytest.approx((abs(1 - 0.9 - 0.92) + 0.4 + 0.65) / 4)
    assert calibration_error(p, labels, bins=1) == pytest.approx(abs(2 - 0.9 - 0.92 - 0.6 - 0.65) / 4)
    assert calibration_error(np.array([[1.0, 0.0]]), np.array([0])) == 0.0


@given(st.integers(0, 30), st.integers(1, 20))
def test_calibration_error_is_the_definition_bin_by_bin(seed, bins):
    logits, labels = noisy_logits(seed, n_rows=60)
    p = softmax(logits)
    top, right = p.max(axis=1), p.argmax(axis=1) == labels
    expected = 0.0
    for n in range(bins):
        rows = (top > n / bins) & (top <= (n + 1) / bins)
        if rows.any():
            expected += rows.mean() * abs(right[rows].mean() - top[rows].mean())
    assert calibration_error(p, labels, bins) == pytest.approx(expected, abs=1e-12)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=30))
def test_confusion_is_scikit_learns(pairs):
    from sklearn.metrics import confusion_matrix

    labels, chosen = (np.array(column) for column in zip(*pairs, strict=True))
    assert confusion(labels, chosen, 4).tolist() == confusion_matrix(labels, chosen, labels=range(4)).tolist()


def test_confusion_counts_true_by_chosen():
    assert confusion(np.array([0, 0, 1]), np.array([1, 1, 1]), 3).tolist() == [[0, 2, 0], [0, 1, 0], [0, 0, 0]]


@given(st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=2, max_size=40))
def test_auroc_is_scikit_learns_and_the_share_of_pairs(pairs):
    from sklearn.metrics import roc_auc_score

    scores = np.array([score for score, _ in pairs], dtype=np.float64)
    positive = np.array([flag for _, flag in pairs])
    if positive.all() or not positive.any():
        assert math.isnan(auroc(scores, positive))
        return
    gaps = scores[positive][:, None] - scores[~positive]
    found = auroc(scores, positive)
    assert found == ((gaps > 0).sum() + 0.5 * (gaps == 0).sum()) / gaps.size
    assert found == pytest.approx(roc_auc_score(positive, scores), abs=1e-12)
