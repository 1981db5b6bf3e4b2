"""The bad-input table, sources: base, experts and adapters that cannot be merged; nothing is written."""

import json
import shutil

import pytest
import torch
from conftest import CONFIG, edit_json, edit_tensors, put, write_checkpoint
from safetensors.torch import save_file

DAMAGED = "the file is damaged or was not downloaded completely"
FLOAT = "use the float checkpoint that it was made from"
NORM, EMBED, Q0 = "model.norm.weight", "model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"


def weights(workshop, source="b"):
    return workshop.folder / source / "model.safetensors"


def edit_header(file, change):
    """Rewrite the header of a safetensors file, its data untouched."""
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


def edit_expert(workshop, change, source="b"):
    edit_tensors(weights(workshop, source), change)


def write_index(folder, **places):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def swap_for(folder, name):
    """Leave a model folder with one file of another format instead of its weights."""
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(b"weights")


def longer_header(workshop):
    raw = bytearray(weights(workshop).read_bytes())
    raw[:8] = (10_000_000).to_bytes(8, "little")
    weights(workshop).write_bytes(raw)


def cut(workshop):
    weights(workshop).write_bytes(weights(workshop).read_bytes()[:-100])


def overlap(header):
    header[NORM]["data_offsets"] = [offset - 2 for offset in header[NORM]["data_offsets"]]


def quantised(method):
    return lambda w: edit_json(w.folder / "b" / "config.json", quantization_config={"quant_method": method})


