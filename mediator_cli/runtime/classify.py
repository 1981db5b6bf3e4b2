"""Linear classifiers over prompt features: which expert's task is this? Fitted in float64, stored in float32."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Ints = NDArray[np.integer]

Kind = Literal["logistic", "gaussian", "prototype", "ridge"]
_CONSTANT = 1e-12
"""A feature whose variance is this small beside its square and the other variances says nothing."""
_LEAST_VARIANCE = 1e-6
_RIDGE = 0.3
"""Penalty of ridge per row, in units of a standardised feature's variance."""
_LEAST_SHARE = 1e-4
_LOGISTIC = 1.0
"""Inverse penalty C of logistic."""


@dataclass(frozen=True, eq=False)
class Classifier:
    """A linear map from standardised features to logits; `unit` scales the features of a row to length 1 first.

    coefficients [experts, features], intercepts [experts], mean [features], scale [features]; the values are
    float32, held as float64, so that a router answers with the same bits before and after it was stored.
    """

    coefficients: Floats
    intercepts: Floats
    mean: Floats
    scale: Floats
    unit: bool = False


@dataclass(frozen=True, eq=False)
class RidgeSums:
    """All that ridge keeps of its prompts: gram XᵀX [features, features], sums of X by expert [experts, features].

    `counts` [experts] are the rows of each expert. Float64: means are subtracted from them later.
    """

    gram: Floats
    sums: Floats
    counts: Floats


def logits(classifier: Classifier, features: NDArray[np.floating]) -> Floats:
    """Score features [rows, features] for each expert [rows, experts]; softmax makes them probabilities."""
    z = (features.astype(np.float64) - classifier.mean) / classifier.scale
    if classifier.unit:
        z = unit_rows(z)
    scores: Floats = z @ classifier.coefficients.T + classifier.intercepts
    return scores


def fit_classifier(kind: Kind, features: NDArray[np.floating], labels: Ints, n_experts: int) -> Classifier:
    """Fit a classifier to features [rows, features] of prompts and the expert of each [rows].

    Deterministic. Raises ValueError when an expert has no row.
    """
    counts_by_expert(labels, n_experts)
    x = features.astype(np.float64)
    if kind == "ridge":
        return solve_ridge(ridge_sums(x, labels, n_experts))
    mean, scale = standardisation(x.mean(axis=0), x.var(axis=0))
    z = (x - mean) / scale
    if kind == "logistic":
        coefficients, intercepts = _fit_logistic(z, labels, n_experts)
    elif kind == "gaussian":
        coefficients, intercepts = _fit_gaussian(z, labels, n_experts)
    else:
        directions = unit_rows(class_means(unit_rows(z), labels, n_experts))
        coefficients, intercepts = directions, np.zeros(n_experts)
    return Classifier(as_stored(coefficients), as_stored(intercepts), mean, scale, unit=kind == "prototype")


def fit_shares(features: NDArray[np.floating], shares: Floats) -> Classifier:
    """Fit softmax regression to features [rows, features] and the shares of experts [rows, experts], rows of sum 1.

    Its probabilities approach the mean shares of rows with such features, E[share | features]. Every expert needs a
    share in some row. Deterministic.
    """
    x = features.astype(np.float64)
    n_experts = shares.shape[1]
    mean, scale = standardisation(x.mean(axis=0), x.var(axis=0))
    rows, labels = np.nonzero(shares > _LEAST_SHARE)
    counts_by_expert(labels, n_experts)
    z = ((x - mean) / scale)[rows]
    coefficients, intercepts = _fit_logistic(z, labels, n_experts, shares[rows, labels])
    return Classifier(as_stored(coefficients), as_stored(intercepts), mean, scale)


def counts_by_expert(labels: Ints, n_experts: int) -> NDArray[np.int64]:
    """Count the rows of each expert [experts]; raise ValueError when one has none or a label is unknown."""
    counts = np.bincount(labels, minlength=n_experts)
    if len(counts) > n_experts or not counts.all():
        raise ValueError(f"rows by expert: {counts.tolist()}; each of {n_experts} experts needs some")
    return counts


def class_means(features: Floats, labels: Ints, n_experts: int) -> Floats:
    """Mean of the features [rows, features] of each expert [experts, features]."""
    return np.stack([features[labels == expert].mean(axis=0) for expert in range(n_experts)])


