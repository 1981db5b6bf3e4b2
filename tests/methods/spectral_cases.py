"""Matrices, and methods called on them as a recipe has them; for tests of methods that take matrices apart."""

import numpy as np
import pytest

from mediator_cli.methods.registry import resolve_method

NAMES = ["iso_c", "iso_cts", "tsv_m", "r_tsvm_like", "svc", "drm", "stf_like"]
each_method = pytest.mark.parametrize("name", NAMES)
each_shape = pytest.mark.parametrize("shape", [(12, 7), (7, 12), (9, 9), (2, 5)])


def merge(name, matrices, weights=None, **params):
    """Merge matrices [n, rows, columns] with parameters as a recipe has them."""
    weights = np.ones(len(matrices)) if weights is None else np.array(weights)
    return resolve_method(name, None, params, str)(np.array(matrices, np.float32), weights)


def draw(shape, n=3, seed=0):
    return np.random.default_rng(seed).standard_normal((n, *shape)).astype(np.float32)


def draw_low(shape, rank, n=2, seed=0):
    """Matrices of low rank, rounded to float32."""
    left = np.random.default_rng(seed).standard_normal((n, shape[0], rank))
    right = np.random.default_rng(seed + 1).standard_normal((n, rank, shape[1]))
    return (left @ right).astype(np.float32)


def rotation(size, seed):
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((size, size)))[0]


def decompose(matrix):
    return np.linalg.svd(np.asarray(matrix, np.float64), full_matrices=False)


def naive_polar(matrix):
    u, _, vt = np.linalg.svd(matrix, full_matrices=False)
    return u @ vt
