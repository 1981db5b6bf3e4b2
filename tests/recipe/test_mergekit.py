"""A mergekit configuration is read as a recipe: the same merge by numpy, or a refusal with its line."""

import numpy as np
import pytest
from safetensors.torch import load_file

from mediator_cli import make_plan, merge
from mediator_cli.errors import MediatorError
from mediator_cli.recipe.mergekit import _names

TIES = """\
merge_method: ties
base_model: ./base
models:
  - model: ./base
  - model: ./a
    parameters:
      weight: 0.5
      density: 0.4
  - model: ./b
    parameters:
      weight: [0.2, 1.0]
      density: 0.4
parameters:
  normalize: true
  int8_mask: true
dtype: float32
tokenizer_source: base
"""
FILTERS = """\
merge_method: slerp
base_model: ./b
models: [{model: ./a}, {model: ./b}]
parameters:
  t:
    - filter: self_attn
      value: [0, 1]
    - filter: attn.q_proj
      value: 0.9
    - filter: mlp
      value: 0.25
    - value: 0.5
"""


def problems(load, text):
    with pytest.raises(MediatorError) as raised:
        make_plan(load(text))
    return [(p.place.partition("recipe.yaml:")[2], p.message, p.hint) for p in raised.value.problems]


def test_a_configuration_becomes_a_recipe(workshop, load):
    recipe = load(TIES).recipe
    assert (recipe.base, recipe.assign.rule, recipe.tokenizer, recipe.output.dtype) == (
        "./base", "none", "base", "float32",
    )  # fmt: skip
    experts = [(expert.name, expert.model, expert.weight) for expert in recipe.experts]
    assert experts == [("a", "./a", 0.5), ("b", "./b", (0.2, 1.0))]
    assert (recipe.average.method, recipe.average.preset) == ("ties", "mergekit")
    assert recipe.average.params == {"merge": "mean", "density": 0.4}


def mergekit_ties(base, deltas, weights, density):
    """What mergekit's ties does to one tensor: trim, elect signs, mean of what agrees.

    Of entries that equal the k-th largest, mergekit takes any so many as fit; here all stay.
    """
    limits = [np.sort(np.abs(delta).ravel())[::-1][max(1, int(density * delta.size)) - 1] for delta in deltas]
    trimmed = [np.where(np.abs(delta) >= limit, delta, 0) for delta, limit in zip(deltas, limits, strict=True)]
    # In float32 as both programs do: exact ties of signs are common between bfloat16 deltas.
    weighted = [np.float32(weight) * delta for weight, delta in zip(weights, trimmed, strict=True)]
    sign = np.where(sum(weighted) >= 0, 1, -1)
    agree = [np.sign(one) == sign for one in weighted]
    mass = sum(weight * mask for weight, mask in zip(weights, agree, strict=True))
    return base + sum(one * mask for one, mask in zip(weighted, agree, strict=True)) / np.where(mass == 0, 1, mass)


def test_ties_with_a_gradient_of_weights_is_that_of_mergekit(workshop, load):
    found = load_file(merge(make_plan(load(TIES)), workshop.folder / "out") / "model.safetensors")
    places = {"model.embed_tokens.weight": 0.0, "model.norm.weight": 1.0}
    for name, tensor in workshop.base.items():
        place = places.get(name, int(name.split(".")[2]) / 2 if ".layers." in name else None)
        base = tensor.float().numpy()
        deltas = [workshop.experts[e][name].float().numpy() - base for e in "ab"]
        expected = mergekit_ties(base, deltas, [0.5, 0.2 + 0.8 * place], 0.4)
        np.testing.assert_allclose(found[name].numpy(), expected, rtol=1e-5, atol=1e-6)
    assert found["model.norm.weight"].dtype.itemsize == 4


def test_the_first_filter_that_fits_holds(workshop, load):
    plan = make_plan(load(FILTERS))
    assert [expert.name for expert in plan.experts] == ["b", "a"]
    found = {tensor.name: tensor.average.params["t"] for tensor in plan.tensors}
    for name, t in found.items():
        if ".self_attn." in name:
            assert t == int(name.split(".")[2]) / 2
        else:
            assert t == (0.25 if ".mlp." in name else 0.5)


