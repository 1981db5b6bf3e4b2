"""A mergekit configuration is read as a recipe: the same merge by numpy, or a refusal with its line."""

import json

import numpy as np
import pytest
import torch
from conftest import write_checkpoint
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
        ("breadcrumbs", "{}", {"density": 1.0, "gamma": 0.01, "over": "tensor", "keep": "exact", "normalize": False}),
        ("breadcrumbs", "{density: 0.5, gamma: [0.2, 0.1], normalize: true}", {"gamma": 0.1, "normalize": True}),
        ("breadcrumbs_ties", "{lambda: 2}", {"density": 1.0, "gamma": 0.01, "lambda": 2.0, "merge": "sum"}),
        ("breadcrumbs_ties", "{gamma: 0.2, normalize: true}", {"gamma": 0.2, "merge": "mean", "over": "tensor"}),
        ("della", "{}", {"density": 1.0, "epsilon": 0.15, "rescale": "l1", "lambda": 1.0, "merge": "mean"}),
        ("della", "{density: 0.5, epsilon: 0.2, normalize: false}", {"density": 0.5, "epsilon": 0.2, "merge": "sum"}),
        ("della", "{rescale: false, normalize: true}", {"rescale": "none", "merge": "mean"}),
        ("della_linear", "{}", {"density": 1.0, "epsilon": 0.15, "rescale": "l1", "normalize": False}),
        ("della_linear", "{density: 0.4, epsilon: [0.2, 0.3], normalize: true}", {"epsilon": 0.3, "normalize": True}),
        ("sce", "{}", {"select_topk": 1.0, "merged": "selected", "floor": 1e-6}),
        ("sce", "{select_topk: [0.1, 0.6], int8_mask: true}", {"select_topk": 0.6}),
    ],
)
def test_parameters_mean_what_they_mean_to_mergekit(workshop, load, method, parameters, expected):
    text = f"merge_method: {method}\nbase_model: ./base\nmodels: [{{model: ./a}}, {{model: ./b}}]\n"
    last = make_plan(load(f"{text}parameters: {parameters}\n")).tensors[-1]
    assert last.name == "model.norm.weight"
    assert {name: last.average.params[name] for name in expected} == expected


def mergekit_breadcrumbs_ties(base, deltas, density, gamma):
    """What mergekit's breadcrumbs_ties does to one tensor: drop outliers and small ones, elect signs, sum."""
    masked = []
    for delta in deltas:
        order, n_top, n_kept = np.argsort(np.abs(delta), axis=None), int(gamma * delta.size), int(density * delta.size)
        n_small = max(0, delta.size - n_kept - n_top)
        mask = np.zeros(delta.size, bool)
        mask[order[n_small : n_small + n_kept]] = True
        masked.append(np.where(mask.reshape(delta.shape), delta, 0))
    weighted = [np.float32(weight) * delta for weight, delta in zip((2, 1), masked, strict=True)]
    sign = np.where(sum(weighted) >= 0, 1, -1)
    return base + sum(np.where(np.sign(one) == sign, one, 0) for one in weighted)


def mergekit_sce(base, deltas, select_topk):
    """What mergekit's sce does to one tensor: where experts vary most, weigh by energy, erase the lesser sign."""
    stacked = np.stack(deltas)
    spread = stacked.var(axis=0)
    n_chosen = int(select_topk * np.count_nonzero(spread))
    chosen = stacked * (spread >= np.sort(spread, axis=None)[-n_chosen])
    energy = (chosen.astype(np.float64) ** 2).reshape(len(deltas), -1).mean(axis=1)
    weights = (energy / energy.sum()).reshape(-1, *[1] * base.ndim)
    agree = np.sign(chosen) == np.where(chosen.sum(axis=0) >= 0, 1, -1)
    mass = np.maximum((weights * agree).sum(axis=0), 1e-6)
    return base + (chosen * weights * agree).sum(axis=0) / mass


