"""GGUF as a source: dequantised once, with the values of the gguf package under the names of transformers."""

import json
import sys
from pathlib import Path

import numpy
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFWriter, quants
from safetensors.torch import load_file

from mediator_cli.checkpoint.gguf_file import find_gguf, gguf_notice, open_gguf
from mediator_cli.checkpoint.source import find_location, open_checkpoint, side_files
from mediator_cli.errors import CheckpointError, OutputError

HIDDEN, INNER, HEADS, KV_HEADS, VOCAB, LAYERS = 64, 96, 4, 2, 32, 2
SAME_PLACE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "blk.0.attn_v.weight": "model.layers.0.self_attn.v_proj.weight",
    "blk.1.attn_output.weight": "model.layers.1.self_attn.o_proj.weight",
    "blk.0.ffn_gate.weight": "model.layers.0.mlp.gate_proj.weight",
    "blk.1.ffn_up.weight": "model.layers.1.mlp.up_proj.weight",
    "blk.1.ffn_down.weight": "model.layers.1.mlp.down_proj.weight",
    "blk.0.attn_norm.weight": "model.layers.0.input_layernorm.weight",
    "blk.1.ffn_norm.weight": "model.layers.1.post_attention_layernorm.weight",
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MEDIATOR_CACHE", str(tmp_path / "cache" / "mediator"))
    return tmp_path / "cache" / "mediator" / "dequantised"


def gguf_shapes():
    shapes = {"token_embd.weight": (VOCAB, HIDDEN), "output_norm.weight": (HIDDEN,)}
    for n in range(LAYERS):
        rows = {"attn_q": HIDDEN, "attn_k": HIDDEN // 2, "attn_v": HIDDEN // 2, "attn_output": HIDDEN}
        shapes |= {f"blk.{n}.{name}.weight": (size, HIDDEN) for name, size in rows.items()}
        shapes |= {f"blk.{n}.ffn_gate.weight": (INNER, HIDDEN), f"blk.{n}.ffn_up.weight": (INNER, HIDDEN)}
        shapes |= {f"blk.{n}.ffn_down.weight": (HIDDEN, INNER)}
        shapes |= {f"blk.{n}.{name}.weight": (HIDDEN,) for name in ("attn_norm", "ffn_norm")}
    return shapes


def write_gguf(file, kind=Kind.Q8_0, seed=0, leave_out=(), arch="llama", tokenizer=False):
    """Write a tiny Llama; give its values as the gguf package dequantises them."""
    file.parent.mkdir(parents=True, exist_ok=True)
    writer = GGUFWriter(file, arch)
    writer.add_name("tiny")
    writer.add_block_count(LAYERS)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCAB)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    if tokenizer:
        words = ["<s>", "</s>", "a", "b", "ab", *(f"w{n}" for n in range(VOCAB - 5))]
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(words)
        writer.add_token_types([3, 3, *[1] * (VOCAB - 2)])
        writer.add_token_merges(["a b"])
        writer.add_bos_token_id(0)
        writer.add_eos_token_id(1)
        writer.add_chat_template("{{ messages }}")
    draw = numpy.random.default_rng(seed)
    values = {}
    for name, shape in gguf_shapes().items():
        stored = Kind.F32 if len(shape) == 1 else kind
        data = quants.quantize(draw.standard_normal(shape).astype(numpy.float32), stored)
        values[name] = quants.dequantize(data, stored)
        if name not in leave_out:
            writer.add_tensor(name, data, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


def unturned(rows, heads):
    """Undo how llama.cpp turns the rows of each attention head, by hand: halves instead of pairs."""
    size = len(rows) // heads
    order = [head * size + row for head in range(heads) for row in (*range(0, size, 2), *range(1, size, 2))]
    return rows[order]


def wanted(values):
    found = {theirs: values[ours] for ours, theirs in SAME_PLACE.items()}
    for n in range(LAYERS):
        for name, heads in (("q", HEADS), ("k", KV_HEADS)):
            rows = unturned(values[f"blk.{n}.attn_{name}.weight"], heads)
            found[f"model.layers.{n}.self_attn.{name}_proj.weight"] = rows
    return found


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        (Kind.F32, torch.float32),
        (Kind.F16, torch.float16),
        (Kind.BF16, torch.bfloat16),
        (Kind.Q8_0, torch.float16),
        (Kind.Q4_0, torch.float16),
    ],
)
def test_values_are_those_of_the_gguf_package(tmp_path, kind, dtype):
    values = wanted(write_gguf(tmp_path / "m.gguf", kind))
    checkpoint = open_checkpoint(find_location("m.gguf", tmp_path / "m.gguf").folder)
    found = load_file(checkpoint.path / "model.safetensors")
    assert set(found) == set(checkpoint.tensors)
    assert len(found) == len(gguf_shapes())
    for name, value in values.items():
        assert torch.equal(found[name], torch.from_numpy(value.copy()).to(dtype)), name
    assert checkpoint.is_tied


