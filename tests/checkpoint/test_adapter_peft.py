"""Every kind of LoRA adapter, as PEFT itself writes it, gives what PEFT's own merge_and_unload gives."""

import pytest
import torch
from peft_adapters import (
    assert_same,
    bert,
    convolutional,
    gpt2,
    gpt2_untied,
    gpt_oss,
    llama,
    merge,
    mixtral,
    qwen3_moe,
    read_all,
    write,
)  # fmt: skip
from safetensors.torch import load_file

# What PEFT and transformers warn of is their own business here.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::RuntimeWarning")

Q, ALL = ["q_proj"], ["q_proj", "v_proj", "down_proj"]
CONV = ["conv_layers.1.conv", "q_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
KINDS = {
    "plain": (llama, {"target_modules": ALL}),
    "all linear": (llama, {"target_modules": "all-linear"}),
    "some layers": (llama, {"target_modules": ALL, "layers_to_transform": [1], "layers_pattern": "layers"}),
    "excluded": (llama, {"target_modules": ALL, "exclude_modules": ["model.layers.0.self_attn.q_proj"]}),
    "ranks": (llama, {"target_modules": ALL, "rank_pattern": {"q_proj": 4, r"layers\.1\..*v_proj": 1}}),
    "alphas": (llama, {"target_modules": ALL, "alpha_pattern": {"q_proj": 4, "model.layers.0.self_attn.v_proj": 9}}),
    "pattern at a dot": (
        llama, {"target_modules": ALL, "alpha_pattern": {"proj": 4, "v_proj|down_proj": 5, "^q_proj": 7}},
    ),
    "both patterns": (
        llama, {"target_modules": ALL, "rank_pattern": {"q_proj": 4}, "alpha_pattern": {"proj": 3, "q_proj": 2}},
    ),
    "rsLoRA": (llama, {"target_modules": ALL, "use_rslora": True}),
    "rsLoRA, patterns": (
        llama,
        {"target_modules": ALL, "use_rslora": True, "rank_pattern": {"q_proj": 3}, "alpha_pattern": {"v_proj": 5}},
    ),
    "saved modules": (llama, {"target_modules": Q, "modules_to_save": ["lm_head", "input_layernorm", "mlp"]}),
    "saved embeddings": (llama, {"target_modules": Q, "modules_to_save": ["embed_tokens"]}),
    "embeddings": (llama, {"target_modules": ["q_proj", "embed_tokens"]}),
    "embeddings and head": (llama, {"target_modules": ["embed_tokens", "lm_head"]}),
    "lora_bias": (llama, {"target_modules": ["q_proj", "k_proj"], "lora_bias": True}),
    "bias all": (llama, {"target_modules": Q, "bias": "all"}),
    "bias lora_only": (llama, {"target_modules": Q, "bias": "lora_only"}),
    "bias twice": (llama, {"target_modules": Q, "bias": "all", "lora_bias": True, "use_rslora": True}),
    "Conv1D": (gpt2, {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "Conv1D, not said": (gpt2_untied, {"target_modules": ["attn.c_proj", "lm_head"]}),
    "Conv1D, bias": (gpt2, {"target_modules": ["c_attn"], "bias": "all", "lora_bias": True, "fan_in_fan_out": True}),
    "Conv1D, embeddings": (gpt2_untied, {"target_modules": ["c_attn", "wte"], "fan_in_fan_out": True}),
    "DoRA": (llama, {"target_modules": ALL, "use_dora": True, "rank_pattern": {"q_proj": 3}}),
    "DoRA, rsLoRA": (llama, {"target_modules": ALL, "use_dora": True, "use_rslora": True}),
    "DoRA, Conv1D": (gpt2, {"target_modules": ["c_attn", "c_proj"], "use_dora": True, "fan_in_fan_out": True}),
    "DoRA, embeddings": (llama, {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True}),
    "DoRA, convolution": (convolutional, {"target_modules": CONV, "use_dora": True, "task_type": None}),
    "convolution": (convolutional, {"target_modules": CONV, "task_type": None}),
    "tokens": (llama, {"target_modules": Q, "trainable_token_indices": [5, 1, 31]}),
    "tokens of both": (
        llama, {"target_modules": Q, "trainable_token_indices": {"embed_tokens": [1, 5], "lm_head": [3]}},
    ),
    "tokens, tied": (lambda: llama(tie_word_embeddings=True), {"target_modules": Q, "trainable_token_indices": [7, 2]}),
    "saved embeddings, tied on purpose": (
        lambda: llama(tie_word_embeddings=True),
        {"target_modules": Q, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
    "experts, Mixtral": (mixtral, {"target_modules": Q, "target_parameters": EXPERTS}),
    "experts, ranks": (
        mixtral,
        {"target_modules": [], "target_parameters": EXPERTS, "rank_pattern": {"experts.down_proj": 4},
         "alpha_pattern": {r".*\.gate_up_proj": 5}},
    ),
    "experts, one parameter": (mixtral, {"target_modules": Q, "target_parameters": ["down_proj"]}),
    "experts and gate": (
        mixtral, {"target_modules": Q, "target_parameters": [*EXPERTS, "gate.weight"], "use_rslora": True},
    ),
    "gate alone": (
        mixtral,
        {"target_modules": [], "target_parameters": ["mlp.gate.weight"], "rank_pattern": {"gate.weight": 3}},
    ),
    "experts, Qwen3-MoE": (qwen3_moe, {"target_modules": Q, "target_parameters": EXPERTS}),
    "experts, square": (
        lambda: qwen3_moe(moe_intermediate_size=16), {"target_modules": Q, "target_parameters": EXPERTS},
    ),
    "experts named as before": (qwen3_moe, {"target_modules": ["gate_proj", "up_proj", "down_proj", "q_proj"]}),
    "saved experts": (qwen3_moe, {"target_modules": Q, "modules_to_save": ["mlp"]}),
    "experts stored [in, out]": (gpt_oss, {"target_modules": Q, "target_parameters": EXPERTS}),
    "square experts stored [in, out]": (
        lambda: gpt_oss(intermediate_size=16), {"target_modules": Q, "target_parameters": EXPERTS},
    ),
    "classifier": (bert, {"target_modules": ["query", "word_embeddings"], "task_type": "SEQ_CLS"}),
    "gaussian": (llama, {"target_modules": Q, "init_lora_weights": "gaussian"}),
    "orthogonal": (llama, {"target_modules": Q, "init_lora_weights": "orthogonal"}),
    "MiCA": (llama, {"target_modules": ALL, "init_lora_weights": "mica"}),
    "VeLoRA": (llama, {"target_modules": ALL, "velora_config": {"num_groups": 4}}),
}  # fmt: skip
CUTS = (7, 16, 100)


@pytest.mark.parametrize(("model", "config"), KINDS.values(), ids=KINDS)
def test_base_plus_adapter_is_what_peft_merges(tmp_path, model, config):
    kind = write(tmp_path, model, **config)
    merged = merge(tmp_path, kind)
    found = read_all(tmp_path)
    assert_same(found, merged, 1e-5)
    base = load_file(tmp_path / "base" / "model.safetensors")
    changed = {name for name in base if not torch.equal(base[name], merged[name])}
    assert changed
    # What PEFT does not change keeps its bits, what it does change is further off than the tolerance.
    assert {name for name in base if not torch.equal(found[name], base[name])} == changed
    assert all((found[name] - base[name]).abs().max() > 1e-2 for name in changed)


SLICED = [name for name in KINDS if name.split(",")[0] in ("both patterns", "DoRA", "tokens of both", "experts")]


@pytest.mark.parametrize(
    "name", [*SLICED, "convolution", "bias twice", "embeddings and head", "experts stored [in, out]"]
)
def test_slabs_change_no_bit(tmp_path, name, monkeypatch):
    # Blocks of a few rows, so that a tensor of this size has several.
    monkeypatch.setattr("mediator_cli.checkpoint.adapter.read._NORM_ELEMENTS", 50)
    model, config = KINDS[name]
    write(tmp_path, model, **config)
    whole = read_all(tmp_path)
    for cut in CUTS:
        found = read_all(tmp_path, cut)
        assert all(torch.equal(found[key].view(torch.int32), whole[key].view(torch.int32)) for key in whole)
