"""Adapters merged into an adapter: what stock PEFT loads is the sum of what PEFT makes of each."""

import json
import shutil
import warnings

import numpy as np
import pytest
import torch
from conftest import all_files, edit_json, edit_tensors, put, write_adapter
from peft import LoraConfig, PeftModel, get_peft_model
from peft_adapters import convolutional, disturb, gpt2_untied, llama
from safetensors.torch import load_file

from mediator_cli import MediatorError, Settings, load_recipe, make_plan, merge
from mediator_cli.bundle.adapter import AdapterManifest
from mediator_cli.pipeline.adapters import merge_adapters

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::RuntimeWarning")

SOME, ALL = ["q_proj", "v_proj"], ["q_proj", "k_proj", "up_proj", "down_proj"]
CONV = ["conv_layers.1.conv", "q_proj"]
PAIRS = {
    "ranks": (llama, {"target_modules": ALL, "r": 3}, {"target_modules": ALL, "r": 2, "lora_alpha": 3}),
    "modules": (llama, {"target_modules": SOME}, {"target_modules": ALL}),
    "patterns": (
        llama,
        {"target_modules": ALL, "rank_pattern": {"q_proj": 4}, "alpha_pattern": {r"layers\.1\..*up_proj": 9}},
        {"target_modules": SOME, "rank_pattern": {"v_proj": 1}},
    ),
    "rsLoRA": (llama, {"target_modules": ALL, "use_rslora": True}, {"target_modules": ALL, "r": 4}),
    "embeddings": (
        llama, {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}, {"target_modules": ["embed_tokens"]},
    ),
    "Conv1D": (
        gpt2_untied,
        {"target_modules": ["c_attn", "c_proj", "wte"], "fan_in_fan_out": True},
        {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True},
    ),
    "convolution": (convolutional, *2 * [{"target_modules": CONV, "task_type": None}]),
}  # fmt: skip


def write_pair(folder, model, *configs):
    """Save a base, and adapters on it, as PEFT does; give the model's class."""
    torch.manual_seed(0)
    base = model()
    base.save_pretrained(folder / "base")
    for index, config in enumerate(configs):
        again = type(base).from_pretrained(folder / "base")
        made = get_peft_model(again, LoraConfig(**{"r": 2, "lora_alpha": 6, "task_type": "CAUSAL_LM"} | config))
        disturb(made, seed=index).save_pretrained(folder / f"l{index}")
    return type(base)


