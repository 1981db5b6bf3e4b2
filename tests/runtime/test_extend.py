"""Routers with one expert more or less, against those fitted from scratch."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mediator_cli.runtime.classify import add_task, fit_classifier, logits, ridge_sums, solve_ridge
from mediator_cli.runtime.extend import add_centre, add_prototype, are_rows_of, drop_centre, drop_row, remove_task
from mediator_cli.runtime.outside import distances, fit_outside, outside_score


def clouds(n_experts: int = 3, n_rows: int = 40, size: int = 5, seed: int = 0):
    """Draw a cloud for each expert, features of unequal scales; rows of an expert stand together."""
    draw = np.random.default_rng(seed)
    labels = np.repeat(np.arange(n_experts), n_rows)
    rows = 2 * draw.normal(size=(n_experts, size))[labels] + draw.normal(size=(len(labels), size))
    return (rows * np.logspace(-1, 1, size) + 3).astype(np.float32), labels


@given(st.integers(0, 50), st.integers(0, 2))
def test_a_task_taken_out_of_ridge_leaves_the_fit_of_the_others(seed, gone):
    features, labels = clouds(seed=seed)
    rest = labels != gone
    left = remove_task(ridge_sums(features, labels, 3), gone, features[~rest])
    whole = ridge_sums(features[rest], labels[rest] - (labels[rest] > gone), 2)
    assert left.counts.tolist() == whole.counts.tolist()
    np.testing.assert_allclose(left.sums, whole.sums, rtol=1e-9)
    np.testing.assert_allclose(left.gram, whole.gram, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(
        logits(solve_ridge(left), features), logits(solve_ridge(whole), features), rtol=1e-4, atol=1e-5
    )


def test_adding_a_task_and_taking_it_out_again_changes_nothing():
    features, labels = clouds()
    old = ridge_sums(features[labels < 2], labels[labels < 2], 2)
    back = remove_task(add_task(old, features[labels == 2]), 2, features[labels == 2])
    np.testing.assert_allclose(back.gram, old.gram, rtol=1e-9)
    assert back.sums.tolist() == old.sums.tolist()


def test_without_its_rows_a_task_is_taken_out_by_its_mean_and_the_scatter_of_all():
    features, labels = clouds(seed=3)
    left = remove_task(ridge_sums(features, labels, 3), 1)
    x = features.astype(np.float64)
    scatter = sum(np.cov(x[labels == k].T, bias=True) * 40 for k in range(3))
    between = sum(40 * np.outer(m, m) for m in (x[labels == k].mean(axis=0) for k in (0, 2)))
    np.testing.assert_allclose(left.gram, between + scatter * 80 / 120, rtol=1e-9)
    assert left.counts.tolist() == [40, 40]
    # Where all tasks scatter alike that is nearly the fit without it: the same prompts get the same answers.
    rest = labels != 1
    whole = fit_classifier("ridge", features[rest], labels[rest] // 2, 2)
    assert (logits(solve_ridge(left), features).argmax(1) == logits(whole, features).argmax(1)).mean() > 0.98


def test_rows_are_known_by_their_number_and_sum():
    features, labels = clouds()
    sums = ridge_sums(features, labels, 3)
    own = features[labels == 1]
    assert are_rows_of(sums, 1, own)
    assert are_rows_of(sums, 1, own[::-1])
    assert not are_rows_of(sums, 1, features[labels == 2])
    assert not are_rows_of(sums, 1, own[:-1])
    assert not are_rows_of(sums, 1, own + np.eye(len(own), own.shape[1], dtype=np.float32))


def test_a_prototype_that_is_added_is_the_one_of_a_fit_that_standardises_alike():
    features, labels = clouds()
    whole = fit_classifier("prototype", features, labels, 3)
    old = drop_row(whole, 2)
    grown = add_prototype(old, features[labels == 2])
    np.testing.assert_allclose(grown.coefficients, whole.coefficients, rtol=1e-6)
    assert grown.coefficients[:2].tolist() == whole.coefficients[:2].tolist()
    assert grown.intercepts.tolist() == [0, 0, 0]


@pytest.mark.parametrize("kind", ["logistic", "gaussian"])
def test_a_dropped_logit_leaves_the_ratios_of_the_others(kind):
    features, labels = clouds()
    whole = fit_classifier(kind, features, labels, 3)
    rest = logits(drop_row(whole, 0), features)
    assert rest == pytest.approx(logits(whole, features)[:, 1:])


def test_a_centre_that_is_added_is_that_of_a_fit_with_the_same_covariances():
    features, labels = clouds()
    whole = fit_outside(features, labels, 3)
    grown = add_centre(drop_centre(whole, 2), features[labels == 2])
    np.testing.assert_allclose(grown.centres, whole.centres, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(outside_score(grown, features), outside_score(whole, features), rtol=1e-4, atol=1e-4)


def test_a_new_centre_brings_no_prompt_further_outside_and_its_own_nearer():
    features, labels = clouds(seed=1)
    old = fit_outside(features[labels < 2], labels[labels < 2], 2)
    new = add_centre(old, features[labels == 2])
    before, after = distances(old, features)[1], distances(new, features)[1]
    assert (after <= before).all()
    assert after[labels == 2].mean() < before[labels == 2].mean()
