"""Tiny Mixture-of-Experts folders of every format, written by transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

SIZES: dict[str, Any] = {
    "vocab_size": 20,
    "hidden_size": 16,
    "intermediate_size": 12,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
}
MIXTRAL = {"model_type": "mixtral", "num_local_experts": 3}
QWEN2 = {
    "model_type": "qwen2_moe",
    "num_experts": 3,
    "moe_intermediate_size": 12,
    "shared_expert_intermediate_size": 8,
    "norm_topk_prob": True,
    "mlp_only_layers": [1],
}
QWEN3 = {
    "model_type": "qwen3_moe",
    "num_experts": 3,
    "moe_intermediate_size": 12,
    "head_dim": 8,
    "norm_topk_prob": True,
    "mlp_only_layers": [0],
}
GRANITE = {
    "model_type": "granitemoeshared",
    "num_local_experts": 3,
    "shared_intermediate_size": 8,
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.4,
    "attention_multiplier": 0.5,
    "logits_scaling": 2.0,
}
KINDS: dict[str, dict[str, Any]] = {
    "mixtral": MIXTRAL,
    "qwen2_moe": QWEN2,
    "qwen3_moe": QWEN3,
    "granitemoeshared": GRANITE,
}


def tiny_moe(folder: Path, kind: str, seed: int = 0, **fields: Any) -> Path:
    """Write a tiny model of a format, or a dense one such as `llama`, with well-scaled random weights."""
    facts = {**SIZES, **KINDS.get(kind, {"model_type": kind}), **fields}
    config = AutoConfig.for_model(facts.pop("model_type"), **facts)
    model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        size = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.1
        parameter.data = torch.randn(parameter.shape, generator=generator) * size + (parameter.ndim == 1)
    model.save_pretrained(folder)
    return folder
