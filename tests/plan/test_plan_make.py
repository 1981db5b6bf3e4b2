"""Plans: every tensor once, units, candidates, overrides, dtypes, notices, winners, and numbers that come true."""

import json

import pytest
import torch
from conftest import CONFIG, edit_json, edit_tensors, fine_tune, shapes, write_adapter, write_checkpoint
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from mediator_cli import Settings, load_recipe, make_plan
from mediator_cli.pipeline.estimate import describe_plan

Q0 = "model.layers.0.self_attn.q_proj.weight"
MLP0 = "model.layers.0.mlp.up_proj.weight"
NORM = "model.norm.weight"
LAYERS = tuple(f"model.layers.{n}" for n in range(3))


def plan_of(workshop, *changes, **fields):
    return make_plan(load_recipe(workshop.recipe(**fields), changes))


def tensor_of(plan, name):
    return next(tensor for tensor in plan.tensors if tensor.name == name)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(unit=st.sampled_from(["layer", "block", "tensor"]), patterns=st.lists(st.sampled_from(["*", "*.mlp.*", NORM])))
def test_every_tensor_of_the_base_is_planned_exactly_once(workshop, unit, patterns):
    overrides = [{"match": pattern, "extract": {"density": 0.5}} for pattern in patterns]
    plan = plan_of(workshop, conflict={"unit": unit}, overrides=overrides)
    assert sorted(tensor.name for tensor in plan.tensors) == sorted(workshop.base)
    assert all(tensor.shape == tuple(workshop.base[tensor.name].shape) for tensor in plan.tensors)
    assert {unit for tensor in plan.tensors for unit in [tensor.unit]} == set(plan.units)


def test_units_of_layers_are_the_layers_and_what_is_outside(workshop):
    plan = plan_of(workshop)
    assert set(plan.units) == {"model.embed_tokens", *LAYERS, "model.norm"}
    assert plan.layers == LAYERS
    assert plan.candidates == LAYERS


def test_units_of_blocks_are_attention_mlp_and_norms(workshop):
    plan = plan_of(workshop, conflict={"unit": "block"})
    parts = ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm")
    assert set(plan.candidates) == {f"{layer}.{part}" for layer in LAYERS for part in parts}
    assert set(plan.units) - set(plan.candidates) == {"model.embed_tokens", "model.norm"}


def test_units_of_tensors_are_the_tensors(workshop):
    plan = plan_of(workshop, conflict={"unit": "tensor"})
    assert set(plan.units) == set(workshop.base)
    assert set(plan.candidates) == {name for name in workshop.base if ".layers." in name}


@pytest.mark.parametrize("unit", ["layer", "block", "tensor"])
def test_all_units_may_be_candidates(workshop, unit):
    plan = plan_of(workshop, conflict={"unit": unit}, assign={"rule": "mean_std", "candidates": "all"})
    assert plan.candidates == plan.units


@pytest.mark.parametrize(
    ("patterns", "listed"),
    [
        (["model.layers.1"], {LAYERS[1]}),
        (["*.layers.*"], set(LAYERS)),
        (["model.norm", "*.0"], {"model.norm", LAYERS[0]}),
    ],
)
def test_listed_units_may_be_globs_and_lie_outside_the_layers(workshop, patterns, listed):
    assert set(plan_of(workshop, assign={"rule": "listed", "units": patterns}).listed) == listed


def test_more_than_ten_layers_are_in_the_order_of_their_numbers(workshop):
    tensors = {f"model.layers.{n}.mlp.up_proj.weight": torch.zeros(2, 2) for n in range(12)}
    for seed, name in enumerate(("base", "a", "b")):
        write_checkpoint(workshop.folder / name, fine_tune(tensors, seed), {"num_hidden_layers": 12})
    assert plan_of(workshop).layers == tuple(f"model.layers.{n}" for n in range(12))


def test_the_later_of_two_overrides_wins(workshop):
    first = {"match": "*.self_attn.*", "average": {"method": "ties"}, "extract": {"density": 0.5, "values": "int8"}}
    second = {"match": "*q_proj*", "average": {"method": "slerp"}, "extract": {"density": 0.25}}
    plan = plan_of(workshop, overrides=[first, second])
    chosen = {name: tensor_of(plan, name) for name in (Q0, Q0.replace("q_proj", "k_proj"), MLP0)}
    assert [t.average.method.name for t in chosen.values()] == ["slerp", "ties", "linear"]
    assert [t.extract.density for t in chosen.values()] == [0.25, 0.5, 0.05]
    assert [t.extract.values for t in chosen.values()] == ["int8", "int8", "sign"]


