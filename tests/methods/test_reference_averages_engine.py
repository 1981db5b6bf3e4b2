"""Averages and arcs through the engine: splits of a model of several tensors, columns, weights that are refused."""

import json

import numpy as np
import pytest
import torch
from conftest import write_checkpoint
from safetensors.numpy import load_file
from test_reference_averages import draw, turned

from mediator_cli import MediatorError, Settings, load_recipe, make_plan, merge
from mediator_cli.checkpoint.blocks import BLOCK

SHAPES = {"model.layers.0.a.weight": (300, 200), "model.layers.0.b.weight": (170, 400), "model.layers.1.n": (50,)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base and two experts of several tensors and blocks."""
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("base", "x", "y")):
        tensors = {n: torch.from_numpy(draw(1, np.prod(s), seed).reshape(s)) for n, s in SHAPES.items()}
        write_checkpoint(folder / name, tensors, {"num_hidden_layers": 2})
    return folder


def run(folder, average, weights=(1.0, 1.0), **settings):
    experts = [{"name": n, "model": f"./{n}", "weight": w} for n, w in zip("xy", weights, strict=True)]
    recipe = {"version": 1, "base": "./base", "experts": experts, "assign": {"rule": "none"}, "average": average}
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    how = Settings(overwrite=True, **{"workers": 2, **settings})
    merged = load_file(
        merge(make_plan(load_recipe(folder / "recipe.yaml")), folder / "out", settings=how) / "model.safetensors"
    )
    return np.concatenate([merged[name].ravel() for name in SHAPES])


@pytest.mark.parametrize("split", [0.0, 0.31, 0.7, 1.0])
def test_a_split_lies_at_the_same_entry_for_any_slab_and_thread(folder, split):
    average = {"method": "m2n2_crossover", "t": 0.2, "split": split}
    one = run(folder, average, workers=1, slab=8 * BLOCK)
    many = run(folder, average, workers=3, slab=BLOCK)
    assert np.array_equal(one.view(np.int32), many.view(np.int32))
    x, y = (np.concatenate([draw(1, np.prod(s), seed)[0] for s in SHAPES.values()]).astype(float) for seed in (1, 2))
    at = round(split * len(x))
    expected = np.concatenate([turned(x, y, 0.2)[:at], turned(x, y, 0.8)[at:]])
    np.testing.assert_allclose(one, expected, rtol=1e-5, atol=1e-6)


def test_columns_through_the_engine_are_those_of_matrices(folder):
    merged = run(folder, {"method": "nuslerp", "over": "column", "space": "weight"}, (3.0, 1.0))
    shape = SHAPES["model.layers.0.a.weight"]
    x, y = (draw(1, np.prod(shape), seed)[0].reshape(shape).astype(float) for seed in (1, 2))
    expected = np.stack([turned(a, b, 0.25) for a, b in zip(x.T, y.T, strict=True)]).T
    np.testing.assert_allclose(merged[: x.size], expected.ravel(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("weight", [0.0, -0.5])
def test_metrics_not_above_zero_are_refused_by_the_plan(folder, weight):
    with pytest.raises(MediatorError, match=rf"experts: a weight is {weight:g}, and metrics_weighted_like takes"):
        run(folder, {"method": "metrics_weighted_like"}, (1.0, weight))


def test_the_hint_of_weights_that_cancel_names_no_parameter_that_is_missing(folder):
    with pytest.raises(MediatorError, match="sum to zero, and karcher") as refused:
        run(folder, {"method": "karcher"}, (1.0, -1.0))
    assert "normalize" not in str(refused.value)