def test_filters_of_weights_fall_back_to_those_for_all(workshop, load):
    text = """\
merge_method: linear
models:
  - model: ./a
    parameters: {weight: [{filter: mlp, value: 3}]}
  - model: ./b
parameters:
  weight: [{filter: "*", value: 2}]
  normalize: false
"""
    plan = make_plan(load(text))
    assert plan.base.path.name == "a"
    assert plan.tensors[0].average.params == {"normalize": False}
    assert {tensor.weights for tensor in plan.tensors if ".mlp." in tensor.name} == {(3.0, 2.0)}
    assert {tensor.weights for tensor in plan.tensors if ".mlp." not in tensor.name} == {(2.0, 2.0)}


def test_what_stands_behind_the_value_for_all_never_holds(workshop, load):
    later = FILTERS.replace("    - filter: mlp", "    - value: 0.75\n    - filter: mlp")
    found = {tensor.name: tensor.average.params["t"] for tensor in make_plan(load(later)).tensors}
    assert {t for name, t in found.items() if ".self_attn." not in name} == {0.75}
    own = TIES.replace("weight: 0.5", "weight: {value: 0.5}")
    common = own.replace("  normalize: true", "  normalize: true\n  weight: [{filter: mlp, value: 9}]")
    assert {tensor.weights[0] for tensor in make_plan(load(common)).tensors} == {0.5}


@pytest.mark.parametrize(
    ("method", "parameters", "expected"),
    [
        ("linear", "{}", {"normalize": True}),
        ("task_arithmetic", "{lambda: 0.5}", {"lambda": 0.5, "normalize": False}),
        ("task_arithmetic", "{normalize: true}", {"lambda": 1.0, "normalize": True}),
        ("ties", "{normalize: false, lambda: [1, 2]}", {"merge": "sum", "density": 1.0, "trim": "tensor"}),
        ("dare_ties", "{density: 0.3}", {"merge": "sum", "density": 0.3, "rescale": "l1"}),
        ("dare_ties", "{normalize: true, rescale: false}", {"merge": "mean", "density": 1.0, "rescale": "none"}),
        ("dare_linear", "{density: [0.3, 0.5], normalize: true}", {"density": 0.5, "rescale": "l1", "normalize": True}),
    ],
)
def test_parameters_mean_what_they_mean_to_mergekit(workshop, load, method, parameters, expected):
    text = f"merge_method: {method}\nbase_model: ./base\nmodels: [{{model: ./a}}, {{model: ./b}}]\n"
    last = make_plan(load(f"{text}parameters: {parameters}\n")).tensors[-1]
    assert last.name == "model.norm.weight"
    assert {name: last.average.params[name] for name in expected} == expected


def test_an_adapter_on_the_base_is_an_expert(workshop, load):
    text = "merge_method: task_arithmetic\nbase_model: ./base\nmodels: [{model: ./base+./lora}, {model: ./a}]\n"
    plan = make_plan(load(text))
    assert [(expert.name, expert.kind) for expert in plan.experts] == [("lora", "lora"), ("a", "full")]


def test_a_tokenizer_of_a_model_is_that_of_its_expert(workshop, load):
    for written in ("tokenizer_source: ./b", "tokenizer: {source: 'model:./b'}"):
        assert load(TIES.replace("tokenizer_source: base", written)).recipe.tokenizer == "expert:b"
    assert load(TIES.replace("tokenizer_source: base", "tokenizer_source: ./base")).recipe.tokenizer == "base"
    assert load(TIES.replace("tokenizer_source: base", "tokenizer_source: union")).recipe.tokenizer == "union"


