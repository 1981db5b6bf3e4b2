"""How unlike all tasks an input is."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mediator_cli.runtime.calibrate import auroc
from mediator_cli.runtime.outside import MOST_DIRECTIONS, OutsideModel, distances, fit_outside, outside_score


def clouds(seed: int = 0, n_experts: int = 4, n_rows: int = 400, size: int = 20, n_bare: int = 0):
    """Draw clouds of one covariance around one centre per expert; the last `n_bare` features are noise alone."""
    draw = np.random.default_rng(seed)
    centres = draw.normal(size=(n_experts, size)) * 4
    centres[:, size - n_bare :] = 0
    shape = draw.normal(size=(size, size)) / size**0.5 + np.eye(size)
    labels = draw.integers(0, n_experts, n_rows)
    return (centres[labels] + draw.normal(size=(n_rows, size)) @ shape).astype(np.float32), labels


def by_hand() -> OutsideModel:
    """Two directions of three features; tasks at ±2 along the first, whose own deviation is a half."""
    return OutsideModel(
        mean=np.array([1.0, 0.0, 0.0]),
        scale=np.array([1.0, 2.0, 1.0]),
        directions=np.array([[1.0, 0, 0], [0, 1, 0]]),
        whitening=np.diag([2.0, 1.0]),
        background=np.diag([0.5, 1.0]),
        centres=np.array([[4.0, 0.0], [-4.0, 0.0]]),
        residual_variance=np.array([0.25]),
        usual=np.array([-3.0]),
        steps=np.array([2.0, 100.0]),
    )


def test_distances_and_score_by_hand():
    rows = np.array([[3, 0, 0], [1, 0, 0], [3, 6, 1], [1, 0, 50]], dtype=np.float32)
    relative, plain = distances(by_hand(), rows)
    # standardised: (2, 0, 0), (0, 0, 0), (2, 3, 1), (0, 0, 50)
    assert relative.tolist() == [0 - 1, 16 - 0, 9 - 1 - 9, 16 - 0]
    assert plain.tolist() == [0, 16 / 3, (9 + 4) / 3, (16 + 10000) / 3]
    assert outside_score(by_hand(), rows).tolist() == [1.0, 9.5, 1.0, 10016 / 300]


def test_plain_distance_is_mahalanobis_with_ledoit_wolf_where_all_directions_are_kept():
    from sklearn.covariance import LedoitWolf
    from sklearn.preprocessing import StandardScaler

    features, labels = clouds(size=5, n_experts=3)
    z = StandardScaler().fit_transform(features.astype(np.float64))
    means = np.stack([z[labels == expert].mean(axis=0) for expert in range(3)])
    own = LedoitWolf(assume_centered=True).fit(z - means[labels])
    nearest = np.min([own.mahalanobis(z - mean) for mean in means], axis=0)
    whole = LedoitWolf(assume_centered=True).fit(z).mahalanobis(z)
    relative, plain = distances(fit_outside(features, labels, 3), features)
    assert plain == pytest.approx(nearest / 5, rel=1e-3)
    assert relative == pytest.approx(nearest - whole, rel=1e-3, abs=1e-3)


def test_directions_are_the_principal_ones_and_the_rest_is_the_residual():
    from sklearn.decomposition import PCA
    from sklearn.preprocessing import StandardScaler

    draw = np.random.default_rng(1)
    features = (draw.normal(size=(600, 100)) * np.r_[np.full(8, 9.0), np.ones(92)]) @ draw.normal(size=(100, 100))
    labels = np.arange(600) % 2
    model = fit_outside(features, labels, 2)
    z = StandardScaler().fit_transform(features)
    reference = PCA(MOST_DIRECTIONS, svd_solver="full").fit(z)
    assert model.directions.shape == (MOST_DIRECTIONS, 100)
    assert model.directions @ model.directions.T == pytest.approx(np.eye(MOST_DIRECTIONS), abs=1e-5)
    overlap = np.linalg.svd(model.directions[:8] @ reference.components_[:8].T, compute_uv=False)
    assert overlap == pytest.approx(np.ones(8), abs=1e-3)
    assert model.residual_variance[0] == pytest.approx(reference.noise_variance_, rel=0.03)


@pytest.mark.parametrize("size", [5, 60, 300])
def test_inputs_of_the_tasks_are_usual(size):
    """A share close to what was meant lies above 1, in rows fitted and in new ones; the plain distance is about 1."""
    features, labels = clouds(n_rows=4000, size=size)
    model = fit_outside(features[:2000], labels[:2000], 4)
    assert distances(model, features[2000:])[1].mean() == pytest.approx(1.0, abs=0.15)
    assert np.mean(outside_score(model, features[:2000]) > 1) == pytest.approx(0.01, abs=0.002)
    assert np.mean(outside_score(model, features[2000:]) > 1) == pytest.approx(0.01, abs=0.01)
    assert abs(np.median(outside_score(model, features[2000:]))) < 0.4


def test_a_task_that_was_left_out_is_outside():
    features, labels = clouds(n_rows=2000, size=40, n_bare=20)
    known = labels < 3
    model = fit_outside(features[known], labels[known], 3)
    scores = outside_score(model, features)
    assert auroc(scores, ~known) > 0.99
    assert np.mean(scores[~known] > np.quantile(scores[known], 0.99)) > 0.9


def test_scatter_that_short_prompts_have_hides_no_task_from_the_relative_distance():
    """Means over few tokens scatter more, in every direction: most of the plain distance, none of the relative one."""
    draw = np.random.default_rng(0)
    labels = draw.integers(0, 4, 3000)
    scatter = draw.normal(size=(3000, 40)) * draw.choice([0.3, 2.0], size=(3000, 1))
    features = np.eye(4, 40)[labels] * 6 + scatter
    known = labels < 3
    model = fit_outside(features[known], labels[known], 3)
    _, plain = distances(model, features)
    assert auroc(plain, ~known) < 0.8
    assert auroc(outside_score(model, features), ~known) > 0.97


@given(st.integers(0, 20), st.integers(0, 19))
def test_far_away_is_outside_in_every_direction(seed, column):
    features, labels = clouds(seed, n_rows=200)
    model = fit_outside(features, labels, 4)
    step = np.zeros((1, 20))
    step[0, column] = 1000
    assert outside_score(model, features[:1] + step)[0] > 10
    assert outside_score(model, features[:1] + 2 * step)[0] > outside_score(model, features[:1] + step)[0]


def test_features_of_a_plane_flag_what_leaves_it():
    draw = np.random.default_rng(0)
    features = draw.normal(size=(60, 2)) @ draw.normal(size=(2, 30))
    model = fit_outside(features, np.arange(60) % 2, 2)
    assert outside_score(model, features).max() < 2
    assert outside_score(model, features[:1] + draw.normal(size=(1, 30)))[0] > 100


@given(st.integers(1, 8), st.integers(1, 6), st.integers(1, 3))
def test_few_rows_and_features_give_finite_scores(n_rows, size, n_experts):
    n_rows = max(n_rows, 2, n_experts)
    draw = np.random.default_rng(n_rows)
    for features in (draw.normal(size=(n_rows, size)), np.ones((n_rows, size))):
        model = fit_outside(features, np.arange(n_rows) % n_experts, n_experts)
        assert np.isfinite(outside_score(model, features)).all()
        assert (model.steps > 0).all()


def test_the_model_holds_what_is_stored_and_is_deterministic():
    features, labels = clouds()
    first, second = (fit_outside(features, labels, 4) for _ in range(2))
    for name, array in vars(first).items():
        assert (array == vars(second)[name]).all()
        assert (array == array.astype(np.float32)).all()


def test_a_score_does_not_depend_on_the_batch():
    features, labels = clouds()
    model = fit_outside(features, labels, 4)
    alone = [outside_score(model, features[n : n + 1])[0] for n in range(20)]
    assert outside_score(model, features)[:20] == pytest.approx(alone, rel=1e-9)


def test_an_expert_without_rows_is_a_defect_of_the_caller():
    with pytest.raises(ValueError, match="each of 2 experts needs some"):
        fit_outside(np.ones((3, 2)), np.zeros(3, dtype=int), 2)
