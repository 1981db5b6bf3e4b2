"""Tiny checkpoints of many architectures, each written by transformers itself: a base and two fine-tunes of it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
)

N_TOKENS = 40
_SIZES = {
    "vocab_size": N_TOKENS, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.3,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
DECODERS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "mistral": {},
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "phi3": {},
    "gpt_neox": {},
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 4},
    "falcon": {"num_kv_heads": 2, "new_decoder_architecture": True, "ffn_hidden_size": 24},
    "olmo2": {},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": _MOE,
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "mamba": {"state_size": 4, "conv_kernel": 3, "expand": 2, "time_step_rank": 2},
    "jamba": {
        "num_experts": 2, "num_experts_per_tok": 1, "attn_layer_period": 2, "attn_layer_offset": 1,
        "expert_layer_period": 2, "expert_layer_offset": 1, "mamba_d_state": 4, "mamba_d_conv": 3, "mamba_dt_rank": 2,
    },
}  # fmt: skip
OTHERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "bert": (AutoModelForMaskedLM, {}),
    "t5": (AutoModelForSeq2SeqLM, {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_heads": 4, "num_layers": 2,
                                   "num_decoder_layers": 3, "decoder_start_token_id": 0}),
}  # fmt: skip
_CLIP = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2,
         "image_size": 8, "patch_size": 4}  # fmt: skip
_QWEN_EYES = {"depth": 3, "embed_dim": 16, "num_heads": 2, "hidden_size": 16, "mlp_ratio": 2, "patch_size": 4}
_ROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 0], "rope_theta": 10000.0}}
_IMAGE_TOKEN = {"image_token_id": 35, "image_token_index": 35}
VISION: dict[str, dict[str, Any]] = {
    "llava": {"text_config": {"model_type": "llama", **_SIZES}, "vision_config": {"model_type": "clip_vision_model",
              **_CLIP}, **_IMAGE_TOKEN},
    "qwen2_vl": {"text_config": {**_SIZES, **_ROPE}, "vision_config": _QWEN_EYES, "video_token_id": 36,
                 "vision_start_token_id": 37, "vision_end_token_id": 38, **_IMAGE_TOKEN},
    "gemma3": {"text_config": {**_SIZES, **_GEMMA}, "vision_config": _CLIP, "mm_tokens_per_image": 4, **_IMAGE_TOKEN},
    "smolvlm": {"text_config": {"model_type": "llama", **_SIZES}, "vision_config": _CLIP, "scale_factor": 2,
                **_IMAGE_TOKEN},
}  # fmt: skip
_AUTO_CLASSES = {
    **dict.fromkeys(DECODERS, AutoModelForCausalLM),
    **{name: auto for name, (auto, _) in OTHERS.items()},
    **dict.fromkeys(VISION, AutoModelForImageTextToText),
}
AUTO = {name: auto for name, auto in _AUTO_CLASSES.items() if name not in VISION}
EXPERTS = ("a", "b")


@dataclass(frozen=True)
class Family:
    """A folder with `base` and the experts `a` and `b`, and the Auto class that loads them."""

    folder: Path
    kind: str

    @property
    def auto(self) -> Any:
        """The Auto class of all members."""
        return _AUTO_CLASSES[self.kind]

    def stored(self, name: str) -> dict[str, torch.Tensor]:
        """Load the tensors of a member as they are stored."""
        return load_file(self.folder / name / "model.safetensors")

    def model(self, name: str) -> Any:
        """Load a member."""
        return self.auto.from_pretrained(self.folder / name).eval()

    def recipe(self, **fields: Any) -> Path:
        """Write a recipe over base and experts; fields win."""
        experts = [{"name": name, "model": f"./{name}"} for name in EXPERTS]
        path = self.folder / "recipe.yaml"
        path.write_text(json.dumps({"version": 1, "base": "./base", "experts": experts, **fields}))
        return path


def write_family(folder: Path, kind: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Family:
    """Write the checkpoints of a family; every parameter of the base and of each expert is random."""
    auto = _AUTO_CLASSES[kind]
    fields = VISION.get(kind) or {**_SIZES, **(OTHERS[kind][1] if kind in OTHERS else DECODERS[kind])}
    config = AutoConfig.for_model(kind, **{**fields, **changes})
    torch.manual_seed(0)
    model = auto.from_config(config, dtype=torch.float32)
    for seed, name in enumerate(("base", *EXPERTS)):
        moved = auto.from_config(config, dtype=torch.float32)
        moved.load_state_dict(model.state_dict())
        _move(moved, seed)
        moved.to(dtype).save_pretrained(folder / name)
        if name == "base":
            model = moved.float()
    return Family(folder, kind)


def _move(model: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
