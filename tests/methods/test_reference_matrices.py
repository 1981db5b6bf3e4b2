"""Methods that optimise, order or align whole matrices against their formulas, written plainly in float64."""

import numpy as np
import pytest
import torch

from mediator_cli.methods.doge_ta import doge_ta
from mediator_cli.methods.knots import knots
from mediator_cli.methods.opcm import opcm
from mediator_cli.methods.registry import resolve_method
from mediator_cli.methods.widen import widen
from mediator_cli.methods.wudi import wudi

SHAPES = [(12, 7), (7, 12), (9, 9)]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def draw(shape, n=3, seed=0, rank=None):
    """Deltas [n, rows, columns] about as large as those of a fine-tune, and weights [n]."""
    generator = np.random.default_rng(seed)
    deltas = 0.01 * generator.standard_normal((n, *shape))
    if rank:
        deltas = 10 * deltas[:, :, :rank] @ generator.standard_normal((n, rank, shape[1])) / 10
    return deltas.astype(np.float32), 0.5 + generator.random(n)


def adam(start, loss, steps, learning_rate, project=lambda gradient: gradient):
    """What torch's Adam makes of a loss in float64."""
    value = torch.tensor(start, requires_grad=True)
    optimizer = torch.optim.Adam([value], lr=learning_rate)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(value).backward()
        value.grad = project(value.grad)
        optimizer.step()
    return value.detach().numpy()


def interference(deltas):
    taus = torch.tensor(np.asarray(deltas, np.float64))
    return lambda merged: sum(((merged - t) @ t.T).square().sum() / t.square().sum() for t in taus)


@each_shape
@pytest.mark.parametrize("rank", [None, 1], ids=["full", "low"])
def test_wudi_takes_the_steps_of_adam(shape, rank):
    deltas, weights = draw(shape, rank=rank)
    weighed = deltas * weights[:, None, None]
    expected = adam(weighed.sum(axis=0), interference(weighed), 40, 1e-4)
    found = wudi(deltas, weights, iterations=40, learning_rate=1e-4)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
    assert abs(found - weighed.sum(axis=0)).max() > 1e-3


@each_shape
def test_wudi_solved_exactly_is_the_minimum_in_the_span_of_the_deltas(shape):
    deltas, weights = draw(shape, n=2)
    weighed = deltas * weights[:, None, None]
    merged = torch.tensor(np.asarray(wudi(deltas, weights, solve="exact"), np.float64), requires_grad=True)
    start = torch.tensor(np.asarray(weighed.sum(axis=0), np.float64), requires_grad=True)
    for point in (merged, start):
        interference(weighed)(point).backward()
    assert merged.grad.abs().max() < 1e-4 * start.grad.abs().max()
    rows = np.concatenate(weighed)
    assert np.allclose(merged.detach().numpy() @ np.linalg.pinv(rows) @ rows, merged.detach().numpy(), atol=1e-7)


def test_wudi_with_steps_in_units_of_the_deltas_does_not_depend_on_their_size():
    deltas, weights = draw((8, 6))
    how = {"unit": "rms", "learning_rate": 0.01, "iterations": 20}
    small = wudi(deltas / np.float32(1024), weights, **how)
    np.testing.assert_allclose(small * 1024, wudi(deltas, weights, **how), rtol=1e-5, atol=1e-8)


def test_wudi_with_no_steps_is_the_sum():
    deltas, weights = draw((8, 6))
    np.testing.assert_allclose(wudi(deltas, weights, iterations=0), np.tensordot(weights, deltas, 1), rtol=1e-6)


@pytest.mark.parametrize("method", [wudi, doge_ta, knots])
def test_vectors_stay_the_base_or_take_the_mean_of_deltas(method):
    vectors, weights = np.array([[1, -3], [2, 5]], np.float32), np.array([1.0, 2.0])
    assert method(vectors, weights).tolist() == [0, 0]
    assert method(vectors, weights, others="mean").tolist() == [2.5, 3.5]


