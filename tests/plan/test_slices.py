"""Stacked layers: the output is what a person would stack by hand, loads, and generates; or the fault has its line."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import CONFIG, edit_json, fine_tune, random_tensors, write_checkpoint
from safetensors.torch import load_file
from tiny_architectures import write_family
from transformers import AutoModelForCausalLM

from mediator_cli import Settings, load_recipe, make_plan, merge
from mediator_cli.errors import MediatorError
from mediator_cli.plan.stacked_config import Origin, stacked_config

GOLDEN = Path(__file__).parent.parent / "golden" / "mergekit"
NONE = {"assign": {"rule": "none"}}


def stacked(workshop, slices, **fields):
    """Merge, and give the tensors by layer (None outside), the config, and the plan."""
    plan = make_plan(load_recipe(workshop.recipe(slices=slices, **NONE, **fields)))
    out = merge(plan, workshop.folder / "out", settings=Settings(workers=2))
    return by_layer(load_file(out / "model.safetensors")), json.loads((out / "config.json").read_text()), plan


def by_layer(tensors):
    found = {}
    for name, tensor in tensors.items():
        parts = name.split(".")
        at = next((n for n, part in enumerate(parts) if part.isdigit()), None)
        layer, rest = (None, name) if at is None else (int(parts[at]), ".".join(parts[at + 1 :]))
        found.setdefault(layer, {})[rest] = tensor
    return found


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_copies_are_stacked_bit_for_bit(workshop):
    slices = [{"source": "a", "layers": "0-1"}, {"source": "base", "layers": [1, 0, 1]}, {"source": "b", "layers": 2}]
    found, config, plan = stacked(workshop, slices)
    a, b, base = by_layer(workshop.experts["a"]), by_layer(workshop.experts["b"]), by_layer(workshop.base)
    expected = [a[0], a[1], base[1], base[0], base[1], b[2]]
    assert config["num_hidden_layers"] == 6 == len(plan.layers)
    assert all(same(found[number], layer) for number, layer in enumerate(expected))
    # What stands before the layers goes with the first slice, what stands behind them with the last.
    outside = {"model.embed_tokens.weight": a[None], "model.norm.weight": b[None]}
    assert all(torch.equal(found[None][name], source[name]) for name, source in outside.items())


def test_a_base_alone_is_stacked_on_itself(workshop):
    slices = [{"source": "base", "layers": "0-1"}, {"source": "base", "layers": "1-2"}]
    found, config, _ = stacked(workshop, slices, experts=[])
    base = by_layer(workshop.base)
    assert config["num_hidden_layers"] == 4
    assert all(same(found[number], base[origin]) for number, origin in enumerate((0, 1, 1, 2)))


@pytest.mark.parametrize(
    ("outside", "expected"),
    [("base", lambda x: x["base"]), ("b", lambda x: x["b"]), ("average", lambda x: (x["a"] + x["b"]) / 2)],
)
def test_tensors_outside_the_layers_come_from_where_it_is_said(workshop, outside, expected):
    found, _, _ = stacked(workshop, [{"source": "a", "layers": 0}], outside=outside, output={"dtype": "float32"})
    every = {"base": workshop.base, **workshop.experts}
    for name in ("model.embed_tokens.weight", "model.norm.weight"):
        wanted = expected({source: tensors[name].float() for source, tensors in every.items()})
        torch.testing.assert_close(found[None][name], wanted)


def test_layers_are_merged_one_by_one_with_the_settings_of_their_slice(workshop):
    slices = [
        {"sources": [{"source": "a", "layers": "0-1", "weight": 3}, {"source": "b", "layers": [2, 0]}]},
        {
            "sources": [{"source": "b", "layers": "1-2", "weight": [0, 1]}, {"source": "a", "layers": "1-2"}],
            "base": "0-1",
            "average": {"method": "task_arithmetic", "lambda": 0.5},
            "overrides": [{"match": "*.mlp.*", "average": {"lambda": 2.0}, "weights": {"a": -1}}],
        },
        {"source": "b", "layers": 0, "average": {"scale": [7, 0.5]}},
    ]
    overrides = [{"match": "*.o_proj.*", "layers": 4, "average": {"scale": 0}}]
    found, _, plan = stacked(workshop, slices, output={"dtype": "float32"}, outside="base", overrides=overrides)
    base, a, b = (
        {layer: {name: tensor.float() for name, tensor in rest.items()} for layer, rest in by_layer(tensors).items()}
        for tensors in (workshop.base, workshop.experts["a"], workshop.experts["b"])
    )
    close = {"rtol": 1e-5, "atol": 1e-6}
    for name in base[0]:
        torch.testing.assert_close(found[0][name], (3 * a[0][name] + b[2][name]) / 4, **close)
        torch.testing.assert_close(found[1][name], (3 * a[1][name] + b[0][name]) / 4, **close)
        factor, own = (2.0, -1.0) if "mlp" in name else (0.5, 1.0)
        for row, weight in ((0, 0.0), (1, 1.0)):
            origin = base[row][name]
            deltas = weight * (b[row + 1][name] - origin) + own * (a[row + 1][name] - origin)
            torch.testing.assert_close(found[2 + row][name], origin + factor * deltas, **close)
        torch.testing.assert_close(found[4][name], (0 if "o_proj" in name else 0.5) * b[0][name], **close)
    assert same(found[None], base[None])
    assert {len(tensor.weights) for tensor in plan.tensors} == {1, 2}


def test_experts_may_be_deeper_adapters_or_name_their_tensors_otherwise(workshop):
    deep = {**random_tensors(7), **{k.replace("layers.2", "layers.4"): v for k, v in random_tensors(8).items()}}
    deep |= {k.replace("layers.2", "layers.3"): v for k, v in random_tensors(9).items() if "layers.2" in k}
    deep = {k: v for k, v in deep.items() if k in random_tensors(7) or "layers.3" in k or "layers.4" in k}
    renamed = {name.removeprefix("model."): tensor for name, tensor in deep.items()}
    write_checkpoint(workshop.folder / "deep", renamed, {"num_hidden_layers": 5})
    experts = [{"name": "deep", "model": "./deep"}, {"name": "lora", "model": "./lora"}]
    slices = [{"source": "deep", "layers": "3-4"}, {"source": "lora", "layers": 1}, {"source": "base", "layers": 0}]
    found, config, _ = stacked(workshop, slices, experts=experts, output={"dtype": "float32"})
    own = by_layer(deep)
    assert config["num_hidden_layers"] == 4
    assert all(torch.equal(found[n][name], own[3 + n][name].float()) for n in (0, 1) for name in own[3])
    alone = merge(make_plan(load_recipe(workshop.recipe(experts=experts[1:], output={"dtype": "float32"}, **NONE))),
                  workshop.folder / "alone")  # fmt: skip
    assert same(found[2], by_layer(load_file(alone / "model.safetensors"))[1])


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma3_text", "gpt2", "mixtral", "lfm2", "jamba"])
def test_a_stack_loads_and_generates(kind, tmp_path):
    family = write_family(tmp_path, kind)
    slices = [{"source": "a", "layers": "0-1"}, {"source": "b", "layers": "0-1"}, {"source": "base", "layers": "0-1"}]
    plan = make_plan(load_recipe(family.recipe(slices=slices, **NONE)))
    out = merge(plan, tmp_path / "out")
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info[fault] for fault in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.config.num_hidden_layers == 6
    ids = torch.tensor([[3, 4, 5]])
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape == (1, 6)
    stored = by_layer(load_file(out / "model.safetensors"))
    wholes = [by_layer(family.stored(name)) for name in ("a", "b", "base")]
    assert all(same(stored[2 * n + row], whole[row]) for n, whole in enumerate(wholes) for row in (0, 1))


def test_the_config_says_of_each_layer_what_its_own_model_says():
    base = {
        "num_hidden_layers": 4, "layer_types": ["f", "s", "s", "f"], "mlp_only_layers": [0, 3], "max_window_layers": 2,
        "hidden_size": 4, "eos_token_id": [1, 2, 3, 4], "hybrid_override_pattern": "MM*M",
    }  # fmt: skip
    deep = {**base, "num_hidden_layers": 5, "layer_types": list("sssss"), "mlp_only_layers": [4]}
    layers = [Origin(base, 0), Origin(base, 1), Origin(deep, 4), Origin(base, 3)]
    found = stacked_config(base, [*layers, Origin(base, 2)])
    assert found.config == {
        **base, "num_hidden_layers": 5, "layer_types": ["f", "s", "s", "f", "s"], "mlp_only_layers": [0, 2, 3],
        "max_window_layers": 2, "hybrid_override_pattern": "MMMM*",
    }  # fmt: skip
    assert not found.faults
    inside = stacked_config({"text_config": base, "n": 1}, [Origin({"text_config": base}, 3)] * 2).config
    assert inside["n"] == 1
    assert inside["text_config"]["layer_types"] == ["f", "f"]
    assert inside["text_config"]["num_hidden_layers"] == 2


def test_windows_that_stacking_moves_are_named_layer_by_layer():
    base = {"num_hidden_layers": 3, "use_sliding_window": True, "max_window_layers": 2}
    found = stacked_config(base, [Origin(base, number) for number in (0, 1, 2, 1)]).config
    assert found["layer_types"] == ["full_attention", "full_attention", "sliding_attention", "full_attention"]
    quiet = {**base, "use_sliding_window": False}
    assert "layer_types" not in stacked_config(quiet, [Origin(quiet, 2)]).config


@pytest.mark.parametrize(
    ("config", "fault"),
    [
        ({"first_k_dense_replace": 1}, "layers before first_k_dense_replace come first, and here one stands at 2"),
        ({"decoder_sparse_step": 2}, "layers alternate by 2 (decoder_sparse_step), and layer 1 would stand at 0"),
        ({"model_type": "gemma2"}, "layers alternate by 2 (its architecture), and layer 1 would stand at 0"),
        ({"full_attention_interval": 4, "layer_types": ["x"] * 4}, None),
        ({"decoder_sparse_step": 1}, None),
    ],
)
def test_kinds_that_no_config_can_name_are_refused(config, fault):
    base = {"num_hidden_layers": 4, **config}
    found = stacked_config(base, [Origin(base, 1), Origin(base, 2), Origin(base, 0)])
    assert found.faults == (() if fault is None else (fault,))


A = {"source": "a", "layers": "0-1"}
FAULTS = {
    "unknown source": ({"slices": [{"source": "c", "layers": 0}]}, "slices[0].sources[0].source", "no source 'c'"),
    "out of range": (
        {"slices": [A, {"source": "b", "layers": "2-3"}]}, "slices[1].sources[0].layers", "expert b has no layer 3",
    ),
    "base out of range": (
        {"slices": [{"sources": [A], "base": "2-3"}]}, "slices[0].base", "the base has no layer 3",
    ),
    "unequal": (
        {"slices": [{"sources": [A, {"source": "b", "layers": 0}]}]}, "slices[0]", "need as many layers: a 2, b 1",
    ),
    "routed": ({"slices": [A], "assign": {"rule": "all"}}, "assign.rule", "stacked layers are merged, not routed"),
    "no layers": ({"slices": [{"source": "a", "layers": []}]}, "slices[0].sources[0].layers", "names no layer"),
    "outside of nobody": ({"slices": [A], "outside": "c"}, "outside", "no source 'c'"),
    "outside without slices": ({"outside": "a"}, "", "`outside` goes with `slices`"),
    "too few": (
        {"slices": [A, {"sources": [A], "average": {"method": "slerp"}}]},
        "slices[1].sources", "slerp merges 2 sources, here are 1",
    ),
    "unknown parameter": (
        {"slices": [{**A, "average": {"scael": 1}}]}, "slices[0].average.scael", "passthrough has no parameter",
    ),
    "an override of nothing": (
        {"slices": [{**A, "overrides": [{"match": "*.mpl.*", "average": {"scale": 0}}]}]},
        "slices[0].overrides[0].match", "'*.mpl.*' matches no tensor",
    ),
    "weights of nobody": (
        {"slices": [{"sources": [A], "overrides": [{"weights": {"c": 0}}]}]},
        "slices[0].overrides[0].weights.c", "no expert 'c'",
    ),
    "adapters": (
        {"slices": [{"sources": [A], "average": {"method": "lora_linear"}}]}, "slices", "lora_linear merges adapters",
    ),
    "aligned": ({"slices": [A], "align": {}}, "align", "here layers are stacked"),
}  # fmt: skip


@pytest.mark.parametrize("row", FAULTS.values(), ids=FAULTS)
def test_faults_are_told_with_their_line(workshop, row):
    fields, place, message = row
    path = workshop.recipe(**{**NONE, **fields})
    with pytest.raises(MediatorError) as raised:
        make_plan(load_recipe(path))
    lines = path.read_text().splitlines()
    key = place.split(".")[0].split("[")[0]
    line = next((n for n, text in enumerate(lines, 1) if key and text.startswith(f"{key}:")), 1)
    found = [p for p in raised.value.problems if p.place == f"{path}:{line} {place}".rstrip() and message in p.message]
    assert len(found) == 1, raised.value


def test_deltas_need_layers_of_the_base(workshop):
    deep = {**workshop.base, **{k.replace("layers.2", "layers.3"): v for k, v in workshop.base.items()}}
    write_checkpoint(workshop.folder / "a", fine_tune(deep, 1), {"num_hidden_layers": 4})
    sliced = {"sources": [{"source": "a", "layers": 3}], "average": {"method": "task_arithmetic"}}
    with pytest.raises(MediatorError, match="merges deltas, and the base has no layer for"):
        make_plan(load_recipe(workshop.recipe(slices=[sliced], **NONE)))
    assert make_plan(load_recipe(workshop.recipe(slices=[{**sliced, "base": 2}], **NONE)))


def test_layers_of_different_kinds_are_not_merged(tmp_path):
    family = write_family(tmp_path, "lfm2")
    mixed = [{"sources": [{"source": "a", "layers": 0}, {"source": "b", "layers": 1}]}]
    with pytest.raises(MediatorError, match="layers of different kinds are merged"):
        make_plan(load_recipe(family.recipe(slices=mixed, **NONE)))


def test_a_model_with_several_stacks_is_refused(tmp_path):
    family = write_family(tmp_path, "t5")
    with pytest.raises(MediatorError, match="it is not clear which layers are stacked"):
        make_plan(load_recipe(family.recipe(slices=[{"source": "a", "layers": 0}], **NONE)))


def test_rows_of_tokens_are_matched_before_layers_are_stacked(tmp_path):
    shutil.copytree(GOLDEN / "inputs", tmp_path, dirs_exist_ok=True)
    recipe = {
        "version": 1, "base": "./base", "experts": [{"name": "chat", "model": "./chat"}], **NONE,
        "slices": [{"source": "base", "layers": "0-1"}, {"source": "chat", "layers": "1-2"}],
        "tokenizer": "expert:chat",
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    out = merge(make_plan(load_recipe(tmp_path / "recipe.yaml")), tmp_path / "out")
    folders = (out, tmp_path / "base", tmp_path / "chat")
    found, base, chat = (load_file(folder / "model.safetensors") for folder in folders)
    embedding, head = found["model.embed_tokens.weight"], found["lm_head.weight"]
    assert torch.equal(head, chat["lm_head.weight"])
    assert torch.equal(embedding[:16], base["model.embed_tokens.weight"])
    assert torch.equal(embedding[16:], chat["model.embed_tokens.weight"][16:])
    config = json.loads((out / "config.json").read_text())
    assert (config["vocab_size"], config["num_hidden_layers"]) == (18, 4)


def test_the_command_line_plans_merges_and_verifies_a_stack(workshop, mediator):
    workshop.recipe(slices=[A, {"source": "b", "layers": "1-2"}], **NONE)
    assert mediator("validate", "recipe.yaml").code == 0
    assert mediator("plan", "recipe.yaml", "--no-calibrate").code == 0
    assert mediator("merge", "recipe.yaml", "-o", "out").code == 0
    assert mediator("verify", "out").code == 0
    assert mediator("inspect", "out").code == 0
    refused = mediator("analyze-conflicts", "recipe.yaml")
    assert refused.code == 2
    assert "stacked layers are no fine-tunes of one base" in refused.err


def test_layers_that_predict_further_tokens_move_behind_the_new_ones(workshop):
    behind = {k.replace("layers.2", "layers.3"): v.clone() for k, v in workshop.base.items() if "layers.2" in k}
    tensors = {**workshop.base, **behind}
    for name in ("base", "a", "b"):
        write_checkpoint(workshop.folder / name, tensors if name == "base" else fine_tune(tensors, 5))
        edit_json(workshop.folder / name / "config.json", num_nextn_predict_layers=1)
    found, config, _ = stacked(workshop, [A, A])
    assert config["num_hidden_layers"] == 4 > CONFIG["num_hidden_layers"]
    assert same(found[4], by_layer(tensors)[3])