def test_values_are_those_that_transformers_loads_by_itself(tmp_path):
    from transformers import AutoModelForCausalLM, GgufConfig

    write_gguf(tmp_path / "m.gguf")
    found = load_file(open_gguf(tmp_path / "m.gguf") / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="m.gguf", quantization_config=GgufConfig(dequantize=True), dtype=torch.float16
    )
    theirs = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    assert set(found) == set(theirs)
    assert all(torch.equal(found[name], theirs[name]) for name in found)


def test_the_config_is_that_of_the_file(tmp_path):
    write_gguf(tmp_path / "m.gguf")
    config = json.loads((open_gguf(tmp_path / "m.gguf") / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert (config["num_hidden_layers"], config["num_key_value_heads"], config["vocab_size"]) == (2, 2, 32)
    assert config["rms_norm_eps"] == 1e-5
    assert "quantization_config" not in config


def test_tokenizer_and_chat_template_come_along(tmp_path):
    write_gguf(tmp_path / "m.gguf", tokenizer=True)
    folder = open_gguf(tmp_path / "m.gguf")
    names = [file.name for file in side_files(folder)]
    assert names == ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json"]
    assert (folder / "chat_template.jinja").read_text() == "{{ messages }}"
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    assert (vocabulary["ab"], vocabulary["w0"]) == (4, 5)
    assert "tokenizer could not" not in gguf_notice(folder)


def test_a_file_without_a_tokenizer_is_noticed(tmp_path):
    write_gguf(tmp_path / "m.gguf")
    assert "its tokenizer could not be rebuilt" in gguf_notice(open_gguf(tmp_path / "m.gguf"))


def test_the_notice_says_what_was_lost(tmp_path, workshop):
    write_gguf(tmp_path / "q.gguf")
    write_gguf(tmp_path / "f.gguf", Kind.F32)
    lossy, plain = gguf_notice(open_gguf(tmp_path / "q.gguf")), gguf_notice(open_gguf(tmp_path / "f.gguf"))
    assert f"{tmp_path / 'q.gguf'} is a GGUF (15 Q8_0, 5 F32 tensors), dequantised into " in lossy
    assert "quantisation is lossy" in lossy
    assert "(20 F32 tensors)" in plain
    assert "nothing lost" in plain
    assert gguf_notice(workshop.folder / "base") is None


def test_a_file_is_dequantised_once_and_again_when_it_changes(tmp_path, cache):
    write_gguf(tmp_path / "m.gguf")
    first = open_gguf(tmp_path / "m.gguf")
    (first / "mark").touch()
    assert open_gguf(tmp_path / "m.gguf") == first
    assert (first / "mark").exists()
    write_gguf(tmp_path / "m.gguf", seed=1)
    assert open_gguf(tmp_path / "m.gguf") != first
    assert sorted(cache.iterdir()) == sorted({first, open_gguf(tmp_path / "m.gguf")})


def test_a_folder_of_one_gguf_is_that_file(tmp_path):
    write_gguf(tmp_path / "m" / "m.gguf")
    assert find_location("m", tmp_path / "m").folder == open_gguf(tmp_path / "m" / "m.gguf")


def test_other_weights_win_over_a_gguf(tmp_path):
    write_gguf(tmp_path / "m.gguf")
    (tmp_path / "model.safetensors").touch()
    assert find_gguf(tmp_path) is None
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    assert find_gguf(tmp_path) is None


def test_of_several_files_one_must_be_named(tmp_path):
    for name in ("m.Q4_0.gguf", "m.Q8_0.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(CheckpointError, match=r"holds several GGUF files: m\.Q4_0\.gguf, m\.Q8_0\.gguf") as caught:
        find_location("m", tmp_path)
    assert caught.value.problems[0].hint == f"name one of them, e.g. {tmp_path / 'm.Q4_0.gguf'}"


def test_the_parts_of_a_split_file_must_be_joined(tmp_path):
    for n in (1, 2):
        (tmp_path / f"m-0000{n}-of-00002.gguf").touch()
    with pytest.raises(CheckpointError, match="is one part of a split GGUF") as caught:
        find_location("m", tmp_path)
    assert "llama-gguf-split --merge m-00001-of-00002.gguf" in caught.value.problems[0].hint


def damaged(tmp_path, change):
    write_gguf(tmp_path / "m.gguf")
    data = (tmp_path / "m.gguf").read_bytes()
    (tmp_path / "m.gguf").write_bytes(change(data))


@pytest.mark.parametrize(
    "change",
    [
        lambda data: b"",
        lambda data: b"GGUF",
        lambda data: b"GGML" + data[4:],
        lambda data: data[:100],
        lambda data: data[: len(data) // 2],
        lambda data: data[:-1],
        lambda data: data[:4] + b"\x09" + data[5:],
        lambda data: data[:8] + b"\xff" * 8 + data[16:],
        lambda data: data[:40] + bytes(200) + data[240:],
    ],
)
def test_a_damaged_file_is_refused_and_leaves_nothing(tmp_path, cache, change):
    damaged(tmp_path, change)
    with pytest.raises(CheckpointError, match=r"m\.gguf: cannot read the GGUF: .") as caught:
        open_gguf(tmp_path / "m.gguf")
    assert "fetch it again" in caught.value.problems[0].hint
    assert not cache.exists() or not list(cache.iterdir())


def test_a_file_that_lacks_a_tensor_is_refused(tmp_path, cache):
    write_gguf(tmp_path / "m.gguf", leave_out={"blk.1.ffn_up.weight"})
    with pytest.raises(CheckpointError, match=r"1 tensors of the model.*e\.g\. model\.layers\.1\.mlp\.up_proj\.weight"):
        open_gguf(tmp_path / "m.gguf")
    assert not list(cache.iterdir())


def test_an_architecture_that_transformers_cannot_read_is_refused(tmp_path):
    write_gguf(tmp_path / "m.gguf", arch="whatever")
    with pytest.raises(CheckpointError, match="architecture whatever is not supported"):
        open_gguf(tmp_path / "m.gguf")


def test_a_missing_package_gets_the_command_that_installs_it(tmp_path, monkeypatch):
    write_gguf(tmp_path / "m.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(CheckpointError, match="reading GGUF needs the package gguf") as caught:
        open_gguf(tmp_path / "m.gguf")
    assert caught.value.problems[0].hint == "pip install 'mediator-merge[gguf]'"


def test_a_cache_that_cannot_be_written_is_an_error(tmp_path, monkeypatch):
    write_gguf(tmp_path / "m.gguf")
    (tmp_path / "file").touch()
    monkeypatch.setenv("MEDIATOR_CACHE", str(tmp_path / "file"))
    with pytest.raises(OutputError, match="cannot write: not a directory") as caught:
        open_gguf(tmp_path / "m.gguf")
    assert "MEDIATOR_CACHE" in caught.value.problems[0].hint


def test_a_gguf_expert_merges_with_its_notice(tmp_path, mediator):
    write_gguf(tmp_path / "base.gguf", Kind.F32, seed=1)
    tuned = write_gguf(tmp_path / "a.gguf", Kind.Q8_0, seed=2)
    recipe = tmp_path / "recipe.yaml"
    experts = json.dumps([{"name": "a", "model": "./a.gguf"}])
    recipe.write_text(
        f"version: 1\nbase: ./base.gguf\nexperts: {experts}\nassign: {{rule: none}}\naverage: {{method: linear}}\n"
    )
    run = mediator("merge", str(recipe), "--output", str(tmp_path / "out"))
    assert run.code == 0, run.err
    merged = load_file(tmp_path / "out" / "model.safetensors")
    name = "model.layers.0.mlp.gate_proj.weight"
    assert torch.equal(merged[name], torch.from_numpy(tuned["blk.0.ffn_gate.weight"].copy()).half().float())
    plan = mediator("plan", str(recipe), "--no-calibrate")
    assert "quantisation is lossy" in " ".join(plan.err.split())


def test_however_the_path_is_written_the_file_is_dequantised_once(tmp_path, monkeypatch):
    write_gguf(tmp_path / "m.gguf")
    first = open_gguf(tmp_path / "m.gguf")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link.gguf").symlink_to("m.gguf")
    assert open_gguf(Path("m.gguf")) == open_gguf(Path("link.gguf")) == first
