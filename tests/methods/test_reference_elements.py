"""Methods that score, mask or weigh single entries, against their formulas written plainly in float64."""

import json

import numpy as np
import pytest
import torch
from conftest import write_checkpoint
from safetensors.numpy import load_file, save_file

from mediator_cli import Settings, load_recipe, make_plan, merge
from mediator_cli.checkpoint.blocks import BLOCK
from mediator_cli.methods.registry import resolve_method

SIZE = 3 * BLOCK + 777
WEIGHTS = [1.0, 0.5, 0.75]


def draw(n, size, seed=0):
    """Deltas [n, size] that share something, a fifth of them zero, and some of them equal."""
    generator = np.random.default_rng(seed)
    deltas = generator.standard_normal((n, size)) + generator.standard_normal(size)
    deltas[generator.random((n, size)) < 0.2] = 0
    return (deltas * 0.01).round(4).astype(np.float32)


def method_of(name, **params):
    return resolve_method(name, None, params, str)


def ascending(values, index):
    """The value at an index of the ascending ones, in each row."""
    return np.sort(values, axis=1)[:, [index]]


def plain_pcb(deltas, weights, density, clip, shares, factor):
    tau = deltas.astype(np.float64)
    n, d = tau.shape
    sizes = abs(tau)
    clipped = np.minimum(np.maximum(sizes, ascending(sizes, int(d * clip))), ascending(sizes, int(d * (1 - clip) - 1)))
    low, high = clipped.min(axis=1, keepdims=True), clipped.max(axis=1, keepdims=True)
    inside = (clipped - low) / (high - low)
    others = np.sum(np.sign(tau) * inside if shares else tau, axis=0)
    score = (np.exp(n * inside**2 - n) * np.tanh(tau * others)).astype(np.float32).astype(np.float64)
    least, most = ascending(score, int(d * (1 - density))), score.max(axis=1, keepdims=True)
    share = np.maximum(score - least, 0) / (most - least)
    total = np.sum(np.array(weights)[:, None] * factor * np.sign(tau) * clipped * share, axis=0)
    return total / np.maximum(share.sum(axis=0), 1e-12)


@pytest.mark.parametrize("agreement", ["deltas", "shares"])
@pytest.mark.parametrize(("density", "clip"), [(0.1, 0.01), (0.3, 0.0), (0.9, 0.2)])
def test_pcb(density, clip, agreement):
    deltas = draw(3, 5000)
    found = method_of("pcb", density=density, clip=clip, agreement=agreement)(deltas, np.array(WEIGHTS))
    expected = plain_pcb(deltas, WEIGHTS, density, clip, agreement == "shares", 1.0)
    assert 0.05 < np.count_nonzero(expected) / 5000 < 1
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-9)


def test_pcb_of_many_experts_does_not_overflow():
    deltas = draw(120, 300)
    found = method_of("pcb", density=0.5)(deltas, np.ones(120))
    assert np.isfinite(found).all()
    assert np.count_nonzero(found) > 100


def test_pcb_of_equal_magnitudes_has_no_best_entries():
    deltas = np.full((2, 7), 0.5, np.float32) * np.array([1, 1, -1, 1, -1, 1, 1], np.float32)
    assert not method_of("pcb")(deltas, np.ones(2)).any()


def test_pcb_where_one_expert_is_the_base():
    deltas = draw(3, 500)
    deltas[1] = 0
    found = method_of("pcb", density=0.5)(deltas, np.ones(3))
    assert np.isfinite(found).all()
    assert found.any()


def conflict_of(tau):
    return sum(abs(one) * abs(two) for i, one in enumerate(tau) for j, two in enumerate(tau) if i != j)