def test_an_override_of_one_kind_leaves_the_other_alone(workshop):
    overrides = [{"match": "*", "extract": {"density": 0.5}}, {"match": "*", "average": {"method": "ties"}}]
    planned = tensor_of(plan_of(workshop, overrides=overrides), Q0)
    assert (planned.average.method.name, planned.extract.density) == ("ties", 0.5)


@pytest.mark.parametrize(
    ("extract", "rescale"),
    [
        ({"density": 0.5}, 0.5**-0.4),
        ({"density": 0.5, "select": "magnitude"}, 0.5**-0.4),
        ({"density": 1.0}, 1.0),
        ({"density": 0.5, "rescale": False}, 1.0),
        ({"density": 0.5, "select": "random"}, 2.0),
        ({"density": 0.5, "select": "random", "rescale": False}, 1.0),
        ({"density": 0.5, "select": "magnitude", "rescale": True}, 2.0),
        ({"density": 0.5, "rescale": 2.5}, 2.5),
    ],
)
def test_rescaling_goes_with_random_selection_unless_told(workshop, extract, rescale):
    assert tensor_of(plan_of(workshop, extract=extract), Q0).extract.rescale == rescale
    overridden = plan_of(workshop, overrides=[{"match": "*", "extract": extract}])
    assert tensor_of(overridden, Q0).extract.rescale == rescale


@pytest.mark.parametrize(
    ("asked", "planned"), [("base", "BF16"), ("bfloat16", "BF16"), ("float16", "F16"), ("float32", "F32")]
)
def test_output_dtypes_are_those_asked_for_and_integers_keep_theirs(workshop, asked, planned):
    for source in ("base", "a", "b"):
        tensors = workshop.experts.get(source, workshop.base) | {"model.ids": torch.arange(3)}
        write_checkpoint(workshop.folder / source, tensors)
    plan = plan_of(workshop, output={"dtype": asked})
    assert {tensor.dtype for tensor in plan.tensors if tensor.name != "model.ids"} == {planned}
    ids = tensor_of(plan, "model.ids")
    assert (ids.dtype, ids.average) == ("I64", None)


def test_presets_and_defaults_are_resolved(workshop):
    params = tensor_of(
        plan_of(workshop, average={"method": "ties", "preset": "mergekit", "lambda": 2}), Q0
    ).average.params
    assert dict(params) == {
        "density": 1.0, "lambda": 2.0, "merge": "mean", "trim": "tensor", "keep": "exact", "zero_sign": "positive",
        "rescale": "none",
    }  # fmt: skip


def test_a_plan_without_oddities_has_no_notices_and_no_differences(workshop):
    plan = plan_of(workshop)
    assert (plan.notices, plan.differences) == ((), ())


@pytest.mark.parametrize("named", ["base", "./base", "org/base", "", None])
def test_an_adapter_of_this_base_gives_no_notice(workshop, named):
    write_adapter(workshop.folder / "lora", 3, base_model_name_or_path=named)
    assert plan_of(workshop, experts=[{"name": "l", "model": "./lora"}], assign={"rule": "all"}).notices == ()


def test_notices_tell_of_the_base_among_the_experts_and_of_ignored_weights(workshop):
    experts = [{"name": "a", "model": "./base"}, {"name": "b", "model": "./b", "weight": 2}]
    assert plan_of(workshop, experts=experts, average={"method": "slerp"}).notices == (
        "expert a is the base itself",
        "expert weights are ignored by slerp",
    )


def differing(workshop, tokenizer):
    folder = workshop.folder / "b"
    edit_json(folder / "config.json", rope_theta=5.0, eos_token_id=7)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 7, "do_sample": False}))
    (folder / "chat_template.jinja").write_text("{{ b }}")
    found = {d.setting: d for d in plan_of(workshop, tokenizer=tokenizer).differences}
    return {name: (d.winner, d.value, dict(d.others)) for name, d in found.items()}


def test_the_base_wins_where_sources_differ(workshop):
    found = differing(workshop, "base")
    assert found["eos_token_id"] == ("base", 2, {"b": 7})
    assert found["rope_theta"] == ("base", "(absent)", {"b": 5.0})
    assert found["generation_config.eos_token_id"] == ("base", 2, {"b": 7})
    assert found["chat_template"][0] == "base"
    assert list(found["chat_template"][2]) == ["b"]
    assert set(found) == {"eos_token_id", "rope_theta", "generation_config.eos_token_id", "chat_template"}


def test_an_expert_wins_for_tokens_and_template_but_not_for_rope(workshop):
    found = differing(workshop, "expert:b")
    assert found["eos_token_id"] == ("b", 7, {"base": 2, "a": 2})
    assert found["generation_config.eos_token_id"] == ("b", 7, {"base": 2, "a": 2})
    assert found["rope_theta"] == ("base", "(absent)", {"b": 5.0})
    assert found["chat_template"][0] == "b"