def exact_experts(workshop):
    """Experts whose deltas are all different in size, so that no two entries are equally large."""
    made = {}
    for seed, name in enumerate("ab"):
        rng = np.random.default_rng(seed)
        made[name] = {}
        for key, tensor in workshop.base.items():
            steps = (rng.permutation(tensor.numel()) + 1 + seed / 2) * rng.choice([-1, 1], tensor.numel()) / 1024
            made[name][key] = tensor.float() + torch.from_numpy(steps.astype(np.float32)).reshape(tensor.shape)
        write_checkpoint(workshop.folder / name, made[name])
    return made


@pytest.mark.parametrize(
    ("method", "formula", "parameters"),
    [
        ("breadcrumbs_ties", mergekit_breadcrumbs_ties, {"density": 0.5, "gamma": 0.2}),
        ("breadcrumbs_ties", mergekit_breadcrumbs_ties, {"density": 0.75, "gamma": 0.5}),
        ("sce", mergekit_sce, {"select_topk": 0.25}),
    ],
)
def test_the_merge_is_that_of_mergekit(workshop, load, method, formula, parameters):
    experts = exact_experts(workshop)
    weight = ", parameters: {weight: 2}" if method != "sce" else ""
    models = f"[{{model: ./base}}, {{model: ./a{weight}}}, {{model: ./b}}]"
    text = f"merge_method: {method}\nbase_model: ./base\nmodels: {models}\nparameters: {json.dumps(parameters)}\n"
    found = load_file(merge(make_plan(load(f"{text}dtype: float32\n")), workshop.folder / "out") / "model.safetensors")
    for name, tensor in workshop.base.items():
        base = tensor.float().numpy()
        deltas = [experts[e][name].numpy() - base for e in "ab"]
        np.testing.assert_allclose(
            found[name].numpy(), formula(base, deltas, **parameters), rtol=1e-5, atol=1e-6, err_msg=name
        )


@pytest.mark.parametrize(
    ("method", "key"),
    [("breadcrumbs", "gamma"), ("breadcrumbs_ties", "gamma"), ("della", "epsilon"), ("della_linear", "epsilon")],
)
def test_what_all_models_have_alike_is_one_parameter_here(workshop, load, method, key):
    own = f"parameters: {{weight: 2, density: 0.5, {key}: 0.2}}"
    text = f"merge_method: {method}\nbase_model: ./base\nmodels:\n- {{model: ./a, {own}}}\n- {{model: ./b, {own}}}\n"
    recipe = load(text).recipe
    assert recipe.average.params == {"density": 0.5, key: 0.2}
    assert [expert.weight for expert in recipe.experts] == [2.0, 2.0]
    filtered = text.replace(f"{key}: 0.2", f"{key}: [{{filter: mlp, value: 0.1}}, {{value: 0.2}}]")
    found = {tensor.name: tensor.average.params[key] for tensor in make_plan(load(filtered)).tensors}
    assert all(value == (0.1 if ".mlp." in name else 0.2) for name, value in found.items())
    message = f"models have different values of '{key}'; here all experts of a method share one"
    hint = f"give all models the same {key}, or set it once under `parameters`"
    other = text.replace(f"{key}: 0.2", f"{key}: 0.1", 1)
    assert problems(load, other) == [(f"5 models[1].parameters.{key}", message, hint)]
    one_only = text.replace(f", {key}: 0.2", "", 1)
    assert [at for at, _, _ in problems(load, one_only)] == [f"5 models[1].parameters.{key}"]


def test_the_energies_of_sce_are_its_weights(workshop, load):
    text = "merge_method: sce\nbase_model: ./base\nmodels: [{model: ./a}, {model: ./b}]\n"
    assert [expert.weight for expert in load(text).recipe.experts] == [1.0, 1.0]
    common = problems(load, text + "parameters: {weight: 2}\n")
    assert [(at, message) for at, message, _ in common] == [("4 parameters.weight", "sce takes no 'weight'")]
    own = problems(load, text.replace("./a}", "./a, parameters: {weight: 2}}"))
    assert own == [("3 models[0].parameters.weight", "sce takes no 'weight' of a model", "sce takes none")]


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
    "method": (TIES.replace("d: ties", "d: model_stock"), "1 merge_method", "'model_stock' has no"),
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
    "densities": (
        TIES.replace("0.4\nparam", "0.5\nparam"), "12 models[2].parameters.density", "different values of 'density'",
    ),
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