def doge_reference(deltas, weights, lambda_, density, subspace, steps, learning_rate):
    taus = [torch.tensor(np.asarray(delta, np.float64)) for delta in deltas]
    factors = [lambda_ * w / t.norm() for w, t in zip(weights, taus, strict=True)]
    least = min(taus[0].shape)
    joint = torch.cat([torch.linalg.svd(t)[0][:, : least // len(taus)] for t in taus], dim=1)
    basis = torch.linalg.svd(joint)[0][:, : least // subspace]

    def loss(moved):
        merged = sum(f * (t + moved) for f, t in zip(factors, taus, strict=True))
        return sum(((t * (t - merged)).sum(dim=1) ** 2).sum() for t in taus)

    start = np.zeros(taus[0].shape)
    moved = adam(start, loss, steps, learning_rate, lambda gradient: gradient - basis @ (basis.T @ gradient))
    merged = start
    for factor, delta in zip(factors, deltas, strict=True):
        kept = abs(delta) >= np.sort(abs(delta).ravel())[-int(delta.size * density) - 1]
        merged = merged + factor.item() * (delta + moved) * kept
    return merged


@each_shape
def test_doge_ta_follows_the_formula(shape):
    deltas, weights = draw(shape)
    # Large deltas, so that what Adam adds to the root of the second moment is small in float32 too.
    deltas *= 30
    found = doge_ta(deltas, weights, density=0.4, subspace=3, iterations=50, learning_rate=1e-3)
    expected = doge_reference(deltas, weights, 0.07, 0.4, 3, 50, 1e-3)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-6)
    still = doge_ta(deltas, weights, density=0.4, subspace=3, iterations=0)
    assert abs(found - still).max() > 1e-4


def test_doge_ta_leaves_out_experts_that_changed_nothing():
    deltas, weights = draw((8, 6))
    deltas[1] = 0
    found = doge_ta(deltas, weights, iterations=0, density=1.0)
    norms = [np.linalg.norm(delta) for delta in deltas]
    expected = 0.07 * (weights[0] * deltas[0] / norms[0] + weights[2] * deltas[2] / norms[2])
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def opcm_reference(deltas, weights, alpha, zero_diagonal):
    """All singular vectors, also those of the null space, as the authors take them."""
    scaled = [w * np.asarray(d, np.float64) for w, d in zip(weights, deltas, strict=True)]
    merged = scaled[0]
    for tau in scaled[1:]:
        u, s, vt = np.linalg.svd(merged)
        shares = np.cumsum(s) / s.sum()
        above = [index for index, share in enumerate(shares) if share > alpha]
        r = above[0] if above else 0
        inside = u.T @ tau @ vt.T
        inside[:r, :r] = 0
        if zero_diagonal:
            np.fill_diagonal(inside, 0)
        merged = merged + u @ inside @ vt
    norms = [np.linalg.norm(tau) for tau in scaled]
    return merged * np.mean(norms) / np.linalg.norm(merged)


@each_shape
@pytest.mark.parametrize("zero_diagonal", [True, False])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.9, 1.0])
def test_opcm_follows_the_formula(shape, alpha, zero_diagonal):
    deltas, weights = draw(shape)
    found = opcm(deltas, weights, alpha=alpha, zero_diagonal=zero_diagonal)
    np.testing.assert_allclose(found, opcm_reference(deltas, weights, alpha, zero_diagonal), rtol=1e-4, atol=1e-8)


def test_opcm_keeps_an_expert_that_uses_other_directions():
    deltas = np.zeros((2, 4, 4), np.float32)
    deltas[0, :2, :2], deltas[1, 2:, 2:] = [[2, 0], [0, 1]], [[0, 3], [4, 0]]
    merged = opcm(deltas, np.ones(2), squares=np.array([1.0, 1.0, 1.0]))
    np.testing.assert_allclose(merged, deltas.sum(axis=0), atol=1e-6)


def test_opcm_scales_vectors_by_the_norms_of_the_model():
    vectors = np.array([[1, 2], [3, -2]], np.float32)
    assert opcm(vectors, np.ones(2), squares=np.array([9.0, 25.0, 4.0])).tolist() == [8.0, 0.0]


def knots_reference(deltas, weights, lambda_, concat, factors, merge):
    turned = [np.asarray(d, np.float64) if concat == "output" else np.asarray(d, np.float64).T for d in deltas]
    u, s, vt = np.linalg.svd(np.hstack(turned), full_matrices=False)
    u, s, vt = u[:, s > 1e-5], s[s > 1e-5], vt[s > 1e-5]
    aligned = np.stack(np.split(vt if factors == "directions" else s[:, None] * vt, len(deltas), axis=1))
    merged = merge((aligned * weights[:, None, None]).reshape(len(deltas), -1)).reshape(aligned.shape[1:])
    found = lambda_ * (u * s if factors == "directions" else u) @ merged
    return found if concat == "output" else found.T


def elected_mean(rows):
    agrees = np.sign(rows) == np.sign(rows.sum(axis=0))
    return (rows * agrees).sum(axis=0) / np.maximum(1, agrees.sum(axis=0))


@each_shape
@pytest.mark.parametrize("concat", ["output", "input"])
@pytest.mark.parametrize("factors", ["scaled", "directions"])
def test_knots_follows_the_formula(shape, concat, factors):
    deltas, _ = draw(shape, rank=2)
    how = {"concat": concat, "factors": factors}
    found = knots(deltas, np.ones(3), lambda_=0.7, **how)
    expected = knots_reference(deltas, np.ones(3), 0.7, merge=elected_mean, **how)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("concat", ["output", "input"])
def test_knots_by_a_plain_sum_is_task_arithmetic(concat):
    deltas, weights = draw((9, 6))
    found = knots(deltas, weights, combine="sum", lambda_=0.3, concat=concat)
    np.testing.assert_allclose(found, 0.3 * np.tensordot(weights, deltas, 1), rtol=1e-4, atol=1e-7)


def trimmed(density):
    """Keep the largest int(n · density) + 1 entries of each row, then elect."""

    def merge(rows):
        k = int(rows.shape[1] * density) + 1
        limits = np.sort(abs(rows), axis=1)[:, -k]
        return elected_mean(np.where(abs(rows) >= limits[:, None], rows, 0))

    return merge


@each_shape
def test_knots_trims_the_aligned_factors_of_each_expert(shape):
    deltas, _ = draw(shape)
    found = knots(deltas, np.ones(3), density=0.3, trim="tensor")
    expected = knots_reference(deltas, np.ones(3), 0.5, "output", "scaled", trimmed(0.3))
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-7)


