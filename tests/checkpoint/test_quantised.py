"""Quantised checkpoints are refused by name, with a command that undoes that very kind where there is one."""

import inspect
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import edit_json, random_tensors, write_checkpoint
from safetensors.torch import load_file, save_file

from mediator_cli.checkpoint.quantised import refuse_quantised_config
from mediator_cli.checkpoint.source import open_checkpoint
from mediator_cli.errors import CheckpointError


def refuse(config, model="org/model", architecture="LlamaForCausalLM"):
    facts = {"architectures": [architecture], "quantization_config": config}
    with pytest.raises(CheckpointError) as caught:
        refuse_quantised_config(model, "config.json", facts)
    return caught.value.problems[0]


def command_of(problem):
    """The words of the hint's command, without the installation of packages."""
    command = problem.hint.removeprefix("dequantise it first: ").split("; where the tensors")[0]
    return shlex.split(command.split(" && ")[-1])


@pytest.mark.parametrize(
    ("config", "kind", "packages", "step"),
    [
        ({"quant_method": "fp8"}, "FP8", "accelerate", "transformers.FineGrainedFP8Config(dequantize=True)"),
        ({"quant_method": "mxfp8"}, "MXFP8", "accelerate", "transformers.FineGrainedFP8Config(dequantize=True)"),
        ({"quant_method": "mxfp4"}, "MXFP4", None, "transformers.Mxfp4Config(dequantize=True)"),
        (
            {"quant_method": "compressed-tensors", "format": "pack-quantized"},
            "compressed-tensors",
            "compressed-tensors accelerate",
            "transformers.CompressedTensorsConfig(dequantize=True)",
        ),
        (
            {"quant_method": "bitsandbytes", "load_in_4bit": True},
            "bitsandbytes, 4 bit",
            "bitsandbytes accelerate",
            "model = model.dequantize()",
        ),
        ({"load_in_8bit": True}, "bitsandbytes, 8 bit", "bitsandbytes accelerate", "model = model.dequantize()"),
    ],
)
def test_a_kind_that_transformers_dequantises_gets_its_command(config, kind, packages, step):
    problem = refuse(config)
    assert problem.message == f"is quantised ({kind}); only float checkpoints can be merged"
    assert (f"pip install {packages} && " in problem.hint) is bool(packages)
    python, flag, program, source, target = command_of(problem)
    assert (python, flag, source, target) == ("python", "-c", "org/model", "org/model-float")
    assert step in program
    compile(program, "command", "exec")


@pytest.mark.parametrize(
    ("method", "kind"),
    [
        ("gptq", "GPTQ"),
        ("awq", "AWQ"),
        ("aqlm", "AQLM"),
        ("auto-round", "AutoRound"),
        ("bitnet", "BitNet"),
        ("eetq", "EETQ"),
        ("fbgemm_fp8", "FBGEMM FP8"),
        ("hqq", "HQQ"),
        ("modelopt", "ModelOpt"),
        ("nvfp4", "NVFP4"),
        ("quanto", "Quanto"),
        ("quark", "Quark"),
        ("torchao", "torchao"),
        ("vptq", "VPTQ"),
        ("next-year", "next-year"),
        (None, "unknown"),
    ],
)
def test_a_kind_that_transformers_cannot_dequantise_gets_no_command(method, kind):
    problem = refuse({"quant_method": method} if method else "some text")
    assert f"is quantised ({kind})" in problem.message
    assert "use the float checkpoint that it was made from" in problem.hint
    assert "python -c" not in problem.hint


def test_the_commands_name_what_transformers_has():
    import transformers
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING as KINDS

    able = {method for method, kind in KINDS.items() if "dequantize" in inspect.signature(kind).parameters}
    assert able == {"fp8", "mxfp8", "mxfp4", "metal", "compressed-tensors", "gguf"}
    for method in able - {"gguf"}:
        program = command_of(refuse({"quant_method": method}))[2]
        assert f"quantization_config=transformers.{KINDS[method].__name__}(dequantize=True)" in program
        assert hasattr(transformers, KINDS[method].__name__)


def test_the_command_fits_model_and_folder(tmp_path):
    folder = tmp_path / "it's; a $(model)"
    folder.mkdir()
    problem = refuse({"quant_method": "fp8"}, str(folder), "Qwen2_5_VLForConditionalGeneration")
    _, _, program, source, target = command_of(problem)
    assert (source, target) == (str(folder), f"{folder}-float")
    assert "AutoModelForImageTextToText" in program
    assert "AutoTokenizer" not in program
    (folder / "tokenizer_config.json").touch()
    assert "AutoTokenizer" in command_of(refuse({"quant_method": "fp8"}, str(folder)))[2]


def test_no_text_of_the_config_gets_into_the_command():
    problem = refuse({"quant_method": "fp8'; touch x; '"}, architecture="x'); import os; os.system('")
    assert "touch x" not in problem.hint
    assert "os.system" not in refuse({"quant_method": "fp8"}, architecture="x'); os.system('").hint


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_the_config_of_a_folder_is_refused(tmp_path, key):
    folder = write_checkpoint(tmp_path / "m", random_tensors(0), {key: {"quant_method": "compressed-tensors"}})
    with pytest.raises(CheckpointError, match=r"config\.json quantization_config: is quantised \(compressed-tensors\)"):
        open_checkpoint(folder)


@pytest.mark.parametrize("empty", [None, {}])
def test_an_empty_setting_is_no_quantisation(tmp_path, empty):
    folder = write_checkpoint(tmp_path / "m", random_tensors(0), {"quantization_config": empty})
    assert len(open_checkpoint(folder).tensors) == len(random_tensors(0))


