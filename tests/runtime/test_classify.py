"""Linear classifiers against scikit-learn's and against algebra by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mediator_cli.runtime.classify import (
    Classifier,
    add_task,
    class_means,
    fit_classifier,
    logits,
    ridge_sums,
    shrunk_covariance,
    solve_ridge,
    standardisation,
)

KINDS = ("logistic", "gaussian", "prototype", "ridge")


def clouds(n_experts: int = 3, n_rows: int = 90, size: int = 6, seed: int = 0, apart: float = 2.0):
    """Draw correlated clouds of unequal sizes around one centre per expert, features of unequal scales."""
    draw = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(n_experts), draw.integers(0, n_experts, n_rows - n_experts) ** 2 % n_experts])
    centres = draw.normal(size=(n_experts, size)) * apart
    rows = centres[labels] + draw.normal(size=(n_rows, size)) @ draw.normal(size=(size, size))
    return (rows * np.logspace(-2, 2, size) + 5).astype(np.float32), labels


def standardised(features: np.ndarray) -> np.ndarray:
    from sklearn.preprocessing import StandardScaler

    return StandardScaler().fit_transform(features.astype(np.float64))


def softmaxed(rows: np.ndarray) -> np.ndarray:
    powers = np.exp(rows - rows.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def test_logits_by_hand():
    coefficients = np.array([[1.0, 0.0], [0.5, -2.0]])
    found = Classifier(coefficients, np.array([0.0, 10.0]), mean=np.array([1.0, 2.0]), scale=np.array([2.0, 0.5]))
    rows = np.array([[7.0, 4.0], [1.0, 2.0]], dtype=np.float32)  # standardised: (3, 4) and (0, 0)
    assert logits(found, rows).tolist() == [[3.0, 3.5], [0.0, 10.0]]
    unit = Classifier(coefficients, found.intercepts, found.mean, found.scale, unit=True)
    assert logits(unit, rows) == pytest.approx(np.array([[0.6, 10 + 0.3 - 1.6], [0.0, 10.0]]))


@pytest.mark.parametrize("n_experts", [2, 3])
def test_logistic_is_scikit_learns(n_experts):
    from sklearn.linear_model import LogisticRegression

    features, labels = clouds(n_experts, apart=0.5)
    found = logits(fit_classifier("logistic", features, labels, n_experts), features)
    reference = LogisticRegression(max_iter=5000).fit(standardised(features), labels)
    assert found.shape == (len(features), n_experts)
    assert softmaxed(found) == pytest.approx(reference.predict_proba(standardised(features)), abs=1e-4)


def test_gaussian_is_linear_discriminant_analysis_with_the_pooled_ledoit_wolf_covariance():
    from sklearn.covariance import LedoitWolf
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    features, labels = clouds(apart=0.5)
    z = standardised(features)
    centred = z - np.stack([z[labels == label].mean(axis=0) for label in labels])
    pooled = LedoitWolf(assume_centered=True).fit(centred).covariance_

    class Pooled:
        def fit(self, rows):
            self.covariance_ = pooled
            return self

    reference = LinearDiscriminantAnalysis(solver="lsqr", covariance_estimator=Pooled()).fit(z, labels)
    found = logits(fit_classifier("gaussian", features, labels, 3), features)
    assert softmaxed(found) == pytest.approx(reference.predict_proba(z), abs=1e-4)


def test_shrinkage_is_the_formula_of_ledoit_and_wolf():
    draw = np.random.default_rng(3)
    x = draw.normal(size=(40, 5)) @ draw.normal(size=(5, 5))
    x -= x.mean(axis=0)
    sample = x.T @ x / 40
    sphere = np.trace(sample) / 5 * np.eye(5)
    spread = np.square(sample - sphere).sum()
    noise = sum(np.square(np.outer(row, row) - sample).sum() for row in x) / 40**2
    share = min(noise, spread) / spread
    assert shrunk_covariance(x) == pytest.approx(share * sphere + (1 - share) * sample, abs=1e-5)


def test_prototype_is_the_cosine_to_the_mean_direction():
    from sklearn.metrics.pairwise import cosine_similarity
    from sklearn.preprocessing import normalize

    features, labels = clouds()
    units = normalize(standardised(features))
    means = np.stack([units[labels == expert].mean(axis=0) for expert in range(3)])
    found = fit_classifier("prototype", features, labels, 3)
    assert found.unit
    assert logits(found, features) == pytest.approx(cosine_similarity(units, means), abs=1e-5)


@pytest.mark.parametrize("n_experts", [2, 4])
def test_ridge_is_scikit_learns_on_one_hot_targets(n_experts):
    from sklearn.linear_model import Ridge, RidgeClassifier

    features, labels = clouds(n_experts, apart=0.7)
    z, penalty = standardised(features), 0.3 * len(features)
    found = logits(fit_classifier("ridge", features, labels, n_experts), features)
    reference = Ridge(alpha=penalty, solver="cholesky").fit(z, np.eye(n_experts)[labels])
    assert found == pytest.approx(reference.predict(z), abs=1e-4)
    chosen = RidgeClassifier(alpha=penalty).fit(z, labels).predict(z)
    assert (found.argmax(axis=1) == chosen).mean() > 0.98


@given(st.integers(0, 30), st.integers(2, 4))
def test_ridge_adds_a_task_as_if_all_prompts_were_there(seed, n_experts):
    features, labels = clouds(n_experts, seed=seed, n_rows=40)
    old = labels < n_experts - 1
    grown = add_task(ridge_sums(features[old], labels[old], n_experts - 1), features[~old])
    at_once = ridge_sums(features, labels, n_experts)
    assert grown.gram == pytest.approx(at_once.gram, rel=1e-12)
    assert grown.sums == pytest.approx(at_once.sums, rel=1e-12)
    assert grown.counts.tolist() == at_once.counts.tolist() == np.bincount(labels).tolist()
    expected = logits(fit_classifier("ridge", features, labels, n_experts), features)
    assert logits(solve_ridge(grown), features) == pytest.approx(expected, abs=1e-6)


def test_sums_of_ridge_by_hand():
    sums = ridge_sums(np.array([[1, 2], [3, 4], [5, 6]], dtype=np.float32), np.array([0, 1, 0]), 2)
    assert sums.gram.tolist() == [[35.0, 44.0], [44.0, 56.0]]
    assert sums.sums.tolist() == [[6.0, 8.0], [3.0, 4.0]]
    assert sums.counts.tolist() == [2.0, 1.0]


def test_ridge_keeps_features_far_from_zero():
    """Sums in float64: a mean of 3000 standard deviations costs no digit that float32 has."""
    features, labels = clouds(size=4)
    centred = standardised(features).astype(np.float32)
    near = logits(fit_classifier("ridge", centred, labels, 3), centred)
    far = centred + np.float32(4096)
    assert logits(fit_classifier("ridge", far, labels, 3), far) == pytest.approx(near, abs=5e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n_experts", [1, 2, 5])
def test_every_kind_tells_clear_clouds_apart(kind, n_experts):
    features, labels = clouds(n_experts, n_rows=200, apart=30.0, size=8)
    found = fit_classifier(kind, features, labels, n_experts)
    assert found.coefficients.shape == (n_experts, 8)
    assert (logits(found, features).argmax(axis=1) == labels).mean() >= 0.99


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_holds_what_is_stored_and_is_deterministic(kind):
    features, labels = clouds()
    first, second = (fit_classifier(kind, features, labels, 3) for _ in range(2))
    for name in ("coefficients", "intercepts", "mean", "scale"):
        array = getattr(first, name)
        assert (array == getattr(second, name)).all()
        assert (array == array.astype(np.float32)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_survives_features_that_say_nothing(kind):
    features, labels = clouds()
    features[:, 1] = 0.1
    found = fit_classifier(kind, features, labels, 3)
    moved = features.copy()
    moved[:, 1] += 1e-7
    assert np.isfinite(logits(found, features)).all()
    assert logits(found, moved) == pytest.approx(logits(found, features), abs=1e-4)
    same = np.ones((6, 2), dtype=np.float32)
    flat = logits(fit_classifier(kind, same, np.array([0, 1] * 3), 2), same)
    assert flat == pytest.approx(np.full((6, 2), flat[0, 0]))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_ignores_the_units_of_features(kind):
    features, labels = clouds()
    units = np.float32([2, 0.5, 4, 1, 8, 0.25])
    plain = logits(fit_classifier(kind, features, labels, 3), features)
    scaled = logits(fit_classifier(kind, features * units, labels, 3), features * units)
    assert scaled == pytest.approx(plain, abs=1e-4)


@given(st.permutations([0, 1, 2]))
def test_gaussian_and_ridge_permute_with_the_experts(order):
    features, labels = clouds()
    place = np.argsort(order)
    for kind in ("gaussian", "ridge", "prototype"):
        plain = logits(fit_classifier(kind, features, labels, 3), features)
        moved = logits(fit_classifier(kind, features, place[labels], 3), features)
        assert moved == pytest.approx(plain[:, order], abs=1e-5)


def test_a_constant_feature_gets_the_usual_scale():
    mean, scale = standardisation(np.array([0.0, 3.0, 1e6]), np.array([4.0, 5.0, 0.0]))
    assert mean.tolist() == [0.0, 3.0, 1e6]
    assert scale == pytest.approx([2.0, 5**0.5, 3**0.5])
    assert standardisation(np.zeros(2), np.zeros(2))[1].tolist() == [1.0, 1.0]


def test_class_means_by_hand():
    rows = np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 0.0]])
    assert class_means(rows, np.array([1, 0, 1]), 2).tolist() == [[3.0, 4.0], [3.0, 1.0]]


@pytest.mark.parametrize("labels", [[0, 0, 0], [0, 2, 2], [0, 1, 2]])
def test_an_expert_without_rows_is_a_defect_of_the_caller(labels):
    with pytest.raises(ValueError, match="each of 2 experts needs some"):
        fit_classifier("ridge", np.ones((3, 2), dtype=np.float32), np.array(labels), 2)
