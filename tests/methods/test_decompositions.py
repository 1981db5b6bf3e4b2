"""How matrices are taken apart in float64: as well as by LAPACK's SVD, without directions that are rounding."""

import numpy as np
import pytest
from spectral_cases import draw_low, naive_polar, rotation

from mediator_cli import MediatorError
from mediator_cli.methods import _matrix
from mediator_cli.methods._matrix import eigh, floor_of, polar, rank_of, spectrum, svd, triplets


def conditioned(shape, smallest, seed=0):
    """A matrix whose singular values fall evenly from 1 to the smallest."""
    k = min(shape)
    s = np.geomspace(1, smallest, k)
    return (rotation(shape[0], seed)[:, :k] * s) @ rotation(shape[1], seed + 1)[:k], s


@pytest.mark.parametrize("shape", [(40, 30), (30, 40), (35, 35)])
def test_small_singular_values_are_as_good_as_those_of_lapack(shape):
    matrix, s = conditioned(shape, 5e-6)
    found = triplets(matrix)
    assert len(found.s) == min(shape)
    np.testing.assert_allclose(found.s, s, rtol=1e-9)
    np.testing.assert_allclose((found.u * found.s) @ found.vt, matrix, atol=1e-13)
    np.testing.assert_allclose(found.u.T @ found.u, np.eye(len(s)), atol=1e-8)
    np.testing.assert_allclose(found.vt @ found.vt.T, np.eye(len(s)), atol=1e-8)
    np.testing.assert_allclose(polar(matrix), naive_polar(matrix), atol=1e-8)


def test_only_as_many_triplets_as_asked_for():
    matrix, s = conditioned((40, 30), 5e-6)
    np.testing.assert_allclose(triplets(matrix, most=7).s, s[:7], rtol=1e-10)
    np.testing.assert_allclose(triplets(matrix, above=0.01).s, s[s > 0.01], rtol=1e-10)
    assert len(triplets(matrix, scale=1e4).s) == np.count_nonzero(s > floor_of(1e4, (40, 30)))


@pytest.mark.parametrize("rank", [1, 4, 16])
def test_rounding_to_float32_adds_no_rank(rank):
    low = draw_low((80, 60), rank, n=1)[0]
    s = svd(low).s
    assert len(s) == 60
    assert rank_of(s, low.shape) == len(spectrum(low.astype(np.float64)).s) == rank
    assert s[rank] < floor_of(s[0], low.shape) / 2


def test_nothing_has_no_directions():
    empty = triplets(np.zeros((4, 3)))
    assert (empty.u.shape, empty.s.shape, empty.vt.shape) == ((4, 0), (0,), (0, 3))
    assert not polar(np.zeros((4, 3))).any()
    assert rank_of(np.zeros(3), (4, 3)) == 0


def test_polar_of_equal_columns_has_no_direction_by_chance():
    column = rotation(5, 1)[:, :1]
    np.testing.assert_allclose(polar(np.hstack([column, column])), np.hstack([column, column]) / np.sqrt(2))


def fail(*args, **kwargs):
    raise np.linalg.LinAlgError("did not converge")


def test_another_way_is_tried_where_lapack_does_not_converge(monkeypatch):
    matrix, s = conditioned((20, 15), 1e-3)
    monkeypatch.setattr(np.linalg, "eigh", fail)
    np.testing.assert_allclose(triplets(matrix).s, s, rtol=1e-9)
    real = np.linalg.svd
    monkeypatch.setattr(np.linalg, "svd", lambda m, **how: fail() if m.shape[0] > m.shape[1] else real(m, **how))
    found = svd(matrix)
    np.testing.assert_allclose((found.u * found.s) @ found.vt, matrix, atol=1e-13)


def test_a_matrix_that_no_way_takes_apart_is_named_by_its_shape(monkeypatch):
    monkeypatch.setattr(np.linalg, "svd", fail)
    with pytest.raises(MediatorError, match="matrix of 4 x 3"):
        svd(np.ones((4, 3)))
    monkeypatch.setattr(np.linalg, "eigh", fail)
    with pytest.raises(MediatorError, match="matrix of 3 x 3"):
        eigh(np.eye(3))


def test_eigenvalues_below_zero_count_as_zero():
    values, _ = eigh(np.diag([1.0, -1e-17, 0.5]))
    assert values.tolist() == [1.0, 0.5, 0.0]
    assert _matrix.shared_rank((8, 6), 4) == 1
    assert _matrix.shared_rank((8, 6), 7) == 1
