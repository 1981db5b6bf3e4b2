"""Kinship from factors: sums and overlaps against whole matrices, ranks that are not full, nothing in common."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mediator_cli.cli.dendrogram import dendrogram
from mediator_cli.kernels.factors import Factors
from mediator_cli.stages.adapter_kinship import Overlap, directions_of, low_rank_sums, mean_overlap

OUT, IN = 9, 7


def factors(seed, rank, scaling=0.5, out=OUT, width=IN):
    generator = np.random.default_rng(seed)
    a, b = generator.normal(size=(rank, width)), generator.normal(size=(out, rank))
    return Factors(a.astype(np.float32), b.astype(np.float32), scaling)


def delta(one):
    return one.scaling * one.b.astype(np.float64) @ one.a.astype(np.float64)


def measured(parts):
    return low_rank_sums([None if part is None else directions_of(part) for part in parts], (OUT, IN))


@given(
    ranks=st.lists(st.integers(0, 9), min_size=2, max_size=4), scaling=st.floats(-2, 2).filter(lambda x: abs(x) > 1e-3)
)
def test_sums_are_those_of_whole_deltas(ranks, scaling):
    parts = [factors(seed, rank, scaling) for seed, rank in enumerate(ranks)]
    sums, overlap = measured(parts)
    rows = np.stack([delta(part).ravel() for part in parts])
    np.testing.assert_allclose(sums.gram, rows @ rows.T, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(sums.first, rows.sum(axis=1), rtol=1e-9, atol=1e-9)
    assert sums.size == OUT * IN
    for table in (overlap.outputs, overlap.inputs):
        assert np.isnan(table[~np.outer(ranks, ranks).astype(bool)]).all()
        assert ((table >= 0) & (table <= 1) | np.isnan(table)).all()


def projection(matrix):
    """Project onto the column space, by the pseudo-inverse."""
    return matrix @ np.linalg.pinv(matrix)


def test_overlap_is_that_of_projections():
    parts = [factors(1, 2), factors(2, 3), factors(3, 1)]
    _, overlap = measured(parts)
    for i, one in enumerate(parts):
        for j, other in enumerate(parts):
            smaller = min(one.rank, other.rank)
            outputs = np.trace(projection(delta(one)) @ projection(delta(other))) / smaller
            inputs = np.trace(projection(delta(one).T) @ projection(delta(other).T)) / smaller
            assert overlap.outputs[i, j] == pytest.approx(outputs, abs=1e-6)
            assert overlap.inputs[i, j] == pytest.approx(inputs, abs=1e-6)


def test_a_space_in_another_overlaps_wholly_and_orthogonal_ones_not_at_all():
    whole = factors(1, 4)
    inside = Factors(whole.a[:2] * np.float32(3), whole.b[:, :2], -1.0)
    basis = np.linalg.qr(np.concatenate([whole.a.T, np.random.default_rng(5).normal(size=(IN, 3))], axis=1))[0]
    beside = Factors(basis[:, 4:6].T.astype(np.float32), whole.b[:, :2])
    _, overlap = measured([whole, inside, beside])
    assert overlap.inputs[0, 1] == pytest.approx(1, abs=1e-9)
    assert overlap.outputs[0, 1] == pytest.approx(1, abs=1e-9)
    assert overlap.inputs[0, 2] == pytest.approx(0, abs=1e-9)
    assert overlap.outputs[1, 2] == pytest.approx(1, abs=1e-9)


def test_directions_are_as_many_as_the_delta_has():
    one = factors(1, 3)
    doubled = Factors(np.concatenate([one.a, one.a]), np.concatenate([one.b, one.b], axis=1), 0.5)
    found = directions_of(doubled)
    assert len(found.sizes) == 3
    np.testing.assert_allclose(found.left * found.sizes @ found.right, delta(doubled), atol=1e-9)
    assert len(directions_of(Factors(one.a, np.zeros_like(one.b))).sizes) == 0


def test_one_delta_has_itself_for_kin_however_it_is_factored():
    one = factors(1, 3)
    turn = np.linalg.qr(np.random.default_rng(2).normal(size=(3, 3)))[0].astype(np.float32)
    sums, overlap = measured([one, Factors(2 * turn @ one.a, one.b @ turn.T, 0.25), None])
    np.testing.assert_allclose(sums.gram[:2, :2], sums.gram[0, 0], rtol=1e-5)
    assert not sums.gram[2].any()
    assert overlap.inputs[0, 1] == pytest.approx(1, abs=1e-6)


def test_a_matrix_without_directions_has_no_say():
    nan = float("nan")
    parts = [Overlap(np.array([[1, 0.5], [0.5, 1]]), np.full((2, 2), nan)), Overlap(*[np.full((2, 2), nan)] * 2)]
    found = mean_overlap(parts, 2)
    assert found.outputs[0, 1] == 0.5
    assert np.isnan(found.inputs).all()
    assert np.isnan(mean_overlap([], 2).outputs).all()


def test_every_leaf_has_a_row_and_every_join_its_value():
    joins = [(("b",), ("c",), 0.2), (("a",), ("b", "c"), 1.0), (("a", "b", "c"), ("long",), 1.0)]
    lines = list(dendrogram(("a", "b", "c", "long"), joins, 0.0, "{:.1f}".format))
    assert lines == [
        "a    ────────────────────────────────────────┬┐",
        "b    ────────┬───────────────────────────────┘│  1.0",
        "c    ────────┘                                │  0.2",
        "long ─────────────────────────────────────────┘  1.0",
    ]