BROKEN = {
    "missing folder": (
        lambda w: shutil.rmtree(w.folder / "b"),
        "{b}",
        "no such folder",
        "relative paths in a recipe start at the recipe's folder",
    ),
    "file instead of folder": (
        lambda w: (shutil.rmtree(w.folder / "b"), (w.folder / "b").write_text("")),
        "{b}",
        "is not a folder",
        "name the folder that holds config.json",
    ),
    "empty folder": (
        lambda w: (shutil.rmtree(w.folder / "b"), (w.folder / "b").mkdir()),
        "{b}",
        "is an empty folder",
        "was the download or training finished?",
    ),
    "config without weights": (
        lambda w: weights(w).unlink(),
        "{b}",
        "holds no safetensors weights",
        "a checkpoint has model.safetensors",
    ),
    "broken config": (
        lambda w: (w.folder / "b" / "config.json").write_text("{"),
        "{b}/config.json",
        "broken JSON",
        DAMAGED,
    ),
    "config that is a list": (
        lambda w: (w.folder / "b" / "config.json").write_text("[]"),
        "{b}/config.json",
        "is not a JSON object",
        DAMAGED,
    ),
    "not a safetensors file": (
        lambda w: weights(w).write_bytes(b"PK\3\4" + bytes(200)),
        "{file}",
        "is not a safetensors file",
        "convert the checkpoint",
    ),
    "empty file": (lambda w: weights(w).write_bytes(b""), "{file}", "is not a safetensors file", "convert"),
    "truncated file": (cut, "{file}", "truncated: ", DAMAGED),
    "header beyond the file": (longer_header, "{file}", "header of 10000000 bytes is longer than the file", DAMAGED),
    "overlapping offsets": (
        lambda w: edit_header(weights(w), overlap),
        "{file}: model.norm.weight",
        "overlaps the tensor before it",
        DAMAGED,
    ),
    "bytes that do not fit the shape": (
        lambda w: edit_header(weights(w), lambda h: h[NORM].update(shape=[9])),
        "{file}: model.norm.weight",
        "do not fit shape [9] of BF16",
        DAMAGED,
    ),
    "unknown dtype": (
        lambda w: edit_header(weights(w), lambda h: h[NORM].update(dtype="F4")),
        "{file}: model.norm.weight",
        "unknown dtype F4",
        DAMAGED,
    ),
    "dtype that is a list": (
        lambda w: edit_header(weights(w), lambda h: h[NORM].update(dtype=["F4"])),
        "{file}: model.norm.weight",
        "unknown dtype",
        DAMAGED,
    ),
    "shape mismatch": (
        lambda w: edit_expert(w, put(NORM, torch.zeros(9))),
        "{b} model.norm.weight",
        "shape [9], the base has [8]",
        "fine-tunes of the base",
    ),
    "other vocabulary": (
        lambda w: edit_expert(w, put(EMBED, torch.zeros(24, 8))),
        "{b}/tokenizer.json",
        "its rows must be matched by token: it has 24 rows of tokens, the base has 20",
        "save the tokenizer as tokenizer.json",
    ),
    "other architecture": (
        lambda w: edit_json(w.folder / "b" / "config.json", model_type="qwen2"),
        "{b}",
        "other architecture: model_type qwen2, the base is llama",
        "fine-tunes of the base",
    ),
    "missing tensor": (
        lambda w: edit_expert(w, lambda t: t.pop(NORM)),
        "{b}",
        "lacks tensor model.norm.weight",
        "is the checkpoint complete?",
    ),
    "extra tensor": (
        lambda w: edit_expert(w, put("model.extra.weight", torch.zeros(2))),
        "{b}",
        "has tensor model.extra.weight, which the base lacks",
        "fine-tunes of the base",
    ),
    "untied head": (
        lambda w: (
            edit_expert(w, put("lm_head.weight", torch.zeros(20, 8))),
            edit_json(w.folder / "b" / "config.json", tie_word_embeddings=False),
        ),
        "{b}",
        "has tensor lm_head.weight, which the base lacks",
        "is the head untied?",
    ),
    "integer weight": (
        lambda w: edit_expert(w, put(Q0, torch.zeros(8, 8, dtype=torch.int8))),
        "{file}: model.layers.0.self_attn.q_proj.weight",
        "dtype I8: the checkpoint is quantised",
        FLOAT,
    ),
    "fp8 tensor": (
        lambda w: edit_expert(w, put(NORM, torch.zeros(8).to(torch.float8_e4m3fn))),
        "{file}: model.norm.weight",
        "dtype F8_E4M3: the checkpoint is quantised",
        FLOAT,
    ),
    "packed tensor": (
        lambda w: edit_expert(w, put("model.layers.0.mlp.up_proj.qweight", torch.zeros(2, dtype=torch.int32))),
        "{file}: model.layers.0.mlp.up_proj.qweight",
        "the checkpoint is quantised",
        FLOAT,
    ),
    **{
        f"{method} config": (
            quantised(method),
            "{b}/config.json quantization_config",
            f"is quantised ({kind}); only float checkpoints",
            hint,
        )
        for method, kind, hint in (
            ("gptq", "GPTQ", FLOAT),
            ("awq", "AWQ", FLOAT),
            ("bitsandbytes", "bitsandbytes", "dequantise it first: pip install bitsandbytes accelerate && python -c "),
            ("fp8", "FP8", "FineGrainedFP8Config(dequantize=True)"),
        )
    },
    "broken GGUF in the folder": (
        lambda w: swap_for(w.folder / "b", "m.gguf"),
        "{b}/m.gguf",
        "cannot read the GGUF: ",
        "the file is damaged",
    ),
    "broken .bin in the folder": (
        lambda w: swap_for(w.folder / "b", "pytorch_model.bin"),
        "{b}/pytorch_model.bin",
        "is not a file of torch.save",
        DAMAGED,
    ),
    "TensorFlow in the folder": (
        lambda w: swap_for(w.folder / "b", "tf_model.h5"),
        "{b}",
        "holds TensorFlow weights alone",
        "from_tf=True",
    ),
    "index that leaves its folder": (
        lambda w: write_index(w.folder / "b", **{NORM: "../a/model.safetensors"}),
        "{b}/model.safetensors.index.json",
        "unsafe file name '../a/model.safetensors'",
        "may not leave their folder",
    ),
    "index with dots": (
        lambda w: write_index(w.folder / "b", **{NORM: ".."}),
        "{b}/model.safetensors.index.json",
        "unsafe file name '..'",
        "may not leave their folder",
    ),
    "index with a number": (
        lambda w: write_index(w.folder / "b", **{NORM: 7}),
        "{b}/model.safetensors.index.json",
        "unsafe file name 7",
        "may not leave their folder",
    ),
    "index without a map": (
        lambda w: write_index(w.folder / "b"),
        "{b}/model.safetensors.index.json",
        "has no weight_map",
        DAMAGED,
    ),
    "index to a missing shard": (
        lambda w: write_index(w.folder / "b", **{NORM: "model-2.safetensors"}),
        "{b}/model-2.safetensors",
        "cannot read: no such file",
        "check the path",
    ),
    "index to a tensor that is not there": (
        lambda w: write_index(w.folder / "b", **{"model.gone.weight": "model.safetensors"}),
        "{file}: model.gone.weight",
        "tensor is in the index but not in this file",
        DAMAGED,
    ),
}


