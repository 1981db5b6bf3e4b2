"""Corrections of a shared feed-forward block: exact in the neurons that they hold, nothing elsewhere."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mediator_cli.stages.neurons import (
    Block,
    column_squares,
    correction_of,
    most_changed,
    row_squares,
    score_neurons,
)

WIDTH, NEURONS = 6, 20


def output(block, x):
    """What a block gives for inputs [t, d]; [t, d]."""
    gate = x @ block.gate.T
    return (gate / (1 + np.exp(-gate)) * (x @ block.up.T)) @ block.down.T


def block(generator, neurons=NEURONS, dtype=np.float64):
    shapes = [(neurons, WIDTH), (neurons, WIDTH), (WIDTH, neurons)]
    return Block(*(generator.standard_normal(shape).astype(dtype) for shape in shapes))


def changed(shared, where, generator, size=0.1):
    """The shared block with the neurons `where` changed in all three vectors."""
    gate, up, down = shared.gate.copy(), shared.up.copy(), shared.down.copy()
    gate[where] += size * generator.standard_normal((len(where), WIDTH))
    up[where] += size * generator.standard_normal((len(where), WIDTH))
    down[:, where] += size * generator.standard_normal((WIDTH, len(where)))
    return Block(gate, up, down)


def scores_of(expert, shared, score="relative"):
    gate, up = row_squares(expert.gate, shared.gate), row_squares(expert.up, shared.up)
    return score_neurons(gate, up, column_squares(expert.down, shared.down), score)


@pytest.mark.parametrize("score", ["relative", "change"])
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32), where=st.sets(st.integers(0, NEURONS - 1)))
def test_an_expert_that_differs_in_the_chosen_neurons_only_is_restored(score, seed, where):
    generator = np.random.default_rng(seed)
    shared = block(generator)
    expert = changed(shared, sorted(where), generator)
    chosen = most_changed(scores_of(expert, shared, score), len(where))
    assert chosen.tolist() == sorted(where)
    added = correction_of(expert, shared, chosen, 2 * len(where) + 3)
    x = generator.standard_normal((7, WIDTH))
    np.testing.assert_allclose(output(shared, x) + output(added, x), output(expert, x), rtol=0, atol=1e-12)


def test_only_the_neurons_chosen_are_restored():
    generator = np.random.default_rng(3)
    shared = block(generator)
    expert = changed(shared, [2, 5, 11], generator)
    half = Block(expert.gate.copy(), expert.up.copy(), expert.down.copy())
    half.gate[5], half.up[5], half.down[:, 5] = shared.gate[5], shared.up[5], shared.down[:, 5]
    added = correction_of(expert, shared, np.array([2, 11]), 8)
    x = generator.standard_normal((4, WIDTH))
    np.testing.assert_allclose(output(shared, x) + output(added, x), output(half, x), rtol=0, atol=1e-12)


def test_nothing_is_added_where_nothing_differs():
    shared = block(np.random.default_rng(1))
    for score in ("relative", "change"):
        assert not scores_of(shared, shared, score).any()
    chosen = most_changed(scores_of(shared, shared), 10)
    added = correction_of(shared, shared, chosen, 24)
    assert len(chosen) == 0
    assert added.gate.shape == (24, WIDTH)
    assert not any(part.any() for part in (added.gate, added.up, added.down))


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_no_value_is_rounded_and_the_order_is_expert_shared_zeros(dtype):
    generator = np.random.default_rng(2)
    shared, expert = block(generator, dtype=dtype), block(generator, dtype=dtype)
    chosen = np.array([1, 4, 19])
    added = correction_of(expert, shared, chosen, 8)
    assert {part.dtype for part in (added.gate, added.up, added.down)} == {np.dtype(dtype)}
    np.testing.assert_array_equal(added.gate[:3], expert.gate[chosen])
    np.testing.assert_array_equal(added.up[3:6], shared.up[chosen])
    np.testing.assert_array_equal(added.down[:, :3], expert.down[:, chosen])
    np.testing.assert_array_equal(added.down[:, 3:6], -shared.down[:, chosen])
    assert not added.gate[6:].any()
    assert not added.down[:, 6:].any()


def test_sums_are_those_of_a_plain_loop():
    generator = np.random.default_rng(4)
    shared, expert = (generator.standard_normal((9, 5)).astype(np.float32) for _ in range(2))
    rows, columns = row_squares(expert, shared), column_squares(expert, shared)
    for j in range(5):
        s, c = shared[:, j].astype(float), expert[:, j].astype(float) - shared[:, j].astype(float)
        np.testing.assert_allclose(columns[:, j], [s @ s, c @ c], rtol=1e-14)
    for i in range(9):
        s, c = shared[i].astype(float), expert[i].astype(float) - shared[i].astype(float)
        np.testing.assert_allclose(rows[:, i], [s @ s, c @ c], rtol=1e-14)


@given(cut=st.integers(0, 33))
def test_slabs_make_no_difference_to_any_bit(cut):
    generator = np.random.default_rng(5)
    shared, expert = (generator.standard_normal((33, 17)).astype(np.float32) for _ in range(2))
    parts = column_squares(expert[cut:], shared[cut:], column_squares(expert[:cut], shared[:cut]))
    np.testing.assert_array_equal(parts, column_squares(expert, shared))
    rows = [row_squares(expert[:cut], shared[:cut]), row_squares(expert[cut:], shared[cut:])]
    np.testing.assert_array_equal(np.concatenate(rows, axis=1), row_squares(expert, shared))


def test_scores_by_hand():
    gate, up, down = (
        np.array([[4.0, 0.0], [1.0, 0.0]]),
        np.array([[1.0, 2.0], [0.5, 1.0]]),
        np.array([[2.0, 0], [1, 0]]),
    )
    assert score_neurons(gate, up, down, "change").tolist() == [2.5, 1.0]
    assert score_neurons(gate, up, down, "relative").tolist() == [0.25 + 0.5 + 0.5, 0.5]


def test_a_neuron_that_was_zero_and_is_no_more_comes_first():
    sums = np.array([[0.0, 1.0], [1e-9, 5.0]])
    assert score_neurons(sums, sums, sums).tolist()[0] == np.inf
    assert most_changed(score_neurons(sums, sums, sums), 1).tolist() == [0]


def test_of_equal_scores_the_earlier_neurons_are_taken():
    assert most_changed(np.ones(6), 3).tolist() == [0, 1, 2]
    assert most_changed(np.array([1.0, 2.0, 2.0, 2.0]), 2).tolist() == [1, 2]
    assert most_changed(np.ones(3), 0).tolist() == []
    assert most_changed(np.ones(3), 9).tolist() == [0, 1, 2]