def test_knots_multiplies_factors_by_the_weights_before_the_election():
    deltas, _ = draw((8, 6))
    weights = np.array([1.0, 4.0, 0.5])

    def merge(rows):
        # An entry counts in the mean as much as its weight.
        agrees = np.sign(rows) == np.sign(rows.sum(axis=0))
        return (rows * agrees).sum(axis=0) / (weights[:, None] * agrees).sum(axis=0)

    expected = knots_reference(deltas, weights, 0.5, "output", "scaled", merge)
    np.testing.assert_allclose(knots(deltas, weights), expected, rtol=1e-3, atol=1e-7)


def widen_reference(deltas, weights, base, ratio, calibration):
    def scores(significance):
        shares = np.exp(significance) / np.exp(significance).sum(axis=0)
        return np.where(significance > significance.mean(axis=1, keepdims=True) * ratio, calibration, shares)

    def ranks(values):
        return np.argsort(np.argsort(values, axis=1, kind="stable"), axis=1) / values.shape[1]

    base = np.asarray(base, np.float64)
    tuned = base + np.asarray(deltas, np.float64)
    lengths, length = np.linalg.norm(tuned, axis=1), np.linalg.norm(base, axis=0)
    cosines = (tuned * base).sum(axis=1) / (lengths * length)
    found = (scores(ranks(abs(lengths - length))) + scores(ranks(1 - cosines))) / 2
    return (weights[:, None, None] * deltas * found[:, None]).sum(axis=0)


@pytest.mark.parametrize("shape", [(12, 8), (8, 12), (100, 10)], ids=str)
@pytest.mark.parametrize(("ratio", "calibration"), [(1.0, 1.0), (1.3, 0.7), (0.0, 1.0)])
def test_widen_follows_the_formula(shape, ratio, calibration):
    deltas, weights = draw(shape)
    base = np.random.default_rng(5).standard_normal(shape).astype(np.float32)
    found = widen(deltas, weights, ratio=ratio, calibration=calibration, base=base)
    np.testing.assert_allclose(found, widen_reference(deltas, weights, base, ratio, calibration), rtol=1e-5, atol=1e-9)


def test_widen_looks_at_single_entries_of_vectors():
    vectors = np.array([[0, 4], [3, 1]], np.float32)
    # Entries above their expert's mean, which is 2 of both, pass in full; the 1 shares with the 4 by softmax.
    np.testing.assert_allclose(widen(vectors, np.ones(2)), [3, 4 + 1 / (1 + np.exp(3))], rtol=1e-6)


def test_widen_with_an_odd_number_of_columns_leaves_the_middle_one_below_the_mean():
    base = np.ones((4, 3), np.float32)
    delta = np.zeros((1, 4, 3), np.float32)
    delta[0, 0] = [1, 2, 4]
    found = widen(delta, np.ones(1), base=base, calibration=0.25)
    # One expert's softmax is 1.
    assert found[0].tolist() == [1.0, 2.0, 1.0]


def test_widen_takes_columns_of_zeros_for_turned_by_one():
    base = np.array([[1, 0, 0, 1], [1, 0, 0, 1]], np.float32)
    delta = np.array([[[0.01, 1, 0, -1], [0, 1, 0, -1]]], np.float32)
    found = widen(delta, np.ones(1), base=base, calibration=0.5)
    # Columns 1 and 3 grew and turned more than column 0; column 2 did not change at all.
    np.testing.assert_allclose(found, [[0.01, 0.5, 0, -0.5], [0, 0.5, 0, -0.5]], rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("wudi", {"iterations": -1}),
        ("wudi", {"learning_rate": 0.0}),
        ("wudi", {"unit": "mean"}),
        ("doge_ta", {"subspace": 0}),
        ("doge_ta", {"density": 0.0}),
        ("doge_ta", {"lambda": float("inf")}),
        ("opcm", {"alpha": 1.1}),
        ("opcm", {"zero_diagonal": 1}),
        ("knots", {"floor": -1.0}),
        ("knots", {"concat": "both"}),
        ("knots", {"others": "sum"}),
        ("widen", {"ratio": -0.1}),
        ("widen", {"calibration": float("nan")}),
    ],
)
def test_parameters_out_of_bounds_are_refused(name, params):
    (problem,) = resolve_method(name, None, params, lambda field: f"here {field}")
    assert problem.place == f"here {next(iter(params))}"
