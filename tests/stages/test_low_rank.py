"""The nearest matrix of low rank, by a sketch or exactly, against numpy's own decomposition."""

import numpy as np
import pytest

from mediator_cli.stages import low_rank
from mediator_cli.stages.low_rank import find_low_rank


def uniforms(shape):
    return np.random.default_rng(5).random(shape, np.float32)


def falling(rows, columns, power=1.0, seed=0):
    """A matrix whose singular values fall like k^-power."""
    generator = np.random.default_rng(seed)
    k = min(rows, columns)
    u, v = (np.linalg.qr(generator.standard_normal((side, k)))[0] for side in (rows, columns))
    return ((u * np.arange(1, k + 1) ** -power) @ v.T).astype(np.float32)


def made(found):
    return (found.found.u * found.found.s) @ found.found.vt


@pytest.mark.parametrize(("rows", "columns"), [(300, 200), (200, 300), (250, 250)])
@pytest.mark.parametrize("rank", [4, 16, 60])
def test_a_sketch_holds_nearly_the_best_share(rows, columns, rank):
    matrix = falling(rows, columns, power=0.5)
    squares = np.square(np.linalg.svd(matrix.astype(float))[1])
    best = squares[:rank].sum() / squares.sum()
    found = find_low_rank(matrix, rank, 1.0, uniforms)
    assert found.rank == rank
    assert best * 0.99 <= found.energy <= best * (1 + 1e-9)
    assert found.total == pytest.approx(squares.sum(), rel=1e-6)
    # What it says that it holds is what it holds.
    left = np.square(matrix - made(found)).sum() / squares.sum()
    assert 1 - left == pytest.approx(found.energy, abs=1e-6)


@pytest.mark.parametrize("energy", [0.3, 0.6, 0.9, 0.999])
def test_a_share_of_energy_takes_about_the_least_rank(energy):
    matrix = falling(300, 200, power=0.7)
    held = np.cumsum(np.square(np.linalg.svd(matrix.astype(float))[1]))
    least = int(np.argmax(held >= energy * held[-1])) + 1
    found = find_low_rank(matrix, 0, energy, uniforms)
    assert found.energy >= energy - 1e-9
    assert least <= found.rank <= least + max(1, least // 10)


def test_a_share_of_energy_ends_at_the_rank():
    assert find_low_rank(falling(300, 200, power=0.1), 8, 0.99, uniforms).rank == 8


def test_a_low_rank_matrix_is_held_whole():
    generator = np.random.default_rng(1)
    matrix = (generator.standard_normal((120, 3)) @ generator.standard_normal((3, 200))).astype(np.float32)
    found = find_low_rank(matrix, 3, 1.0, uniforms)
    np.testing.assert_allclose(made(found), matrix, rtol=1e-4, atol=1e-5)
    assert find_low_rank(matrix, 0, 0.999999, uniforms).rank == 3
    # A rank beyond that of the matrix adds nothing, by a sketch or exactly.
    for rank in (10, 50):
        beyond = find_low_rank(matrix, rank, 1.0, uniforms)
        assert (beyond.rank, beyond.energy) == (3, pytest.approx(1.0))
    assert find_low_rank(matrix, 0, 1.0, uniforms).rank == 3


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (4, 3)])
def test_small_matrices_are_held_whole(shape):
    matrix = np.random.default_rng(2).standard_normal(shape).astype(np.float32)
    found = find_low_rank(matrix, 16, 1.0, uniforms)
    assert found.rank == min(shape)
    np.testing.assert_allclose(made(found), matrix, rtol=1e-5, atol=1e-6)


def test_nothing_has_no_direction():
    found = find_low_rank(np.zeros((5, 4), np.float32), 2, 1.0, uniforms)
    assert (found.rank, found.energy, found.total) == (0, 1.0, 0.0)


def test_the_numbers_alone_choose_the_bits(monkeypatch):
    matrix = falling(300, 200, power=0.3)
    one, same = (find_low_rank(matrix, 8, 1.0, uniforms) for _ in range(2))
    assert np.array_equal(made(one), made(same))
    other = find_low_rank(matrix, 8, 1.0, lambda shape: np.random.default_rng(6).random(shape, np.float32))
    assert not np.array_equal(made(one), made(other))
    monkeypatch.setattr(low_rank, "_STEP", 1000)
    np.testing.assert_allclose(made(find_low_rank(matrix, 8, 1.0, uniforms)), made(one), rtol=1e-6, atol=1e-9)