@pytest.mark.parametrize(
    ("name", "dtype", "kind"),
    [
        ("model.layers.0.self_attn.q_proj.qweight", torch.int32, "GPTQ or AWQ"),
        ("model.layers.0.self_attn.q_proj.g_idx", torch.int32, "GPTQ or AWQ"),
        ("model.layers.0.self_attn.q_proj.weight_packed", torch.int32, "compressed-tensors"),
        ("model.layers.0.self_attn.q_proj.weight_scale_inv", torch.float32, "FP8"),
        ("model.layers.0.self_attn.q_proj.weight", torch.float8_e4m3fn, "FP8"),
        ("model.layers.0.self_attn.other", torch.float8_e5m2, "FP8"),
        ("model.layers.0.self_attn.q_proj.weight_scale_2", torch.float32, "ModelOpt"),
        ("model.layers.0.self_attn.q_proj.SCB", torch.float32, "bitsandbytes, 8 bit"),
        ("model.layers.0.self_attn.q_proj.weight.absmax", torch.uint8, "bitsandbytes, 4 bit"),
        ("model.layers.0.mlp.q_proj.weight.quant_state.bitsandbytes__nf4", torch.uint8, "bitsandbytes, 4 bit"),
        ("model.layers.0.mlp.experts.gate_up_proj_blocks", torch.uint8, "MXFP4"),
        ("model.layers.0.self_attn.q_proj.codebooks", torch.float16, "AQLM"),
        ("model.layers.0.self_attn.q_proj.W_q", torch.uint8, "HQQ"),
        ("model.layers.0.self_attn.q_proj.weight._data", torch.int8, "Quanto or torchao"),
        ("model.layers.0.self_attn.q_proj.weight", torch.uint8, "unknown kind"),
    ],
)
def test_packed_tensors_without_a_config_are_named(tmp_path, name, dtype, kind):
    made = {"model.norm.weight": torch.ones(2), name: torch.zeros(2, dtype=dtype)}
    with pytest.raises(CheckpointError, match="the checkpoint is quantised") as caught:
        open_checkpoint(write_checkpoint(tmp_path / "m", made))
    assert caught.value.problems[0].place.endswith(f"model.safetensors: {name}")
    assert f"({kind})" in caught.value.problems[0].message


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("model.layers.0.attn.bias", torch.bool),
        ("model.position_ids", torch.int64),
        ("model.layers.0.layer_scale", torch.float32),
        ("model.layers.0.residual_scales", torch.float32),
        ("model.blocks", torch.float32),
        ("model.relative_attention_bias.weight", torch.float16),
    ],
)
def test_ordinary_tensors_are_no_quantisation(tmp_path, name, dtype):
    made = random_tensors(0) | {name: torch.zeros(2, dtype=dtype)}
    assert name in open_checkpoint(write_checkpoint(tmp_path / "m", made)).tensors


def run_command(problem):
    words = [sys.executable, *command_of(problem)[1:]]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return Path(words[-1])


def opened(folder):
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    return caught.value.problems[0]


@pytest.mark.slow
def test_the_command_for_fp8_gives_a_checkpoint_with_the_right_values(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path / "fp 8"
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=20,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    wanted = load_file(folder / "model.safetensors")
    stored = dict(wanted)
    for name in [name for name in wanted if name.endswith("_proj.weight")]:
        rows, columns = wanted[name].shape
        scale = torch.rand(-(-rows // 128), -(-columns // 128)) + 0.5
        stored[name] = (10 * wanted[name].float()).to(torch.float8_e4m3fn)
        stored[f"{name}_scale_inv"] = scale
        spread = scale.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]
        wanted[name] = (stored[name].float() * spread).bfloat16()
    save_file(stored, folder / "model.safetensors")
    block = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    edit_json(folder / "config.json", quantization_config=block)
    check(run_command(opened(folder)), wanted)


@pytest.mark.slow
def test_the_command_for_mxfp4_gives_a_checkpoint_with_the_right_values(tmp_path):
    from transformers import GptOssConfig, GptOssForCausalLM

    folder = tmp_path / "mxfp4"
    config = GptOssConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        vocab_size=20,
        num_local_experts=2,
        num_experts_per_tok=1,
        layer_types=["full_attention"],
        dtype="bfloat16",
    )
    GptOssForCausalLM(config).bfloat16().save_pretrained(folder)
    wanted = load_file(folder / "model.safetensors")
    stored = dict(wanted)
    levels = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    levels = torch.cat([levels, -levels])
    for name in [name for name in wanted if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inner, outer = stored.pop(name).shape
        blocks = torch.randint(0, 256, (experts, outer, inner // 32, 16), dtype=torch.uint8)
        scales = torch.randint(120, 130, (experts, outer, inner // 32), dtype=torch.uint8)
        stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        pairs = torch.stack([levels[(blocks & 15).long()], levels[(blocks >> 4).long()]], -1).flatten(-2)
        values = (pairs * torch.exp2(scales.float() - 127)[..., None]).flatten(-2)
        wanted[name] = values.transpose(1, 2).contiguous().bfloat16()
    save_file(stored, folder / "model.safetensors")
    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    edit_json(folder / "config.json", quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": kept})
    check(run_command(opened(folder)), wanted)


def check(folder, wanted):
    checkpoint = open_checkpoint(folder)
    found = load_file(folder / "model.safetensors")
    assert set(checkpoint.tensors) == set(found) == set(wanted)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