def test_what_the_plan_says_of_the_winner_is_what_the_bundle_gets(workshop):
    found = differing(workshop, "expert:b")
    out = workshop.merge("out", tokenizer="expert:b")
    config = json.loads((out / "config.json").read_text())
    assert config["eos_token_id"] == found["eos_token_id"][1]
    assert "rope_theta" not in config
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == 7


def test_a_tokenizer_of_another_expert_is_a_difference(workshop):
    (workshop.folder / "a" / "tokenizer.json").write_text("{}")
    found = plan_of(workshop).differences
    assert [(d.setting, d.winner, list(d.others)) for d in found] == [("tokenizer", "base", ["a"])]


@pytest.fixture
def larger(workshop):
    """Sources with tensors of some thousand entries, where headers weigh little."""
    generator = torch.Generator().manual_seed(0)
    names = [f"model.layers.{n}.mlp.{part}_proj.weight" for n in range(3) for part in ("up", "down")]
    base = {name: torch.randn(128, 300, generator=generator).bfloat16() for name in names}
    for seed, name in enumerate(("base", "a", "b")):
        write_checkpoint(workshop.folder / name, fine_tune(base, seed) if seed else base, CONFIG)
    return workshop


@pytest.mark.parametrize(
    ("dtype", "values"), [("base", "bf16"), ("float32", "fp32"), ("base", "int8"), ("base", "sign")]
)
@pytest.mark.parametrize("density", [0.05, 0.5])
def test_planned_sizes_come_true(larger, dtype, values, density):
    for name in ("base", "a", "b"):
        # A bundle that routes must be a whole model.
        rest = {key: torch.ones(4, dtype=torch.bfloat16) for key in shapes()}
        file = larger.folder / name / "model.safetensors"
        edit_tensors(file, lambda tensors, rest=rest: tensors.update(rest | dict(tensors)))
    fields = {"assign": {"rule": "all"}, "extract": {"density": density, "values": values}, "output": {"dtype": dtype}}
    report = describe_plan(plan_of(larger, **fields), None, Settings(workers=1))
    out = larger.merge("out", **fields)
    dense = sum(tensor.nbytes for tensor in load_file(out / "model.safetensors").values())
    sparse = sum(file.stat().st_size for file in (out / "experts").iterdir())
    low, high = report.sparse_bytes
    assert (report.dense_bytes, low) == (dense, high)
    assert sparse / low == pytest.approx(1, rel=0.2)


@pytest.mark.parametrize(
    ("assign", "low", "high"),
    [
        ({"rule": "none"}, 0, 0),
        ({"rule": "all"}, 3, 3),
        ({"rule": "top_k", "k": 1}, 1, 1),
        ({"rule": "mean_std"}, 0, 3),
    ],
)
def test_sparse_sizes_are_bounded_by_what_the_rule_can_route(larger, assign, low, high):
    layer = describe_plan(plan_of(larger, assign={"rule": "all"}), None, Settings()).sparse_bytes[0] / 3
    found = describe_plan(plan_of(larger, assign=assign), None, Settings()).sparse_bytes
    assert found == pytest.approx((low * layer, high * layer), abs=1)


def test_a_plan_counts_what_each_stage_reads(larger):
    report = describe_plan(plan_of(larger, assign={"rule": "all"}), None, Settings())
    once = 3 * 6 * 128 * 300 * 2
    # Digests are taken of what passes by.
    assert report.read_bytes["digest sources"] == 0
    assert report.read_bytes["average"] == once
    assert report.read_bytes["measure conflict"] == 2 * once
    assert describe_plan(plan_of(larger, assign={"rule": "none"}), None, Settings()).read_bytes["measure conflict"] == 0


def test_more_memory_is_never_planned_than_is_given(larger):
    for memory in (600 << 20, 1 << 30, 4 << 30):
        report = describe_plan(plan_of(larger), None, Settings(memory=memory, workers=64))
        assert report.peak_memory <= memory
        assert 1 <= report.workers <= 64


@pytest.mark.parametrize(
    ("assign", "has_embedding"),
    [
        ({"rule": "all"}, True),
        ({"rule": "all", "candidates": "layers"}, False),
        ({"rule": "mean_std"}, False),
        ({"rule": "mean_std", "candidates": "all"}, True),
    ],
)
def test_the_embedding_is_a_candidate_of_rule_all_or_on_request(workshop, assign, has_embedding):
    plan = plan_of(workshop, assign=assign)
    assert ("model.embed_tokens" in plan.candidates) is has_embedding
    assert "model.layers.0" in plan.candidates
