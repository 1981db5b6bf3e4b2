"""A mergekit configuration is read as a recipe: the same merge by numpy, or a refusal with its line."""

import json

import numpy as np
import pytest
import torch
from conftest import write_checkpoint
from safetensors.torch import load_file

from mediator_cli import make_plan, merge
from mediator_cli.errors import MediatorError
from mediator_cli.recipe.mergekit.models import names_of

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
    # What comes behind the layers takes the first anchor, as what comes before them.
    places = {"model.embed_tokens.weight": 0.0, "model.norm.weight": 0.0}
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
    base = "" if method == "linear" else "base_model: ./base\n"
    text = f"merge_method: {method}\n{base}models: [{{model: ./a}}, {{model: ./b}}]\n"
    plan = make_plan(load(f"{text}parameters: {parameters}\n"))
    last = next(tensor for tensor in plan.tensors if tensor.name == "model.layers.2.mlp.up_proj.weight")
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


@pytest.mark.parametrize(
    ("method", "key"), [("breadcrumbs", "gamma"), ("della", "epsilon"), ("ties", "density"), ("dare_ties", "density")]
)
def test_models_may_have_values_of_their_own(workshop, load, method, key):
    text = f"""\
merge_method: {method}
base_model: ./base
models:
- {{model: ./a, parameters: {{{key}: [0.1, 0.3]}}}}
- {{model: ./b, parameters: {{{key}: [{{filter: mlp, value: 0.4}}]}}}}
parameters: {{density: 0.5, {key}: 0.2}}
""".replace("density: 0.5, density: 0.2", "density: 0.2")
    assert load(text).recipe.average.params[key] == {"a": [0.1, 0.3], "b": 0.2}
    tensors = {tensor.name: tensor.average for tensor in make_plan(load(text)).tensors}
    assert tensors["model.layers.1.mlp.up_proj.weight"].own == {key: (0.2, 0.4)}
    assert tensors["model.layers.2.self_attn.q_proj.weight"].own == {key: (0.3, 0.2)}
    assert tensors["model.layers.1.self_attn.q_proj.weight"].own == {}
    assert tensors["model.norm.weight"].params[key] == 0.1
    beyond = problems(load, text.replace("value: 0.4", "value: 7"))
    assert [at for at, _, _ in beyond] == [f"5 overrides[0].average.{key}.b"]


def notices(load, text):
    return [notice.partition("recipe.yaml:")[2] for notice in make_plan(load(text)).notices if "recipe.yaml:" in notice]


def test_what_has_no_effect_in_mergekit_is_told_by_name(workshop, load):
    text = "merge_method: sce\nbase_model: ./base\nmodels: [{model: ./a}, {model: ./b}]\n"
    assert notices(load, text + "parameters: {weight: 2, int8_mask: true}\n") == [
        "4 parameters.weight: sce takes no 'weight'; it has no effect, as in mergekit",
        "4 parameters.int8_mask: 'int8_mask' changes no result, and is left out",
    ]
    own = text.replace("./a}", "./a, parameters: {select_topk: 0.5}}")
    message = "sce takes no 'select_topk' of a model; it has no effect, as in mergekit"
    assert notices(load, own) == [f"3 models[0].parameters.select_topk: {message}"]
    outside = text.replace("./a}", "./a, weight: 2}") + "normalize: true\nrandom_seed: 7\n"
    assert load(outside).recipe.seed == 7
    assert notices(load, outside) == [
        "3 models[0].weight: 'weight' stands outside `parameters`; it has no effect, as in mergekit",
        "4 normalize: 'normalize' stands outside `parameters`; it has no effect, as in mergekit",
    ]
    legacy = FILTERS.replace("parameters:", "parameters:\n  embed_slerp: true")
    assert notices(load, legacy) == ["5 parameters.embed_slerp: 'embed_slerp' has no effect here"]
    mistyped = FILTERS.replace("filter: mlp", "filter: mpl")
    assert notices(load, mistyped) == ["10 overrides[0]: '*mpl*' matches no tensor"]
    assert notices(load, TIES.replace("float32", "float64")) == [
        "15 parameters.int8_mask: 'int8_mask' changes no result, and is left out",
        "16 dtype: all arithmetic is in float32, and so is what is written, not in float64",
    ]


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
    assert problems(load, FILTERS.replace("[0, 1]", "[0, 2]"))[0][0] == "7 overrides[2].average.t[1]"
    assert problems(load, TIES.replace("float32", "float8"))[0][0] == "16 output.dtype"