@pytest.mark.parametrize("row", BROKEN.values(), ids=BROKEN)
def test_a_broken_expert_is_refused(workshop, refused, row):
    break_it, place, message, hint = row
    workshop.recipe()
    break_it(workshop)
    place = place.format(b=workshop.folder / "b", file=weights(workshop))
    refused(f"recipe.yaml:3 experts[1].model: {place}", message, hint)


def test_a_folder_that_is_missing_may_be_a_hub_id(workshop, refused, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    workshop.recipe(experts=[{"name": "a", "model": "experts/maths"}, {"name": "b", "model": "./b"}])
    message = "no such folder, and revision 'main' is not in the Hub's cache"
    refused("recipe.yaml:3 experts[0].model: experts/maths", message, "run once without --offline")


def test_a_broken_gguf_file_is_refused(workshop, refused):
    (workshop.folder / "m.gguf").write_bytes(b"GGUF")
    workshop.recipe(base="m.gguf")
    refused(f"recipe.yaml:2 base: {workshop.folder}/m.gguf", "cannot read the GGUF: ", "the file is damaged")


def test_a_path_that_no_disk_can_hold_is_refused(workshop, refused):
    workshop.recipe(base="x" * 300)
    refused(f"recipe.yaml:2 base: {workshop.folder}/{'x' * 300}", "cannot read: file name too long", "check the path")


def test_a_base_that_lacks_a_layer_is_refused(workshop, refused):
    workshop.recipe()
    edit_expert(workshop, lambda t: [t.pop(name) for name in list(t) if ".layers.1." in name], "base")
    refused(f"recipe.yaml:2 base: {workshop.folder}/base", "layer model.layers.1 is missing", "complete?")


def test_a_base_with_fewer_layers_than_its_config_is_refused(workshop, refused):
    workshop.recipe()
    edit_json(workshop.folder / "base" / "config.json", num_hidden_layers=4)
    message = "the config counts 4 layers, the tensors have 3 (model.layers)"
    refused(f"recipe.yaml:2 base: {workshop.folder}/base", message, "complete?")


def test_a_broken_base_does_not_hide_that_an_expert_is_missing(workshop, mediator):
    workshop.recipe(experts=[{"name": "a", "model": "./a"}, {"name": "b", "model": "./gone"}])
    (workshop.folder / "base" / "config.json").write_text("{")
    run = mediator("validate", "recipe.yaml")
    assert "error: recipe.yaml:2 base: " in run.err
    assert f"error: recipe.yaml:3 experts[1].model: {workshop.folder}/gone: no such folder" in run.err


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("rule", ["none", "all"])
def test_a_delta_that_is_not_finite_is_named(workshop, refused, bad, rule):
    workshop.recipe(assign={"rule": rule}, average={"method": "task_arithmetic"})
    edit_expert(workshop, lambda t: t[Q0].view(-1).__setitem__(19, bad))
    refused(Q0, f"expert b is {bad} at flat index 19", "the fine-tune diverged")


def test_a_nan_is_named_where_weights_are_averaged_too(workshop, refused):
    workshop.recipe(assign={"rule": "none"}, average={"method": "linear"})
    edit_expert(workshop, lambda t: t[Q0].view(-1).__setitem__(19, float("nan")))
    refused(Q0, "expert b is nan at flat index 19", "the fine-tune diverged")


def test_a_nan_in_the_base_is_named_as_the_bases(workshop, refused):
    workshop.recipe()
    edit_expert(workshop, lambda t: t[Q0].view(-1).__setitem__(19, float("nan")), "base")
    refused(Q0, "base is nan at flat index 19", "the fine-tune diverged")


def test_a_value_that_the_output_dtype_cannot_hold_is_named(workshop, refused):
    workshop.recipe(assign={"rule": "none"}, output={"dtype": "float16"})
    edit_expert(workshop, lambda t: t[Q0].view(-1).__setitem__(19, 1e6))
    refused(Q0, "the merged tensor in F16 is inf at flat index 19", "")


def test_a_shard_that_is_cut_off_is_named(workshop, refused):
    tensors = dict(workshop.experts["b"])
    norm = tensors.pop(NORM)
    folder = write_checkpoint(workshop.folder / "b", tensors, CONFIG)
    (folder / "model.safetensors").rename(folder / "one.safetensors")
    save_file({NORM: norm}, folder / "two.safetensors")
    write_index(folder, **dict.fromkeys(tensors, "one.safetensors"), **{NORM: "two.safetensors"})
    (folder / "two.safetensors").write_bytes((folder / "two.safetensors").read_bytes()[:-1])
    workshop.recipe()
    refused(f"recipe.yaml:3 experts[1].model: {folder}/two.safetensors", "truncated: ", DAMAGED)
