"""Averages, arcs and chosen entries against formulas written out in float64, and where those have no value."""

import numpy as np
import pytest
from golden_cases import resolved

from mediator_cli.methods.registry import resolve_method

f32 = np.float32


def draw(n=3, m=500, seed=0, levels=None):
    """Experts [n, m]; with few levels many entries are equal, opposite or zero."""
    rows = np.random.default_rng(seed).standard_normal((n, m))
    return (rows if levels is None else np.round(rows * levels)).astype(f32)


def call(name, inputs, weights=None, **params):
    return resolved({"method": name, **params})(
        np.array(inputs, f32), np.ones(len(inputs)) if weights is None else weights
    )


def unit(vector):
    return vector / np.linalg.norm(vector)


def turned(first, second, t):
    """Slerp in float64."""
    angle = np.arccos(np.clip(unit(first) @ unit(second), -1, 1))
    return (np.sin((1 - t) * angle) * first + np.sin(t * angle) * second) / np.sin(angle)


# Arcs


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_arcs_between_rows_tensors_and_columns(t):
    pair, weights = draw(2, 24), np.array([1 - t, t]) * 3
    matrices = pair.reshape(2, 4, 6)
    method = resolved({"method": "nuslerp", "over": "row"})
    in_rows = method.find_in_rows(pair, 6)
    rows = np.concatenate([turned(a, b, t) for a, b in zip(*matrices.astype(float), strict=True)])
    np.testing.assert_allclose(method(pair, weights, in_rows), rows, rtol=1e-5, atol=1e-6)
    columns = np.stack([turned(a, b, t) for a, b in zip(*matrices.swapaxes(1, 2).astype(float), strict=True)])
    as_seen = np.ascontiguousarray(matrices.swapaxes(1, 2))
    np.testing.assert_allclose(call("nuslerp", as_seen, weights, over="column"), columns, rtol=1e-5, atol=1e-6)
    whole = turned(*pair.astype(float), t)
    np.testing.assert_allclose(call("nuslerp", pair, weights), whole, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(call("slerp", pair, t=t), whole, rtol=1e-5, atol=1e-6)


def test_only_columns_need_whole_matrices():
    views = {
        over: resolved({"method": "nuslerp", "over": over}).view_of((4, 6), "linear") for over in ("row", "column")
    }
    assert views == {"row": "elements", "column": "transposed"}


@pytest.mark.parametrize("apart", [1e-2, 1e-4, 1e-6, 1e-7, 0.0])
@pytest.mark.parametrize(
    ("name", "params"), [("nuslerp", {"space": "weight"}), ("multislerp", {"space": "weight"}), ("karcher", {})]
)
def test_nearly_parallel_tensors_lose_no_digits(name, params, apart):
    base = draw(1, 100_000, seed=1)[0]
    pair = np.stack([base, base + f32(apart) * draw(1, 100_000, seed=2)[0]])
    if name == "nuslerp":
        # An angle so small bends by its square, less than a float32 can show below 1e-4.
        expected = turned(*pair.astype(float), 0.5) if apart > 1e-3 else pair.astype(float).mean(axis=0)
    else:
        units, norms = zip(*((unit(row), np.linalg.norm(row)) for row in pair.astype(float)), strict=True)
        expected = unit(sum(units)) * np.mean(norms)
    np.testing.assert_allclose(call(name, pair, **params), expected, rtol=5e-7, atol=1e-7)


def test_opposite_and_equal_tensors_are_on_a_line():
    pair = np.stack([draw(1)[0], -draw(1)[0]])
    np.testing.assert_allclose(call("nuslerp", pair, np.array([3.0, 1.0])), pair[0] / 2, rtol=1e-6)
    np.testing.assert_allclose(call("nuslerp", [pair[0], pair[0]], np.array([3.0, 1.0])), pair[0], rtol=1e-6)
    np.testing.assert_allclose(call("multislerp", pair, np.array([3.0, 1.0])), pair[0], rtol=1e-6)
    assert np.array_equal(call("multislerp", pair), np.zeros(500))


def test_weights_that_cancel_are_halves():
    pair = draw(2)
    assert np.array_equal(call("nuslerp", pair, np.array([0.5, -0.5])), call("nuslerp", pair, np.array([2.0, 2.0])))


@pytest.mark.parametrize("name", ["nuslerp", "multislerp", "karcher", "model_stock"])
def test_one_delta_of_zeros_is_no_direction(name):
    pair = np.stack([np.zeros(500, f32), draw(1)[0]])
    merged = call(name, pair, **({} if name == "model_stock" else {"space": "delta"}))
    along = {"nuslerp": np.sin(np.pi / 4), "multislerp": 0.5, "karcher": 0.5, "model_stock": 0.0}[name]
    np.testing.assert_allclose(merged, pair[1] * along, rtol=1e-6)


@pytest.mark.parametrize("shares", [(1, 1, 1), (0.5, 0.2, 1.3)])
@pytest.mark.parametrize("normalize", [True, False])
def test_multislerp_steps_along_tangents_that_are_zero(shares, normalize):
    rows, weights = draw().astype(float), np.array(shares, float)
    weights = weights / weights.sum() if normalize else weights
    units = np.stack([unit(row) for row in rows])
    mean = unit(weights @ units)
    tangent = weights @ (units - (units @ mean)[:, None] * mean)
    assert np.linalg.norm(tangent) < 1e-12
    expected = mean * (weights @ np.linalg.norm(rows, axis=1))
    np.testing.assert_allclose(
        call("multislerp", rows, np.array(shares, float), normalize=normalize), expected, rtol=1e-5, atol=1e-6
    )


def test_the_karcher_mean_is_where_the_arcs_cancel():
    rows, weights = draw(4, 60).astype(float), np.array([1.0, 0.4, 0.7, 2.0])
    merged = call("karcher", rows, weights, max_iter=200, tol=1e-9).astype(float)
    mean = unit(merged)
    assert np.linalg.norm(merged) == pytest.approx(weights @ np.linalg.norm(rows, axis=1) / weights.sum(), rel=1e-6)
    arcs = np.zeros(60)
    for row, weight in zip(rows, weights, strict=True):
        along = unit(row) @ mean
        arcs += weight * np.arccos(along) * unit(unit(row) - along * mean)
    assert np.linalg.norm(arcs) < 1e-5
    assert np.linalg.norm(merged - call("multislerp", rows, weights)) > 1e-3


def test_two_directions_meet_in_the_middle_of_their_arc():
    expected = 3 * unit(np.array([np.cos(np.pi / 3), np.sin(np.pi / 3)]))
    rows = [[2, 0], [4 * np.cos(2 * np.pi / 3), 4 * np.sin(2 * np.pi / 3)]]
    np.testing.assert_allclose(call("karcher", rows), expected, rtol=1e-6)
    # Opposite directions have no middle: the first wins.
    assert call("karcher", [[2, 0], [-4, 0]]).tolist() == [3.0, 0.0]


def test_tiny_tensors_are_averaged():
    assert call("karcher", [[1e-6, 0], [0, 3e-6]]).tolist() == pytest.approx([5e-7, 1.5e-6])


def stock(rows, mean_of):
    units = np.stack([unit(row) for row in rows])
    cosines = (units @ units.T)[np.triu_indices(len(rows), 1)]
    cosine = cosines.mean() if mean_of == "cosines" else np.cos(np.arccos(cosines).mean())
    return len(rows) * cosine / (1 + (len(rows) - 1) * cosine) * rows.mean(axis=0)


@pytest.mark.parametrize("mean_of", ["cosines", "angles"])
@pytest.mark.parametrize("n", [2, 5])
def test_model_stock_follows_the_formula(mean_of, n):
    rows = (draw(n, 60) + 2 * draw(1, 60, seed=9)).astype(f32)
    expected = stock(rows.astype(float), mean_of)
    np.testing.assert_allclose(call("model_stock", rows, mean_of=mean_of), expected, rtol=1e-5, atol=1e-6)
    method = resolved({"method": "model_stock", "mean_of": mean_of, "over": "row"})
    found = method(rows, np.ones(n), method.find_in_rows(rows, 20))
    parts = [stock(rows[:, at : at + 20].astype(float), mean_of) for at in (0, 20, 40)]
    np.testing.assert_allclose(found, np.concatenate(parts), rtol=1e-5, atol=1e-6)


def test_model_stock_of_opposite_changes_is_the_base():
    assert np.array_equal(call("model_stock", [[1, 2], [-1, -2]]), np.zeros(2))
    assert np.array_equal(
        call("model_stock", [[1e-4, 0], [1e-4, 0]], preset="mergekit"), f32([1e-4 * 0.01 * 2 / 1.01, 0])
    )


# Choices entry by entry


@pytest.mark.parametrize("levels", [None, 1.0])
@pytest.mark.parametrize("m", [0, 1, 1023, 1024, 2500])
def test_the_largest_change_wins_and_the_later_of_equals(m, levels):
    rows, weights = draw(4, m, levels=levels), np.array([1.0, 0.5, 2.0, -1.0])
    expected = np.zeros(m)
    for row, weight in zip(rows.astype(float), weights, strict=True):
        expected = np.where(abs(row * weight) >= abs(expected), row * weight, expected)
    assert np.array_equal(call("magmax", rows, weights, **{"lambda": 0.5}), f32(expected * 0.5))


@pytest.mark.parametrize("m", [0, 1, 1023, 1024, 2500])
@pytest.mark.parametrize("epsilon", [0.0, 0.7, 1.0])
def test_shared_changes_are_averaged_and_unique_ones_boosted(m, epsilon):
    rows, weights = draw(3, m, levels=1.5), np.array([1.0, 0.5, 2.0])
    changed = abs(rows) > epsilon
    counts = changed.sum(axis=0)
    unique, shared = (changed & (counts == 1)).sum(axis=1), (changed & (counts > 1)).sum(axis=1)
    # Of an expert that changed nothing alone, nothing is boosted.
    ratios = shared / np.maximum(unique, 1)
    for name, boosts in (("ram", np.ones(3)), ("ramplus_tl", 1 + 0.25 * np.minimum(ratios, 3.0))):
        factors = np.where(counts == 1, boosts[:, None], 1.0)
        expected = (rows * changed * weights[:, None] * factors).sum(axis=0) / np.maximum(counts, 1)
        params = {"r": 0.25, "alpha": 3.0} if name == "ramplus_tl" else {}
        np.testing.assert_allclose(call(name, rows, weights, epsilon=epsilon, **params), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("m", [1, 3, 10, 500])
def test_the_smallest_are_dropped_with_all_that_equal_the_last(density, m):
    row = draw(1, m, levels=3.0)
    n_dropped = int(m * round(1 - density, 12))
    limit = np.sort(abs(row[0]))[n_dropped - 1] if n_dropped else 0.0
    expected = np.where(abs(row[0]) > limit, row[0] / density, 0)
    np.testing.assert_allclose(call("dare_magnitude", row, density=density), expected, rtol=1e-6)
    whole = call("dare_magnitude", row, density=density, rescale=False, **{"lambda": 2.0})
    np.testing.assert_allclose(whole, expected * density * 2, rtol=1e-6)


def test_small_differences_are_swapped_and_large_ones_cut():
    row = draw(1)
    entry = np.minimum(1, 0.5 / abs(row[0].astype(float)))
    np.testing.assert_allclose(call("nearswap", row, t=0.5), entry * row[0], rtol=1e-6)
    assert np.array_equal(call("nearswap", row, t=0.0), np.zeros(500))
    assert np.array_equal(call("nearswap", row, t=100.0), row[0])


def important(delta, base):
    """The importance of each entry, and which stay, of matrices in float64."""

    def softmax(rows):
        powers = np.exp(rows - rows.max(axis=1, keepdims=True))
        return powers / powers.sum(axis=1, keepdims=True) + 1e-8

    p, q = softmax(base + delta), softmax(base)
    sizes = abs(delta) * (p * np.log(p / q)).sum(axis=1, keepdims=True)
    ordered, n = np.sort(sizes, axis=None), sizes.size - 1
    first, median, third = (ordered[int(share * n)] for share in (0.25, 0.5, 0.75))
    return sizes >= median + 1.5 * (third - first)


@pytest.mark.parametrize("shape", [(1, 2), (1, 3), (2, 2), (1, 5), (3, 7), (40, 30), (40, 1)])
def test_changes_stay_that_stand_out(shape):
    base, delta = (draw(1, np.prod(shape), seed=seed)[0].reshape(shape) for seed in (3, 4))
    method = resolved({"method": "arcee_fusion"})
    flat = delta.reshape(1, -1)
    in_rows = method.find_in_rows(flat, shape[1], base)
    merged = method(flat, np.ones(1), in_rows, None, base.ravel()).reshape(shape)
    assert np.array_equal(merged, np.where(important(delta.astype(float), base.astype(float)), delta, 0))


def test_a_tensor_mostly_unchanged_takes_all_its_changes():
    delta = np.zeros((1, 100), f32)
    delta[0, ::5] = draw(1, 20)
    assert np.array_equal(call("arcee_fusion", delta), delta[0])


# Averages


def test_checkpoints_are_averaged_by_their_order():
    rows = draw(4).astype(float)
    moving = rows[0]
    for row in rows[1:]:
        moving = 0.3 * row + 0.7 * moving
    expected = {"sma": rows.mean(axis=0), "ema": moving, "wma": (rows * [[1], [2], [3], [4]]).sum(axis=0) / 10}
    for schedule, average in expected.items():
        found = call("checkpoint_average", rows, schedule=schedule, alpha=0.3)
        np.testing.assert_allclose(found, average, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.5])
def test_metrics_weigh_by_a_power(penalty):
    rows, metrics = draw(3).astype(float), np.array([0.5, 2.0, 1.5])
    for metric, sign in (("loss", -1), ("steps", 1)):
        shares = metrics ** (sign * penalty)
        found = call("metrics_weighted_like", rows, metrics, metric=metric, penalty=penalty)
        np.testing.assert_allclose(found, shares @ rows / shares.sum(), rtol=1e-5, atol=1e-6)


def test_powers_of_metrics_do_not_overflow():
    steps = np.array([1e3, 1e9])
    assert call("metrics_weighted_like", [[1], [5]], steps, metric="steps", penalty=1000.0).tolist() == [5.0]
    assert call("metrics_weighted_like", [[1], [5]], steps, metric="loss", penalty=1000.0).tolist() == [1.0]


def test_points_on_lines():
    rows = draw(2)
    np.testing.assert_allclose(
        call("mi", rows, **{"lambda": 0.25}), 0.75 * rows[0] + 0.25 * rows[1], rtol=1e-5, atol=1e-7
    )
    np.testing.assert_allclose(call("expo", rows, alpha=0.5), 1.5 * rows.mean(axis=0), rtol=1e-5, atol=1e-7)
    assert np.array_equal(call("expo", rows[:1], alpha=-1.0), np.zeros(500))
    assert np.array_equal(call("passthrough", rows[:1], scale=-2.0), rows[0] * f32(-2))


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("nuslerp", {"over": "block"}),
        ("nuslerp", {"space": "adapter"}),
        ("multislerp", {"eps": 0.0}),
        ("karcher", {"max_iter": -1}),
        ("karcher", {"tol": 0.0}),
        ("model_stock", {"mean_of": "norms"}),
        ("model_stock", {"least_norms": -1.0}),
        ("nearswap", {"t": -1.0}),
        ("mi", {"lambda": 1.5}),
        ("passthrough", {"scale": float("inf")}),
        ("expo", {"alpha": -1.5}),
        ("magmax", {"lambda": float("nan")}),
        ("dare_magnitude", {"density": 0.0}),
        ("ram", {"epsilon": -1e-5}),
        ("ramplus_tl", {"r": -0.1}),
        ("m2n2_crossover", {"split": 1.1}),
        ("checkpoint_average", {"alpha": 1.0}),
        ("checkpoint_average", {"schedule": "last"}),
        ("metrics_weighted_like", {"penalty": -1.0}),
    ],
)
def test_parameters_out_of_bounds_are_refused(name, params):
    (problem,) = resolve_method(name, None, params, lambda field: f"here {field}")
    assert problem.place == f"here {next(iter(params))}"