@pytest.mark.parametrize("density", [0.99, 0.7, 0.4])
def test_tatr(density):
    deltas = draw(3, 4000)
    tau = deltas.astype(np.float64) * np.array(WEIGHTS)[:, None]
    omega = conflict_of(tau).astype(np.float32)
    limit = np.sort(omega)[int(4000 * density)]
    expected = np.where((omega < limit) | (omega == 0), 0.3 * tau.sum(axis=0), 0)
    found = method_of("tatr", density=density)(deltas, np.array(WEIGHTS))
    # Magnitudes that are equal but for rounding may lie on either side.
    assert np.count_nonzero(abs(found - expected) > 1e-7) <= 2


def test_tatr_keeps_what_only_one_expert_changed():
    deltas = np.array([[1, 0, 2, 0], [0, 3, 0, 0]], np.float32)
    assert method_of("tatr", density=0.5, **{"lambda": 1.0})(deltas, np.ones(2)).tolist() == [1, 3, 2, 0]


def test_tatr_of_density_one_keeps_all():
    deltas = draw(2, 100)
    found = method_of("tatr", density=1.0)(deltas, np.ones(2))
    np.testing.assert_allclose(found, 0.3 * deltas.sum(axis=0), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("k", [0, 1, 2, 3, 4])
def test_consensus(k):
    deltas = draw(3, 3000)
    tau = deltas.astype(np.float64) * np.array(WEIGHTS)[:, None]
    n_users = np.sum(abs(tau) > 0.3 * abs(tau.sum(axis=0) - tau), axis=0)
    found = method_of("consensus", k=k, tall_lambda=0.3)(deltas, np.array(WEIGHTS))
    expected = np.where(n_users >= k, 0.4 * tau.sum(axis=0), 0)
    assert np.count_nonzero(abs(found - expected) > 1e-7) <= 2


def test_emr():
    deltas = np.random.default_rng(0).standard_normal((3, 3000), np.float32)
    tau = deltas.astype(np.float64) * np.array(WEIGHTS)[:, None]
    sign = np.where(tau.sum(axis=0) > 0, 1, -1)
    expected = 0.5 * sign * np.max(np.where(tau * sign > 0, abs(tau), 0), axis=0)
    found = method_of("emr", **{"lambda": 0.5})(deltas, np.array(WEIGHTS))
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=0)


def test_a_tie_of_signs_elects_minus_in_emr():
    deltas = np.array([[1, 2, 0, 0], [-1, 0, 0, -3]], np.float32)
    assert method_of("emr")(deltas, np.ones(2)).tolist() == [-1, 2, 0, -3]


def plain_blocks(deltas, n, m):
    """Prune expert after expert, block after block."""
    taken = np.zeros(deltas.shape[1], bool)
    kept = np.zeros_like(deltas)
    for row, out in zip(deltas, kept, strict=True):
        left = np.where(taken, 0, row)
        for start in range(0, len(row) - m + 1, m):
            chosen = start + np.argsort(-abs(left[start : start + m]), kind="stable")[:n]
            chosen = chosen[~taken[chosen]]
            out[chosen] = row[chosen]
            taken[chosen] = True
    return kept


def plain_magnitudes(deltas, density):
    taken = np.zeros(deltas.shape[1], bool)
    kept = np.zeros_like(deltas)
    for row, out in zip(deltas, kept, strict=True):
        left = np.where(taken, 0, row)
        chosen = abs(left) > np.sort(abs(left))[int(len(row) * round(1 - density, 12))]
        out[chosen] = row[chosen]
        taken |= chosen
    return kept


def summed(kept):
    return np.array(WEIGHTS[: len(kept)]) @ kept.astype(np.float64)