REFUSED = {
    "method": (TIES.replace("d: ties", "d: fisher"), "1 merge_method", "'fisher' has no"),
    "slices without sources": (TIES.replace("models:", "slices:"), "4 slices[0]", "names no sources"),
    "two forms": (TIES + "modules: {default: {}}\n", "18 modules", "has models and modules"),
    "several modules": (
        "merge_method: linear\nmodules: {eyes: {models: [{model: ./a}]}, words: {models: [{model: ./b}]}}\n",
        "2 modules", "modules eyes, words are merged each in its own way",
    ),
    "module without models": ("merge_method: linear\nmodules: {m: {}}\n", "2 modules.m", "neither slices nor models"),
    "chat template": (TIES + "chat_template: chatlm\n", "18 chat_template", "no chat template 'chatlm'"),
    "twice": (TIES.replace("./b", "./a"), "9 models[2].model", "'./a' is listed twice"),
    "base without a weight": (
        "merge_method: linear\nbase_model: ./base\nmodels: [{model: ./a, parameters: {weight: 1}}]\n",
        "2 base_model", "merges base_model too, and gives it no weight",
    ),
    "base with an adapter": (TIES.replace("l: ./base\nm", "l: ./base+./lora\nm"), "2 base_model", "with an adapter"),
    "int64": (TIES.replace("float32", "int64"), "16 dtype", "not written as int64"),
    "filtered vectors": (
        "merge_method: nuslerp\nmodels: [{model: ./a}, {model: ./b}]\n"
        "parameters: {nuslerp_flatten: [{filter: mlp, value: false}]}\n",
        "3 parameters.nuslerp_flatten[0]", "has a filter, which has no counterpart",
    ),
    "unknown key": (TIES.replace("dtype:", "dtpye:"), "16 dtpye", "unknown key 'dtpye'"),
    "no models": ("merge_method: linear\nmodels: []\n", "2 models", "lists no models"),
    "no model": ("merge_method: linear\nmodels: [{mode: ./a}]\n", "2 models[0]", "names no model"),
    "no base": ("merge_method: ties\nmodels: [{model: ./a}]\n", "1 merge_method", "ties needs base_model"),
    "only the base": (
        "merge_method: ties\nbase_model: ./a\nmodels: [{model: ./a}]\n", "3 models", "no model beside the base",
    ),
    "slerp of others": (FILTERS.replace("base_model: ./b", "base_model: ./c"), "3 models", "one of them base_model"),
    "unknown parameter": (TIES.replace("int8_mask", "desnity"), "15 parameters.desnity", "ties takes no 'desnity'"),
    "parameter of a model": (
        TIES.replace("weight: 0.5", "wieght: 0.5"), "7 models[1].parameters.wieght", "ties takes no 'wieght'",
    ),
    "switch": (TIES.replace("ize: true", "ize: [1, 0]"), "14 parameters.normalize", "neither true nor false"),
    "adapter elsewhere": (TIES.replace("./b\n", "./c+./lora\n"), "9 models[2].model", "another model than base_model"),
    "token of nobody": (
        TIES.replace("tokenizer_source: base", "tokenizer: {source: base, tokens: {x: {source: ./c}}}"),
        "17 tokenizer.tokens.x.source", "none of the models",
    ),
    "unknown key of a tokenizer": (
        TIES.replace("tokenizer_source: base", "tokenizer: {sauce: base}"), "17 tokenizer.sauce", "unknown key 'sauce'",
    ),
    "two tokenizers": (TIES + "tokenizer: {source: base}\n", "18 tokenizer", "stands beside tokenizer_source"),
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
    assert names_of(paths) == names


def test_the_command_line_merges_a_configuration(workshop, mediator):
    (workshop.folder / "ties.yml").write_text(TIES)
    assert mediator("validate", "ties.yml").code == 0
    assert mediator("merge", "ties.yml", "-o", "out").code == 0
    assert load_file(workshop.folder / "out" / "model.safetensors").keys() == workshop.base.keys()