def merged_by_peft(folder, kind, adapter):
    """Merge an adapter into the base as PEFT does."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(kind.from_pretrained(folder / "base"), adapter).merge_and_unload().state_dict()


def write_recipe(folder, weights=(1.0, 1.0), method="lora_cat", **fields):
    experts = [{"name": f"l{n}", "model": f"./l{n}", "weight": w} for n, w in enumerate(weights)]
    recipe = {"version": 1, "base": "./base", "experts": experts, "average": {"method": method}, **fields}
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    return folder / "recipe.yaml"


def run(folder, name="out", settings=None, **fields):
    return merge(make_plan(load_recipe(write_recipe(folder, **fields))), folder / name, settings=settings or Settings())


@pytest.mark.parametrize("case", PAIRS.values(), ids=PAIRS)
@pytest.mark.parametrize("average", [{"method": "lora_cat"}, {"method": "lora_svd", "energy": 1.0, "rank": 64}])
def test_peft_loads_the_weighted_sum(tmp_path, case, average):
    kind = write_pair(tmp_path, *case)
    weights = (0.5, -1.25)
    out = run(tmp_path, weights=weights, average=average)
    base = kind.from_pretrained(tmp_path / "base").state_dict()
    each = [merged_by_peft(tmp_path, kind, tmp_path / name) for name in ("l0", "l1")]
    found = merged_by_peft(tmp_path, kind, out)
    changed = 0
    for name, tensor in base.items():
        expected = tensor + sum(w * (one[name] - tensor) for w, one in zip(weights, each, strict=True))
        assert torch.allclose(found[name], expected, rtol=1e-4, atol=1e-5), name
        changed += int(not torch.equal(expected, tensor))
    assert changed


def test_the_config_is_plain_where_all_ranks_are_one(tmp_path):
    write_pair(tmp_path, llama, {"target_modules": ALL, "r": 3}, {"target_modules": ALL})
    config = json.loads((run(tmp_path) / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (5, 5, {})
    assert sorted(config["target_modules"]) == sorted(ALL)
    assert config["task_type"] == "CAUSAL_LM"


def test_a_module_that_one_lacks_is_told(tmp_path):
    write_pair(tmp_path, llama, {"target_modules": SOME}, {"target_modules": ALL})
    plan = make_plan(load_recipe(write_recipe(tmp_path)))
    assert len(plan.modules) == 2 * 5
    assert any("l0 leaves 6 of 10 modules as they are" in notice for notice in plan.notices)
    config = json.loads((merge(plan, tmp_path / "out") / "adapter_config.json").read_text())
    assert set(config["rank_pattern"].values()) | {config["r"]} == {2, 4}
    assert config["rank_pattern"] == config["alpha_pattern"]


def test_nothing_of_the_base_is_read(tmp_path):
    write_pair(tmp_path, llama, {"target_modules": ALL}, {"target_modules": ALL})
    plan = make_plan(load_recipe(write_recipe(tmp_path)))
    shutil.rmtree(tmp_path / "base")
    assert (merge(plan, tmp_path / "out") / "adapter_model.safetensors").is_file()


def test_the_manifest_tells_sources_digests_and_ranks(tmp_path):
    write_pair(tmp_path, llama, {"target_modules": ALL}, {"target_modules": SOME})
    out = run(tmp_path)
    manifest = AdapterManifest.model_validate_json((out / "adapter_manifest.json").read_text())
    assert [expert.name for expert in manifest.experts] == ["l0", "l1"]
    assert all(expert.files[0].digest for expert in manifest.experts)
    assert set(manifest.tensors) == set(load_file(out / "adapter_model.safetensors"))
    assert {file.name for file in manifest.files} == {"adapter_model.safetensors", "adapter_config.json", "README.md"}
    assert manifest.modules["model.layers.0.self_attn.q_proj"].rank == 4
    assert manifest.modules["model.layers.0.self_attn.v_proj"].rank == 2
    card = (out / "README.md").read_text()
    assert "| l1 | ./l1 |" in card
    assert "lora_cat" in card


def test_threads_change_no_byte_and_the_seed_alone_the_random_ones(tmp_path):
    write_pair(tmp_path, llama, {"target_modules": ALL}, {"target_modules": ALL})
    average = {"method": "lora_dare_linear", "density": 0.5}

    def weights(name, workers=1, **fields):
        settings = Settings(workers=workers)
        return (run(tmp_path, name, settings, average=average, **fields) / "adapter_model.safetensors").read_bytes()

    first = weights("a")
    assert weights("b", workers=3) == first
    assert weights("c", seed=1) != first


def test_settings_of_single_modules_hold(tmp_path):
    write_pair(tmp_path, llama, {"target_modules": ALL}, {"target_modules": ALL})
    overrides = [
        {"match": "*q_proj*", "weights": {"l1": 0.0}},
        {"layers": [1], "average": {"rank": 3}},
    ]
    out = run(tmp_path, average={"method": "lora_svd", "rank": 1}, overrides=overrides)
    manifest = json.loads((out / "adapter_manifest.json").read_text())
    assert {record["rank"] for name, record in manifest["modules"].items() if ".0." in name} == {1}
    # Without the other adapter, of rank 2, there is no third direction.
    ranks = {name: record["rank"] for name, record in manifest["modules"].items() if ".1." in name}
    assert ranks.pop("model.layers.1.self_attn.q_proj") == 2
    assert set(ranks.values()) == {3}


def test_a_module_without_a_change_has_no_entry(tmp_path):
    write_pair(tmp_path, llama, {"target_modules": ALL}, {"target_modules": ALL})
    told = []
    overrides = [{"match": "*q_proj*", "weights": {"l0": 0.0, "l1": 0.0}}]
    out = run(tmp_path, "out", Settings(notify=told.append), method="lora_svd", overrides=overrides)
    assert not any("q_proj" in name for name in load_file(out / "adapter_model.safetensors"))
    assert any("2 modules have no entry" in notice for notice in told)
    with pytest.raises(MediatorError, match="zero in all modules"):
        run(tmp_path, "none", weights=(0.0, 0.0), method="lora_svd")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(("dtype", "expected"), [("base", "BF16"), ("float32", "F32"), ("float16", "F16")])
def test_the_dtype_is_the_adapters_or_the_recipes(tmp_path, dtype, expected):
    write_pair(tmp_path, llama, {"target_modules": ALL}, {"target_modules": ALL})
    for name in ("l0", "l1"):
        file = tmp_path / name / "adapter_model.safetensors"
        edit_tensors(file, lambda tensors: tensors.update({k: v.bfloat16() for k, v in tensors.items()}))
    plan = make_plan(load_recipe(write_recipe(tmp_path, output={"dtype": dtype})))
    assert plan.modules[0].dtype == expected
    assert load_file(merge(plan, tmp_path / "out") / "adapter_model.safetensors")


def test_an_output_is_replaced_only_if_told(tmp_path):
    write_pair(tmp_path, llama, {"target_modules": ALL}, {"target_modules": ALL})
    first = (run(tmp_path) / "adapter_manifest.json").read_text()
    with pytest.raises(MediatorError, match="exists"):
        run(tmp_path, weights=(1.0, 0.5))
    assert (tmp_path / "out" / "adapter_manifest.json").read_text() == first
    run(tmp_path, "out", Settings(overwrite=True), weights=(1.0, 0.5))
    assert (tmp_path / "out" / "adapter_manifest.json").read_text() != first


def test_an_error_on_the_way_leaves_nothing(tmp_path):
    write_pair(tmp_path, llama, {"target_modules": ALL}, {"target_modules": ALL})
    file = tmp_path / "l1" / "adapter_model.safetensors"
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
    edit_tensors(file, put(name, torch.full((2, 16), torch.nan)))
    before = all_files(tmp_path)
    with pytest.raises(MediatorError, match=r"expert l1 is nan"):
        run(tmp_path)
    after = all_files(tmp_path)
    after.pop("recipe.yaml")
    assert after == before


REFUSED = {
    "DoRA": ({"use_dora": True}, "is a DoRA adapter"),
    "bias": ({"bias": "all"}, "holds whole tensors (modules_to_save or biases)"),
    "lora_bias": ({"lora_bias": True, "bias": "none"}, "has biases beside its factors"),
    "saved": ({"modules_to_save": ["lm_head"]}, "holds whole tensors (modules_to_save or biases)"),
    "tokens": ({"trainable_token_indices": [1, 5]}, "has trained rows of single tokens"),
}


@pytest.mark.parametrize(("config", "message"), REFUSED.values(), ids=REFUSED)
def test_what_no_merge_of_adapters_keeps_is_refused_by_name(tmp_path, config, message):
    write_pair(tmp_path, llama, {"target_modules": ALL}, {"target_modules": ["q_proj"], **config})
    with pytest.raises(MediatorError) as error:
        make_plan(load_recipe(write_recipe(tmp_path)))
    problems = error.value.problems
    assert len(problems) == 1
    assert message in problems[0].message
    assert "experts[1].model" in problems[0].place
    assert "mediator extract-lora ./base ./l1 -o l1-lora" in problems[0].hint


def test_full_checkpoints_among_the_experts_are_told_in_one_message(workshop):
    experts = [{"name": n, "model": f"./{n}"} for n in ("lora", "a", "b")]
    with pytest.raises(MediatorError) as error:
        make_plan(load_recipe(workshop.recipe(experts=experts, average={"method": "lora_cat"})))
    (problem,) = error.value.problems
    assert "a, b are full checkpoints, and lora_cat merges adapters" in problem.message
    assert "mediator extract-lora ./base ./a -o a-lora" in problem.hint


@pytest.mark.parametrize(
    ("fields", "place", "message"),
    [
        ({"assign": {"rule": "all"}}, "assign.rule", "nothing is routed"),
        ({"extract": {"density": 0.5}}, "extract", "extract has no say"),
        ({"tokenizer": "union"}, "tokenizer", "tokenizer has no say"),
        ({"overrides": [{"match": "*q_proj*", "average": {"method": "ties"}}]}, "average.method", "makes an adapter"),
        ({"overrides": [{"match": "*q_proj*", "extract": {"density": 0.5}}]}, "overrides[0].extract", "nothing is"),
        ({"average": {"method": "lora_ties", "rank": 4}}, "average.rank", "act_on: delta"),
    ],
)
def test_what_has_no_say_is_refused(workshop, fields, place, message):
    write_adapter(workshop.folder / "other", 4)
    experts = [{"name": n, "model": f"./{n}"} for n in ("lora", "other")]
    recipe = workshop.recipe(**{"experts": experts, "average": {"method": "lora_cat"}, **fields})
    with pytest.raises(MediatorError) as error:
        make_plan(load_recipe(recipe))
    assert any(place in problem.place and message in problem.message for problem in error.value.problems)


def test_a_report_of_conflict_and_a_url_are_refused(workshop):
    experts = [{"name": "lora", "model": "./lora"}]
    plan = make_plan(load_recipe(workshop.recipe(experts=experts, average={"method": "lora_cat"})))
    with pytest.raises(MediatorError, match="no conflict is measured"):
        merge(plan, workshop.folder / "out", conflicts=workshop.folder / "conflicts.json")
    with pytest.raises(MediatorError, match="written into a folder"):
        merge_adapters(plan, "s3://bucket/out", None, Settings())


def test_adapters_of_other_widths_do_not_fit(workshop):
    write_adapter(workshop.folder / "other", 4)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    edit_tensors(workshop.folder / "other" / "adapter_model.safetensors", put(name, torch.zeros(2, 5)))
    experts = [{"name": n, "model": f"./{n}"} for n in ("lora", "other")]
    with pytest.raises(MediatorError, match=r"does not give \[8, 8\]"):
        make_plan(load_recipe(workshop.recipe(experts=experts, average={"method": "lora_cat"})))


def test_another_base_named_by_an_adapter_is_a_notice(workshop):
    edit_json(workshop.folder / "lora" / "adapter_config.json", base_model_name_or_path="org/other")
    experts = [{"name": "lora", "model": "./lora"}]
    plan = make_plan(load_recipe(workshop.recipe(experts=experts, average={"method": "lora_cat"})))
    assert any("names base 'org/other'" in notice for notice in plan.notices)


def test_the_merged_adapter_is_an_expert_again(workshop):
    write_adapter(workshop.folder / "other", 4, rank=3)
    both = [{"name": n, "model": f"./{n}"} for n in ("lora", "other")]
    workshop.merge("sum", experts=both, average={"method": "lora_cat"})
    one = workshop.merge("full", experts=[{"name": "sum", "model": "./sum"}], **STATIC)
    two = workshop.merge("both", experts=both, **STATIC)
    one, two = (load_file(folder / "model.safetensors") for folder in (one, two))
    for name, tensor in two.items():
        np.testing.assert_allclose(one[name], tensor, rtol=1e-5, atol=1e-6)


STATIC = {
    "assign": {"rule": "none"},
    "average": {"method": "task_arithmetic", "lambda": 1.0},
    "output": {"dtype": "float32"},
}


def test_the_commands_tell_of_an_adapter(mediator, workshop):
    write_adapter(workshop.folder / "other", 4, rank=3)
    experts = [{"name": n, "model": f"./{n}"} for n in ("lora", "other")]
    workshop.recipe(experts=experts, average={"method": "lora_svd", "rank": 2})
    told = mediator("plan", "recipe.yaml", "--no-calibrate")
    assert told.code == 0, told.err
    assert "21 modules" in told.out
    assert "nothing of the base" in told.out
    report = json.loads(mediator("plan", "recipe.yaml", "--json", "--no-calibrate").out)
    assert report["ranks"] == {"lora": [2, 2], "other": [3, 3]}
    assert "is valid: 2 experts, 21 tensors" in mediator("validate", "recipe.yaml").out
    assert mediator("merge", "recipe.yaml", "-o", "out", "--executor", "rank").code == 2
    made = mediator("merge", "recipe.yaml", "-o", "out", "--json")
    assert made.code == 0, made.err
    summary = json.loads(made.out)
    assert set(summary["modules"].values()) == {2}
    assert summary["bytes"] <= report["written_bytes"] + 20_000
    assert "rank 2" in mediator("merge", "recipe.yaml", "-o", "again").out
    assert mediator("inspect", "out").code == 0
    assert "adapters" in mediator("methods").out
    assert "works on adapters" in mediator("methods", "lora_ties").out


def test_parameters_are_words_that_yaml_takes_for_words(workshop):
    recipe = workshop.folder / "plain.yaml"
    experts = "experts: [{name: lora, model: ./lora}]"
    recipe.write_text(f"version: 1\nbase: ./base\n{experts}\naverage: {{method: lora_ties, act_on: delta, rank: 2}}\n")
    assert make_plan(load_recipe(recipe)).modules[0].average.params["act_on"] == "delta"
