"""Each rule of assignment on scores that a reader can check."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mediator_cli.recipe.schema import AssignSpec
from mediator_cli.stages.assign import SparseSizes, assign_units, mean_plus_std

UNITS = ["embed", "l0", "l1", "l2", "l3", "norm"]
SCORES = {"l0": 0.1, "l1": 0.4, "l2": 0.3, "l3": 0.4, "embed": 0.9, "norm": 0.0}


def routed(scores=SCORES, candidates=("l0", "l1", "l2", "l3"), listed=(), **spec):
    decided = assign_units(AssignSpec(**spec), UNITS, list(candidates), list(listed), scores)
    assert list(decided) == UNITS
    return [unit for unit, decision in decided.items() if decision == "route"]


def test_none_routes_nothing_and_all_routes_every_candidate():
    assert routed(rule="none", scores={}) == []
    assert routed(rule="all", scores={}) == ["l0", "l1", "l2", "l3"]
    assert routed(rule="all", scores={}, candidates=UNITS) == UNITS


def test_listed_routes_what_is_listed_candidate_or_not():
    assert routed(rule="listed", units=("x",), listed=["embed", "l2"], scores={}) == ["embed", "l2"]


@pytest.mark.parametrize(
    ("threshold", "expected"),
    [(0.0, ["l0", "l1", "l2", "l3"]), (0.3, ["l1", "l3"]), (0.39, ["l1", "l3"]), (0.4, []), (1.0, [])],
)
def test_threshold_routes_what_is_strictly_above(threshold, expected):
    assert routed(rule="threshold", threshold=threshold) == expected


@pytest.mark.parametrize(
    ("k", "expected"),
    [(0, []), (1, ["l1"]), (2, ["l1", "l3"]), (3, ["l1", "l2", "l3"]), (9, ["l0", "l1", "l2", "l3"])],
)
def test_top_k_breaks_ties_by_position(k, expected):
    assert routed(rule="top_k", k=k) == expected


@pytest.mark.parametrize(
    ("std", "expected"),
    [(None, ["l1", "l3"]), (0.0, ["l1", "l3"]), (0.8, ["l1", "l3"]), (0.9, []), (-0.5, ["l1", "l2", "l3"])],
)
def test_mean_std_routes_what_stands_out(std, expected):
    # mean 0.3, deviation √0.015 ≈ 0.1225: 0.4 is 0.816 deviations above.
    scores = {**SCORES, "l0": 0.1, "l2": 0.3}
    assert routed(rule="mean_std", std=std, scores=scores) == expected


@given(st.floats(0, 1), st.integers(1, 40), st.floats(0, 3))
def test_mean_std_with_equal_scores_routes_nothing(score, n, std):
    units = [f"l{index}" for index in range(n)]
    decided = assign_units(AssignSpec(rule="mean_std", std=std), units, units, [], dict.fromkeys(units, score))
    assert set(decided.values()) == {"average"}


def test_only_candidates_are_routed_by_score():
    assert routed(rule="threshold", threshold=0.2, candidates=("l0", "l2")) == ["l2"]
    assert routed(rule="top_k", k=1, candidates=tuple(UNITS)) == ["embed"]


@pytest.mark.parametrize(
    "spec", [{"rule": "threshold", "threshold": 0.0}, {"rule": "top_k", "k": 2}, {"rule": "mean_std"}]
)
def test_without_candidates_nothing_is_routed(spec):
    assert routed(candidates=(), scores={}, **spec) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20), st.floats(-3, 3))
def test_mean_plus_std_equals_numpy(scores, n_std):
    assert mean_plus_std(scores, n_std) == pytest.approx(np.mean(scores) + n_std * np.std(scores), abs=1e-9)


def test_mean_plus_std_of_nothing_is_zero():
    assert mean_plus_std([], 1.0) == 0.0


SIZES = SparseSizes({"l0": 10, "l1": 40, "l2": 25, "l3": 30, "embed": 100, "norm": 1}, files=5)


@pytest.mark.parametrize(
    ("n_bytes", "expected"),
    [
        (14, []),  # nothing fits beside the files' own 5 bytes
        (15, ["l0"]),
        (35, ["l3"]),  # l1 is too large, l3 comes before l2 and l0, and leaves nothing
        (44, ["l3"]),
        (45, ["l1"]),
        (70, ["l1", "l2"]),  # l3 does not fit behind l1, l2 does
        (110, ["l0", "l1", "l2", "l3"]),
        ("1kB", ["l0", "l1", "l2", "l3"]),
    ],
)
def test_byte_budget_takes_from_the_highest_score_what_still_fits(n_bytes, expected):
    decided = assign_units(
        AssignSpec(rule="byte_budget", bytes=n_bytes), UNITS, ["l0", "l1", "l2", "l3"], [], SCORES, SIZES
    )
    assert [unit for unit, decision in decided.items() if decision == "route"] == expected


@given(
    st.lists(st.tuples(st.integers(0, 50), st.sampled_from([0.1, 0.2, 0.3, 0.9])), max_size=12),
    st.integers(1, 200),
    st.integers(0, 20),
)
def test_byte_budget_equals_a_plain_loop(drawn, n_bytes, files):
    units = [f"l{index}" for index in range(len(drawn))]
    left, expected = n_bytes - files, set()
    for score in (0.9, 0.3, 0.2, 0.1):
        for unit, (size, own) in zip(units, drawn, strict=True):
            if own == score and size <= left:
                left -= size
                expected.add(unit)
    scores = {unit: score for unit, (_, score) in zip(units, drawn, strict=True)}
    sizes = SparseSizes({unit: size for unit, (size, _) in zip(units, drawn, strict=True)}, files)
    decided = assign_units(AssignSpec(rule="byte_budget", bytes=n_bytes), units, units, [], scores, sizes)
    assert {unit for unit, decision in decided.items() if decision == "route"} == expected