def test_changes_and_later_faults_stand_where_they_were_written(workshop, load):
    assert load(TIES, "experts[0].weight=2", "seed=3").recipe.experts[0].weight == 2.0
    assert problems(load, TIES.replace("./b\n", "./gone\n"))[0][0].startswith("9 experts[1].model")
    assert problems(load, TIES.replace("weight: 0.5", "weight: heavy"))[0][0] == "7 experts[0].weight"
    found = problems(load, TIES.replace("density: 0.4", "density: 1.4"))
    assert [place for place, _, _ in found] == ["8 average.density"]
    assert problems(load, FILTERS.replace("filter: mlp", "filter: mpl"))[0][0] == "10 overrides[0].match"
    assert problems(load, FILTERS.replace("[0, 1]", "[0, 2]"))[0][0] == "7 overrides[2].average.t[1]"
    assert problems(load, TIES.replace("float32", "float8"))[0][0] == "16 output.dtype"


REFUSED = {
    "method": (TIES.replace("d: ties", "d: breadcrumbs"), "1 merge_method", "'breadcrumbs' has no"),
    "slices": (TIES.replace("models:", "slices:"), "3 slices", "mergekit's `slices` has no counterpart"),
    "modules": (TIES + "modules: {}\n", "18 modules", "mergekit's `modules` has no counterpart"),
    "chat template": (TIES + "chat_template: auto\n", "18 chat_template", "`chat_template` has no counterpart"),
    "unknown key": (TIES.replace("dtype:", "dtpye:"), "16 dtpye", "unknown key 'dtpye'"),
    "no models": ("merge_method: linear\nmodels: []\n", "2 models", "lists no models"),
    "no model": ("merge_method: linear\nmodels: [{mode: ./a}]\n", "2 models[0]", "names no model"),
    "no base": ("merge_method: ties\nmodels: [{model: ./a}]\n", "1 merge_method", "ties needs base_model"),
    "only the base": (
        "merge_method: ties\nbase_model: ./a\nmodels: [{model: ./a}]\n", "3 models", "no model beside the base",
    ),
    "slerp of others": (FILTERS.replace("base_model: ./b", "base_model: ./c"), "3 models", "one of them base_model"),
    "densities": (TIES.replace("0.4\nparam", "0.5\nparam"), "12 models[2].parameters.density", "different densities"),
    "unknown parameter": (TIES.replace("int8_mask", "gamma"), "15 parameters.gamma", "ties takes no 'gamma'"),
    "parameter of a model": (
        TIES.replace("weight: 0.5", "epsilon: 0.5"), "7 models[1].parameters.epsilon", "takes no 'epsilon' of a model",
    ),
    "switch": (TIES.replace("ize: true", "ize: [1, 0]"), "14 parameters.normalize", "neither true nor false"),
    "adapter elsewhere": (TIES.replace("./b\n", "./c+./lora\n"), "9 models[2].model", "another model than base_model"),
    "tokens": (
        TIES.replace("tokenizer_source: base", "tokenizer: {source: base, tokens: {}}"),
        "17 tokenizer.tokens", "`tokenizer.tokens` has no counterpart",
    ),
    "tokenizer of nobody": (TIES.replace("source: base", "source: ./c"), "17 tokenizer_source", "none of the models"),
    "no mapping": (TIES.replace("  normalize: true\n  int8_mask: true", "  - a"), "13 parameters", "is no mapping"),
}  # fmt: skip


@pytest.mark.parametrize("row", REFUSED.values(), ids=REFUSED)
def test_what_has_no_counterpart_is_refused_by_name_and_line(workshop, load, row):
    text, place, message = row
    found = [problem for problem in problems(load, text) if problem[0] == place and message in problem[1]]
    assert len(found) == 1
    assert found[0][2]


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["org/Model-7B@main", "x/Model-7B"], ["Model-7B", "Model-7B-2"]),
        (["a/", "A", "a-2"], ["a", "A-2", "a-2-2"]),
        (["./base", "..", "ünï.code"], ["base-2", "expert", "n-code"]),
    ],
)
def test_experts_are_named_after_their_paths(paths, names):
    assert _names(paths) == names


def test_the_command_line_merges_a_configuration(workshop, mediator):
    (workshop.folder / "ties.yml").write_text(TIES)
    assert mediator("validate", "ties.yml").code == 0
    assert mediator("merge", "ties.yml", "-o", "out").code == 0
    assert load_file(workshop.folder / "out" / "model.safetensors").keys() == workshop.base.keys()
