"""Merges with weights and parameters that differ by tensor, against numpy; the same bits for any slab and threads."""

import json

import numpy as np
import pytest
import torch
from conftest import write_checkpoint
from safetensors.torch import load_file

from mediator_cli import Settings, load_recipe, make_plan, merge
from mediator_cli.checkpoint.blocks import BLOCK
from mediator_cli.engine.statistics import group_by_method
from mediator_cli.methods.registry import methods

STATIC = {"assign": {"rule": "none"}, "output": {"dtype": "float32"}}


def experts(a=1.0, b=1.0):
    return [{"name": "a", "model": "./a", "weight": a}, {"name": "b", "model": "./b", "weight": b}]


def arrays(tensors):
    return {name: tensor.double().numpy() for name, tensor in tensors.items()}


def merged(workshop, **fields):
    return load_file(workshop.merge("out", **STATIC | fields) / "model.safetensors")


def expected_at(name, anchors):
    """Read anchors at a tensor of the three layers."""
    place = {"model.embed_tokens.weight": 0.0, "model.norm.weight": 1.0}.get(name)
    place = int(name.split(".")[2]) / 2 if place is None else place
    return np.interp(place, np.linspace(0, 1, len(anchors)), anchors)


def assert_close(found, expected):
    for name, tensor in found.items():
        np.testing.assert_allclose(tensor.double().numpy(), expected[name], rtol=2e-6, atol=2e-7, err_msg=name)


def test_weights_by_pattern_and_over_the_layers_are_those_of_numpy(workshop):
    overrides = [{"match": "*.mlp.*", "layers": "0-1", "weights": {"b": 3.0}}]
    found = merged(workshop, experts=experts(a=[0.2, 1.0, 0.6]), overrides=overrides)
    a, b = (arrays(workshop.experts[name]) for name in "ab")
    expected = {}
    for name in workshop.base:
        first = expected_at(name, [0.2, 1.0, 0.6])
        second = 3.0 if ".mlp." in name and ".layers.2." not in name else 1.0
        expected[name] = (first * a[name] + second * b[name]) / (first + second)
    assert_close(found, expected)


def test_a_factor_over_the_layers_is_that_of_numpy(workshop):
    average = {"method": "task_arithmetic", "lambda": [0.0, 0.5, 2.0]}
    base, a, b = arrays(workshop.base), *(arrays(workshop.experts[name]) for name in "ab")
    expected = {n: base[n] + expected_at(n, [0, 0.5, 2]) * (a[n] + b[n] - 2 * base[n]) for n in base}
    assert_close(merged(workshop, average=average), expected)


def test_slerp_goes_from_one_expert_to_the_other_over_the_layers(workshop):
    found = merged(workshop, average={"method": "slerp", "t": [0, 1]})
    first, last = workshop.experts["a"], workshop.experts["b"]
    for name in ("model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"):
        torch.testing.assert_close(found[name], first[name].float())
    for name in ("model.norm.weight", "model.layers.2.mlp.up_proj.weight"):
        torch.testing.assert_close(found[name], last[name].float())


def ties_by_numpy(workshop, densities, over, weights):
    """TIES from its paper: `densities` and `weights` by tensor name; thresholds and majority over what `over` says."""
    base, both = arrays(workshop.base), [arrays(workshop.experts[name]) for name in "ab"]
    # The engine ranks float32 deltas.
    deltas = {n: [(np.float32(e[n]) - np.float32(base[n])).astype(np.float64) for e in both] for n in base}
    cells = [list(base)] if over == "model" else [[name] for name in base]
    result = {}
    for cell in cells:
        size = sum(base[name].size for name in cell)
        ranked = [np.sort(np.concatenate([np.abs(deltas[n][e]).ravel() for n in cell]))[::-1] for e in range(2)]
        trimmed, signs = {}, 0.0
        for name in cell:
            k = min(size, int(size * densities[name]) + 1)
            kept = [np.where(np.abs(d) >= r[k - 1], d, 0) for d, r in zip(deltas[name], ranked, strict=True)]
            trimmed[name] = [weight * one for weight, one in zip(weights[name], kept, strict=True)]
            signs += np.sign(sum(trimmed[name])).sum()
        for name in cell:
            elected = np.sign(sum(trimmed[name]))
            elected = np.where(elected == 0, np.sign(signs), elected)
            agree = [np.where(np.sign(one) == elected, one, 0) for one in trimmed[name]]
            mass = sum(w * (one != 0) for w, one in zip(weights[name], agree, strict=True))
            result[name] = base[name] + sum(agree) / np.where(mass == 0, 1, mass)
    return result