@pytest.mark.parametrize(("n", "m"), [(1, 4), (3, 8), (2, 3), (5, 7), (4, 4), (1, 1), (10, 5000)])
def test_cabs_by_blocks(n, m):
    deltas = draw(3, 1001)
    found = method_of("cabs", n=n, m=m)(deltas, np.array(WEIGHTS))
    np.testing.assert_allclose(found, summed(plain_blocks(deltas, n, m)), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("density", [0.05, 0.25, 0.4, 0.7])
def test_cabs_by_magnitude(density):
    deltas = draw(3, 1001)
    found = method_of("cabs", prune="magnitude", density=density)(deltas, np.array(WEIGHTS))
    np.testing.assert_allclose(found, summed(plain_magnitudes(deltas, density)), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("prune", ["n:m", "magnitude"])
def test_no_two_experts_of_cabs_keep_the_same_entry(prune):
    deltas = abs(draw(3, 1024)) + np.float32(0.001)
    method = method_of("cabs", prune=prune, n=2, m=8, density=0.2)
    each = [method(deltas, row) for row in np.eye(3)]
    assert all(np.count_nonzero(one) > 150 for one in each)
    assert not np.any(np.count_nonzero(each, axis=0) > 1)


def test_cabs_of_density_one_gives_all_to_the_first():
    deltas = draw(2, 100)
    found = method_of("cabs", prune="magnitude", density=1.0)(deltas, np.ones(2))
    assert np.array_equal(found, np.where(deltas[0] != 0, deltas[0], deltas[1]))


def plain_ota(tau, moments, weights, marks, epsilon, fallback):
    share = (np.array(weights)[:, None] * np.sqrt(moments.astype(np.float64)) + epsilon) * marks
    mass = share.sum(axis=0)
    rest = tau.mean(axis=0) if fallback == "mean" else np.zeros(tau.shape[1])
    return np.where(mass > 0, (share * tau).sum(axis=0) / np.where(mass > 0, mass, 1), rest)


@pytest.mark.parametrize("fallback", ["mean", "base"])
@pytest.mark.parametrize(("saliency", "threshold"), [("delta", 1e-24), ("moment", 1e-20), ("delta", 0.0)])
def test_ota(saliency, threshold, fallback):
    deltas = draw(3, 2000)
    moments = (np.random.default_rng(1).random(deltas.shape) ** 8 * 1e-19).astype(np.float32)
    tau = deltas.astype(np.float64)
    marks = moments.astype(np.float64) * (tau**2 if saliency == "delta" else 1) >= threshold
    assert threshold == 0 or 0.02 < np.mean(~marks.any(axis=0)) < 0.9
    method = method_of("ota", saliency=saliency, threshold=threshold, fallback=fallback)
    expected = plain_ota(tau, moments, WEIGHTS, marks, 1e-26, fallback)
    np.testing.assert_allclose(method(deltas, np.array(WEIGHTS), {"moments": moments}), expected, rtol=1e-6, atol=1e-12)


def test_ota_keeps_a_share_of_the_most_salient_entries():
    deltas = draw(2, 2000)
    moments = (np.random.default_rng(1).random(deltas.shape) * 1e-19).astype(np.float32)
    scores = np.sqrt(moments) * abs(deltas)
    marks = scores >= -np.sort(-scores, axis=1)[:, [599]]
    found = method_of("ota", density=0.3, fallback="base")(deltas, np.ones(2), {"moments": moments})
    expected = plain_ota(deltas.astype(np.float64), moments, [1, 1], marks, 1e-26, "base")
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-12)


def test_ota_of_moments_that_are_all_zero_is_the_mean():
    deltas = draw(3, 50)
    found = method_of("ota")(deltas, np.ones(3), {"moments": np.zeros_like(deltas)})
    np.testing.assert_allclose(found, deltas.mean(axis=0), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("pcb", {"density": 0.0}),
        ("pcb", {"clip": 0.5}),
        ("pcb", {"agreement": "signs"}),
        ("tatr", {"density": 0.0}),
        ("consensus", {"k": -1}),
        ("consensus", {"tall_lambda": -0.1}),
        ("emr", {"lambda": float("inf")}),
        ("cabs", {"n": 0}),
        ("cabs", {"n": 9, "m": 8}),
        ("cabs", {"density": 0.0}),
        ("ota", {"power": 0.0}),
        ("ota", {"epsilon": 0.0}),
        ("ota", {"threshold": -1.0}),
    ],
)
def test_a_parameter_out_of_bounds_is_refused(name, params):
    (problem,) = resolve_method(name, None, params, lambda field: f"here {field}")
    assert problem.place == f"here {next(iter(params))}"


