"""Numbers that each expert has for itself: the merge is that of each expert with its own."""

import pytest
import torch
from safetensors.torch import load_file

from mediator_cli import load_recipe, make_plan, merge
from mediator_cli.errors import MediatorError

FIELDS = {"assign": {"rule": "none"}, "output": {"dtype": "float32"}}


def merged(workshop, experts, **average):
    named = [{"name": name, "model": f"./{name}"} for name in experts]
    path = workshop.recipe(experts=named, average=average, **FIELDS)
    out = merge(make_plan(load_recipe(path)), workshop.folder / f"out-{len(list(workshop.folder.iterdir()))}")
    return load_file(out / "model.safetensors")


OWN = {
    "dare_linear": {"density": {"a": 0.3, "b": 1.0}},
    "della_linear": {"density": {"a": 0.4, "*": 0.6}, "epsilon": {"a": 0.1, "b": [0.05, 0.3]}, "lambda": 1.0},
    "breadcrumbs": {"density": {"a": 0.3, "b": 0.9}, "gamma": {"b": 0.05}, "over": "tensor", "lambda": 1.0},
    "breadcrumbs over rows": {"density": {"a": 0.3, "b": 0.9}, "gamma": {"b": 0.05}, "lambda": 1.0},
}


@pytest.mark.parametrize("rescale", ["none", "l1"])
@pytest.mark.parametrize("case", OWN)
def test_a_sum_is_that_of_each_expert_merged_with_its_own_numbers(workshop, case, rescale):
    method, params = case.split()[0], {**OWN[case], "normalize": False, "rescale": rescale}
    both = merged(workshop, "ab", method=method, **params)
    alone = {}
    for name in "ab":
        own = {k: v.get(name, v.get("*")) if isinstance(v, dict) else v for k, v in params.items()}
        alone[name] = merged(workshop, name, method=method, **{k: v for k, v in own.items() if v is not None})
    for tensor, base in workshop.base.items():
        deltas = [alone[name][tensor] - base.float() for name in "ab"]
        torch.testing.assert_close(both[tensor], base.float() + sum(deltas), rtol=1e-5, atol=1e-6)
    assert any(not torch.equal(alone["a"][name], alone["b"][name]) for name in both)


def test_equal_numbers_are_one_number(workshop):
    same = merged(workshop, "ab", method="ties", density={"a": 0.4, "*": 0.4})
    once = merged(workshop, "ab", method="ties", density=0.4)
    assert all(torch.equal(same[name], once[name]) for name in once)


def test_ties_over_the_model_ranks_each_expert_by_its_own_share(workshop):
    found = merged(workshop, "ab", method="ties", density={"a": 1.0, "b": 0.001}, trim="model", keep="exact")
    # Next to nothing of b is left, so that nearly every entry is a's own.
    other = sum(int((found[n] != workshop.experts["a"][n].float()).sum()) for n in found)
    assert 0 < other <= 0.01 * sum(tensor.numel() for tensor in found.values())


def test_overrides_change_the_numbers_of_those_that_they_name(workshop):
    overrides = [
        {"match": "*.mlp.*", "average": {"density": {"b": 0.9}}},
        {"match": "*.up_proj.*", "average": {"density": 0.5}},
        {"match": "*.o_proj.*", "average": {"method": "ties", "density": {"a": [0.1, 0.5]}}},
    ]
    path = workshop.recipe(average={"method": "ties", "density": 0.3}, overrides=overrides, **FIELDS)
    found = {tensor.name: tensor.average for tensor in make_plan(load_recipe(path)).tensors}
    layer = "model.layers.1"
    assert found[f"{layer}.mlp.down_proj.weight"].own == {"density": (0.3, 0.9)}
    assert found[f"{layer}.mlp.down_proj.weight"].written["density"] == {"b": 0.9}
    assert found[f"{layer}.mlp.up_proj.weight"].own == {}
    assert found[f"{layer}.self_attn.o_proj.weight"].own == {"density": (0.3, 0.2)}
    assert found[f"{layer}.self_attn.q_proj.weight"].params["density"] == 0.3


@pytest.mark.parametrize(
    ("average", "place", "message"),
    [
        ({"method": "ties", "density": {"c": 0.3}}, "average.density.c", "no expert 'c'"),
        ({"method": "ties", "density": {"a": 3}}, "average.density.a", "less than or equal to 1"),
        ({"method": "ties", "density": {"a": [0.3, 3]}}, "average.density.a[1]", "less than or equal to 1"),
        ({"method": "ties", "density": {"*": 3}}, "average.density", "less than or equal to 1"),
        ({"method": "ties", "lambda": {"a": 3}}, "average.lambda", "'lambda' of ties is one for all experts"),
        ({"method": "della", "epsilon": {"a": 0.4}}, "average.epsilon.a", "leaves (0, 1)"),
    ],
)
def test_wrong_numbers_of_one_expert_are_told_with_their_place(workshop, average, place, message):
    with pytest.raises(MediatorError) as raised:
        make_plan(load_recipe(workshop.recipe(average=average, **FIELDS)))
    found = [problem for problem in raised.value.problems if problem.place.endswith(f" {place}")]
    assert len(found) == 1, raised.value
    assert message in found[0].message
