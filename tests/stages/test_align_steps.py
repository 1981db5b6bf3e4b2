"""Orders of units: against all permutations there are, ties, groups that stay together."""

from itertools import permutations, product

import numpy as np
import pytest

from mediator_cli.stages.align import best_in_groups, best_order, entries_of, is_order, nearest


def total(gains, order):
    return gains[np.arange(len(order)), np.array(order)].sum()


@pytest.mark.parametrize("seed", range(5))
def test_the_best_order_is_the_best_of_all(seed):
    gains = np.random.default_rng(seed).normal(size=(6, 6))
    found = best_order(gains, np.arange(6))
    assert total(gains, found) == pytest.approx(max(total(gains, order) for order in permutations(range(6))))


@pytest.mark.parametrize(("groups", "k"), [(3, 2), (2, 3), (4, 1), (1, 4)])
def test_the_best_order_in_groups_is_the_best_of_all_that_keep_them(groups, k):
    generator = np.random.default_rng(groups)
    gains, of_groups = generator.normal(size=(groups * k, groups * k)), generator.normal(size=(groups, groups))
    every = []
    for outer in permutations(range(groups)):
        for inner in product(permutations(range(k)), repeat=groups):
            order = [group * k + at for group, each in zip(outer, inner, strict=True) for at in each]
            every.append(total(gains, order) + total(of_groups, outer))
    found = best_in_groups(gains, of_groups, np.arange(groups * k))
    assert total(gains, found) + total(of_groups, found[::k] // k) == pytest.approx(max(every))


def test_what_stands_stays_where_nothing_is_better():
    flat = np.zeros((4, 4))
    standing = np.array([2, 0, 3, 1])
    assert best_order(flat, standing) is standing
    assert best_in_groups(flat, np.zeros((2, 2)), standing) is standing
    tied = np.ones((3, 3))
    assert nearest(tied, np.array([1, 0, 2])).tolist() == [1, 0, 2]


def test_a_unit_that_is_wanted_twice_is_assigned_once():
    gains = np.array([[5.0, 4.0, 0.0], [5.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    assert not is_order(nearest(gains, np.arange(3)))
    assert best_order(gains, np.arange(3)).tolist() == [1, 0, 2]


def test_entries_of_units_with_several_entries_and_of_shared_ones():
    assert entries_of(np.array([1, 0]), width=3).tolist() == [3, 4, 5, 0, 1, 2]
    assert entries_of(np.array([5, 4, 0, 1, 3, 2]), width=2, share=2).tolist() == [4, 5, 0, 1, 2, 3]