NAME = "model.layers.0.mlp.up_proj.weight"
OTHER = "model.layers.0.mlp.down_proj.weight"
SHAPES = {NAME: (1, SIZE), OTHER: (9, 1113)}
AVERAGES = [
    {"method": "pcb", "density": 0.2, "clip": 0.01},
    {"method": "pcb", "density": 0.95, "agreement": "shares"},
    {"method": "tatr", "density": 0.8},
    {"method": "cabs", "n": 3, "m": 7},
    {"method": "cabs", "n": 64, "m": 256},
    {"method": "cabs", "prune": "magnitude", "density": 0.3},
    {"method": "ota", "density": 0.3, "fallback": "base"},
]


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """A base of zeros and three experts, larger than a slab, with second moments."""
    folder = tmp_path_factory.mktemp("bench")
    config = {"num_hidden_layers": 1}
    write_checkpoint(folder / "base", {name: torch.zeros(shape) for name, shape in SHAPES.items()}, config)
    shapes = enumerate(SHAPES.items())
    drawn = {name: draw(3, np.prod(shape), seed).reshape(3, *shape) for seed, (name, shape) in shapes}
    squares = {name: draw(3, each[0].size, 7).reshape(each.shape) ** 2 for name, each in drawn.items()}
    moments = {name: np.float32(1e-12) * each for name, each in squares.items()}
    for at in range(3):
        tensors = {name: torch.from_numpy(deltas[at].copy()) for name, deltas in drawn.items()}
        write_checkpoint(folder / f"e{at}", tensors, config)
        save_file({name: each[at].copy() for name, each in moments.items()}, folder / f"v{at}.safetensors")
    return folder, drawn, moments


def merged(folder, average, **settings):
    facts = {"second_moments": "./v{}.safetensors"} if average["method"] == "ota" else {}
    experts = [
        {"name": f"e{i}", "model": f"./e{i}", "weight": w, **{k: v.format(i) for k, v in facts.items()}}
        for i, w in enumerate(WEIGHTS)
    ]
    recipe = {"version": 1, "base": "./base", "experts": experts, "assign": {"rule": "none"}, "average": average}
    (folder / "recipe.yaml").write_text(json.dumps(recipe | {"output": {"dtype": "float32"}}))
    plan = make_plan(load_recipe(folder / "recipe.yaml"))
    return load_file(merge(plan, folder / "out", settings=Settings(overwrite=True, **settings)) / "model.safetensors")


@pytest.mark.parametrize("average", AVERAGES, ids=lambda average: "-".join(map(str, average.values())))
def test_the_engine_gives_what_one_call_on_the_whole_model_gives(average, bench):
    folder, drawn, moments = bench
    found = merged(folder, average, slab=BLOCK, workers=2)
    again = merged(folder, average, slab=4 * BLOCK, workers=1)
    method = method_of(average["method"], **{key: value for key, value in average.items() if key != "method"})
    flat = [{name: each[name].reshape(3, -1) for name in sorted(SHAPES)} for each in (drawn, moments)]
    joins = [list(SHAPES)] if average["method"] in ("pcb", "tatr", "ota") else [[name] for name in SHAPES]
    for names in joins:
        deltas, second = (np.concatenate([each[name] for name in names], axis=1) for each in flat)
        beside = {"moments": second} if average["method"] == "ota" else {}
        expected = method(deltas, np.array(WEIGHTS), beside)
        assert expected.any()
        assert np.array_equal(np.concatenate([found[name].ravel() for name in names]), expected)
        assert np.array_equal(np.concatenate([again[name].ravel() for name in names]), expected)
