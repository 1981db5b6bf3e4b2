"""From probabilities to mixtures."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from mediator_cli.bundle.router_record import PolicyRecord
from mediator_cli.runtime.policy import entropy, mix

EXPERTS = ("a", "b", "c", "d")
RULES = ("uncertainty", "argmax", "top_k", "posterior", "uniform", "fixed")


@st.composite
def probability_rows(draw, n_experts: int | None = None) -> np.ndarray:
    """Draw rows of probabilities, zeros and ties among them."""
    n = n_experts or draw(st.integers(1, 4))
    parts = st.lists(st.one_of(st.integers(0, 5).map(float), st.floats(0, 1)), min_size=n, max_size=n)
    rows = [row for row in draw(st.lists(parts, min_size=1, max_size=4)) if sum(row) > 1e-3] or [[1.0] * n]
    return np.array([np.array(row) / sum(row) for row in rows])


@st.composite
def policies(draw, n_experts: int = 4) -> PolicyRecord:
    weights = draw(st.dictionaries(st.sampled_from(EXPERTS[:n_experts]), st.floats(-2, 2)))
    return PolicyRecord(
        rule=draw(st.sampled_from(RULES)),
        sure=draw(st.floats(0, 1)),
        cover=draw(st.floats(0.01, 1)),
        k=draw(st.integers(1, 6)),
        weights=weights,
        outside=draw(st.sampled_from(["dense", "ignore"])),
    )


def one(row: list[float], outside: bool = False, **fields: object) -> list[float]:
    """Mix a single row and round for comparison."""
    policy = PolicyRecord.model_validate(fields)
    weights = mix(np.array([row]), np.array([outside]), policy, EXPERTS[: len(row)])
    assert weights.dtype == np.float32
    assert weights.shape == (1, len(row))
    return [round(float(w), 6) for w in weights[0]]


def smallest_cover(row: np.ndarray, cover: float) -> int:
    """Count by trying how many of the most probable experts it takes."""
    falling = sorted(row, reverse=True)
    return next(n for n in range(1, len(row) + 1) if sum(falling[:n]) >= cover - 1e-9 or n == len(row))


def test_entropy_by_hand():
    rows = np.array([[1, 0, 0, 0], [0.25] * 4, [0.5, 0.5, 0, 0]])
    assert entropy(rows) == pytest.approx([0, 1, 0.5])
    assert entropy(np.array([[1.0], [1.0]])).tolist() == [0.0, 0.0]


@given(probability_rows())
def test_entropy_is_scipys_over_its_largest(rows):
    from scipy.stats import entropy as reference

    found = entropy(rows)
    assert ((found >= 0) & (found <= 1)).all()
    if rows.shape[1] > 1:
        assert found == pytest.approx(reference(rows, axis=1) / np.log(rows.shape[1]), abs=1e-12)


def test_uncertainty_by_hand():
    # normalised entropy of (0.99, 0.01) is 0.081, of (0.98, 0.02) 0.141
    assert one([0.99, 0.01], sure=0.1) == [1, 0]
    assert one([0.98, 0.02], sure=0.1, cover=0.99) == [0.98, 0.02]
    assert one([0.5, 0.3, 0.15, 0.05], sure=0.1, cover=0.7) == [0.625, 0.375, 0, 0]
    assert one([0.05, 0.15, 0.5, 0.3], sure=0.1, cover=0.9) == [0, 0.157895, 0.526316, 0.315789]
    assert one([0.5, 0.3, 0.15, 0.05], sure=1.0) == [1, 0, 0, 0]


def test_cover_is_not_missed_by_rounding():
    # 0.7 + 0.2 is 0.8999999999999999 in binary
    assert one([0.1, 0.7, 0.2], sure=0.1, cover=0.9) == [0, 0.777778, 0.222222]
    assert one([0.25] * 4, sure=0.1, cover=1.0) == [0.25] * 4


def test_ties_go_to_the_earlier_expert():
    assert one([0.5, 0.5], sure=0.1, cover=0.5) == [1, 0]
    assert one([0.2, 0.4, 0.4], rule="argmax") == [0, 1, 0]
    assert one([0.25] * 4, rule="top_k", k=2) == [0.5, 0.5, 0, 0]


def test_the_other_rules_by_hand():
    row = [0.5, 0.3, 0.15, 0.05]
    assert one(row, rule="argmax") == [1, 0, 0, 0]
    assert one(row, rule="top_k", k=2) == [0.625, 0.375, 0, 0]
    assert one(row, rule="top_k", k=9) == row
    assert one(row, rule="posterior") == row
    assert one(row, rule="uniform") == [0.25] * 4
    assert one(row, rule="fixed", weights={"c": 0.7, "a": 1.5}) == [1.5, 0, 0.7, 0]
    assert one(row, rule="fixed", weights={}) == [0, 0, 0, 0]


@pytest.mark.parametrize("rule", RULES)
def test_outside_means_dense_but_for_rules_that_do_not_read_the_input(rule):
    rows, outside = np.array([[0.6, 0.4], [0.6, 0.4]]), np.array([True, False])
    fields = {"rule": rule, "k": 1, "weights": {"a": 1.0}}
    dense = mix(rows, outside, PolicyRecord(**fields), ("a", "b"))
    ignored = mix(rows, outside, PolicyRecord(**fields, outside="ignore"), ("a", "b"))
    assert (ignored[0] == ignored[1]).all()
    assert (dense[1] == ignored[1]).all()
    assert dense[0].any() == (rule in ("uniform", "fixed"))


@given(probability_rows(4), policies(), st.booleans())
def test_rows_sum_to_one_or_are_zero(rows, policy, is_outside):
    before = rows.copy()
    weights = mix(rows, np.full(len(rows), is_outside), policy, EXPERTS)
    assert (rows == before).all()
    assert np.isfinite(weights).all()
    if policy.rule != "fixed":
        dense = is_outside and policy.outside == "dense" and policy.rule != "uniform"
        assert (weights >= 0).all()
        assert weights.sum(axis=1) == pytest.approx(0 if dense else 1, abs=1e-6)


@given(probability_rows(), policies())
def test_rows_do_not_depend_on_their_batch(rows, policy):
    experts = EXPERTS[: rows.shape[1]]
    outside = np.arange(len(rows)) % 2 == 1
    alone = [mix(rows[n : n + 1], outside[n : n + 1], policy, experts)[0] for n in range(len(rows))]
    assert (mix(rows, outside, policy, experts) == np.stack(alone)).all()
    assert mix(rows[:0], outside[:0], policy, experts).shape == (0, rows.shape[1])


@given(probability_rows(), st.floats(0.01, 1))
def test_uncertain_rows_keep_the_smallest_covering_set_in_proportion(rows, cover):
    policy = PolicyRecord(sure=0.0, cover=cover)
    weights = mix(rows, np.zeros(len(rows), bool), policy, EXPERTS[: rows.shape[1]])
    for row, mixture in zip(rows, weights, strict=True):
        kept = mixture > 0
        # 1e-300 is probability in float64 and none in float32
        n_wanted = min(smallest_cover(row, cover), int((row.astype(np.float32) > 0).sum()))
        assert kept.sum() == n_wanted
        assert row[kept].min() >= row[~kept].max(initial=0.0)
        assert mixture[kept] == pytest.approx(row[kept] / row[kept].sum(), rel=1e-6)


@given(probability_rows(4), policies(), st.floats(0.01, 1), st.floats(0, 1))
def test_mixtures_are_monotone(rows, policy, other_cover, other_sure):
    inside = np.zeros(len(rows), bool)

    def kept(**changes):
        return mix(rows, inside, policy.model_copy(update=changes), EXPERTS) > 0

    if policy.rule not in ("fixed", "uniform"):
        weights = mix(rows, inside, policy, EXPERTS)
        order = np.argsort(rows, axis=1, kind="stable")
        rising = np.take_along_axis(weights, order, axis=1)
        strictly = np.diff(np.take_along_axis(rows, order, axis=1), axis=1) > 0
        assert (np.diff(rising, axis=1)[strictly] >= 0).all()
    low, high = sorted([policy.cover, other_cover])
    assert (kept(rule="uncertainty", cover=low) <= kept(rule="uncertainty", cover=high)).all()
    low, high = sorted([policy.sure, other_sure])
    assert (kept(rule="uncertainty", sure=high) <= kept(rule="uncertainty", sure=low)).all()
    assert (kept(rule="top_k", k=1) <= kept(rule="top_k", k=2)).all()
    assert (kept(rule="top_k", k=1) == kept(rule="argmax")).all()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rule": "top_k"}, "rule top_k needs k"),
        ({"rule": "fixed"}, "rule fixed needs weights"),
        ({"rule": "fixed", "weights": {"a": float("nan")}}, "finite number"),
        ({"cover": 0.0}, "greater than 0"),
        ({"sure": 1.5}, "less than or equal to 1"),
    ],
)
def test_a_policy_without_sense_is_refused(fields, message):
    with pytest.raises(ValidationError, match=message):
        PolicyRecord(**fields)