def standardisation(mean: Floats, variance: Floats) -> tuple[Floats, Floats]:
    """Give mean and scale [features] that bring features to mean 0 and variance 1, as they will be stored.

    A feature that never varied gets the root mean square scale of the others: a later change of it then counts
    like a change of any feature, instead of without limit.
    """
    typical = float(variance.mean()) or 1.0
    varies = variance > _CONSTANT * (np.square(mean) + typical)
    return as_stored(mean), as_stored(np.sqrt(np.where(varies, variance, typical)))


def as_stored(array: Floats) -> Floats:
    """Round to float32, in which arrays are stored, and hold the result as float64."""
    return array.astype(np.float32).astype(np.float64)


def unit_rows(rows: Floats) -> Floats:
    """Scale each row [rows, features] to length 1; a row of zeros stays."""
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(lengths > 0, lengths, 1.0)


def shrunk_covariance(centred: Floats) -> Floats:
    """Covariance [features, features] of centred rows [rows, features], shrunk towards a sphere.

    The amount is that of Ledoit and Wolf 2004, "A well-conditioned estimator for large-dimensional covariances".
    """
    from sklearn.covariance import ledoit_wolf

    covariance, _ = ledoit_wolf(centred, assume_centered=True)
    shrunk: Floats = covariance + _LEAST_VARIANCE * np.eye(centred.shape[1])
    return shrunk


def _fit_logistic(z: Floats, labels: Ints, n_experts: int, weights: Floats | None = None) -> tuple[Floats, Floats]:
    from sklearn.linear_model import LogisticRegression

    if n_experts == 1:
        return np.zeros((1, z.shape[1])), np.zeros(1)
    fitted = LogisticRegression(C=_LOGISTIC, max_iter=5000).fit(z, labels, sample_weight=weights)
    coefficients: Floats = fitted.coef_
    intercepts: Floats = fitted.intercept_
    if n_experts == 2:
        # scikit-learn gives one row, the log odds of the second expert.
        coefficients = np.vstack([-coefficients, coefficients]) / 2
        intercepts = np.append(-intercepts, intercepts) / 2
    return coefficients, intercepts


def _fit_gaussian(z: Floats, labels: Ints, n_experts: int) -> tuple[Floats, Floats]:
    """Linear discriminant analysis: w = Σ⁻¹μ, b = -½ μᵀΣ⁻¹μ + ln(share of rows)."""
    means = class_means(z, labels, n_experts)
    coefficients = np.linalg.solve(shrunk_covariance(z - means[labels]), means.T).T.astype(np.float64)
    shares = counts_by_expert(labels, n_experts) / len(labels)
    intercepts: Floats = np.log(shares) - 0.5 * (means * coefficients).sum(axis=1)
    return coefficients, intercepts


def ridge_sums(features: NDArray[np.floating], labels: Ints, n_experts: int) -> RidgeSums:
    """Sum up features [rows, features] and the expert of each row [rows] for ridge."""
    x = features.astype(np.float64)
    counts = counts_by_expert(labels, n_experts).astype(np.float64)
    return RidgeSums(x.T @ x, class_means(x, labels, n_experts) * counts[:, None], counts)


def add_task(sums: RidgeSums, features: NDArray[np.floating]) -> RidgeSums:
    """Add an expert by the features [rows, features] of its prompts, without those of the others.

    The result is what `ridge_sums` gives for all prompts at once, the new expert being the last.
    """
    x = features.astype(np.float64)
    return RidgeSums(sums.gram + x.T @ x, np.vstack([sums.sums, x.sum(axis=0)]), np.append(sums.counts, float(len(x))))


def solve_ridge(sums: RidgeSums) -> Classifier:
    """Solve ridge regression on one-hot targets in closed form: W = (ZᵀZ + λ·rows·I)⁻¹ ZᵀY, Z standardised."""
    n_rows = sums.counts.sum()
    mean = sums.sums.sum(axis=0) / n_rows
    centred_gram = sums.gram - n_rows * np.outer(mean, mean)
    _, scale = standardisation(mean, np.maximum(np.diag(centred_gram) / n_rows, 0.0))
    gram = centred_gram / np.outer(scale, scale)
    targets = (sums.sums - sums.counts[:, None] * mean) / scale
    coefficients = np.linalg.solve(gram + _RIDGE * n_rows * np.eye(len(gram)), targets.T).T
    return Classifier(as_stored(coefficients), as_stored(sums.counts / n_rows), as_stored(mean), scale)