@pytest.mark.parametrize("over", ["tensor", "model"])
def test_densities_over_the_layers_are_those_of_numpy(workshop, over):
    overrides = [{"match": "*.mlp.*", "average": {"density": 0.6}}, {"layers": 2, "weights": {"b": 2}}]
    average = {"method": "ties", "trim": over, "density": [0.1, 0.5, 0.2]}
    densities = {n: 0.6 if ".mlp." in n else expected_at(n, [0.1, 0.5, 0.2]) for n in workshop.base}
    weights = {n: (1.0, 2.0 if ".layers.2." in n else 1.0) for n in workshop.base}
    found = merged(workshop, average=average, overrides=overrides)
    assert_close(found, ties_by_numpy(workshop, densities, over, weights))


def test_numbers_and_weights_never_cut_the_model_into_parts(workshop):
    overrides = [
        {"match": "*.mlp.*", "average": {"density": 0.6}},
        {"layers": 2, "weights": {"b": 2}},
        {"match": "*.self_attn.*", "average": {"zero_sign": "positive"}},
    ]
    fields = {"average": {"method": "ties", "density": [0.1, 0.5], "lambda": [1, 2]}, "overrides": overrides}
    plan = make_plan(load_recipe(workshop.recipe(**fields)))
    groups = [{tensor.name for tensor in group.tensors} for group in group_by_method(plan.tensors)]
    attention = {name for name in workshop.base if ".self_attn." in name}
    assert sorted(groups, key=len) == sorted([attention, set(workshop.base) - attention], key=len)


def test_a_factor_over_the_layers_costs_no_further_reading(workshop):
    def read(**average):
        plan = make_plan(load_recipe(workshop.recipe(average={"method": "ties", **average})))
        (group,) = group_by_method(plan.tensors)
        return group.passes()

    # One to count inside the brackets of all thresholds, one for the majority of signs.
    assert read() == read(**{"lambda": [0.5, 1.0]}) == 2
    assert read(density=[0.1, 0.2, 0.4]) == 2
    assert read(density=[0.1, 0.2, 0.4, 0.3, 0.15, 0.1, 0.9]) == 2
    assert read(density=1.0) == 1


METHODS = [
    name
    for name, method in methods().items()
    if "density" in method.schema.model_fields and method.scope == "element" and not method.needs_moments
]


@pytest.mark.parametrize("method", METHODS)
def test_slabs_and_threads_change_no_bit_of_a_merge_with_gradients(workshop, method):
    names = [f"model.layers.{n}.mlp.up_proj.weight" for n in range(3)]
    for seed, source in enumerate(("base", "a", "b")):
        generator = torch.Generator().manual_seed(seed)
        tensors = {name: torch.randn(BLOCK + 5000, generator=generator) for name in names}
        write_checkpoint(workshop.folder / source, tensors)
    fields = {"experts": experts(a=[0.3, 1]), "average": {"method": method, "density": [0.2, 0.7]}, **STATIC}
    plan = make_plan(load_recipe(workshop.recipe(**fields)))
    found = []
    for workers, slab in ((1, 2 * BLOCK), (3, BLOCK)):
        settings = Settings(workers=workers, slab=slab, overwrite=True)
        out = merge(plan, workshop.folder / "out", settings=settings)
        found.append(json.loads((out / "routing_manifest.json").read_text())["digest"])
    assert found[0] == found[1]


def test_the_sign_that_breaks_ties_is_elected_with_each_tensors_own_weights(workshop):
    tied, decides = (f"model.layers.{n}.mlp.up_proj.weight" for n in (0, 2))
    moves = {"base": (0, 0), "a": (1, 2), "b": (-1, -1)}
    for source, (first, second) in moves.items():
        tensors = {name: torch.zeros(shape) for name, shape in ((tied, 4), (f"{tied[:13]}1.w", 4), (decides, 50))}
        tensors[tied] += first
        tensors[decides] += second
        write_checkpoint(workshop.folder / source, tensors)
    average = {"method": "ties", "density": 1.0}
    plain = merged(workshop, average=average)
    weighed = load_file(
        workshop.merge("other", **STATIC, average=average, overrides=[{"layers": 2, "weights": {"b": 3}}])
        / "model.safetensors"
    )
    # 2 - 1 > 0 > 2 - 3: the majority of the whole model turns, and with it the entries that are tied.
    assert (plain[tied].unique().tolist(), weighed[tied].unique().tolist()) == ([1.0], [-1.0])
    assert (plain[decides].unique().tolist(), weighed[decides].unique().tolist()) == ([2.0], [-1.0])
