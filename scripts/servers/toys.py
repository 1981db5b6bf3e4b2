"""Random little models of each format, one for each thing that a server may read in another way than transformers.

They are written by transformers' own classes, so that they say nothing of mediator: what a server makes of them is what
it makes of any model of that format. Weights are large enough that whatever is misread shows.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCABULARY = 49152
WIDTH = 128
HEADS = 4
COMMON: Mapping[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": 3,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 50000.0},
}
# Qwen2-MoE: all experts for each token, which is what llama.cpp reads rightly, so that other things show.
FORMATS: Mapping[str, Mapping[str, Any]] = {
    "mixtral": {
        "intermediate_size": 96,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "head_dim": WIDTH // HEADS,
    },
    "qwen2_moe": {
        "intermediate_size": 192,
        "moe_intermediate_size": 96,
        "shared_expert_intermediate_size": 64,
        "num_experts": 4,
        "num_experts_per_tok": 4,
        "norm_topk_prob": True,
        "mlp_only_layers": [],
    },
    "qwen3_moe": {
        "intermediate_size": 192,
        "moe_intermediate_size": 96,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "mlp_only_layers": [],
        "head_dim": WIDTH // HEADS,
    },
    "granitemoeshared": {
        "intermediate_size": 64,
        "shared_intermediate_size": 192,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "attention_multiplier": (WIDTH // HEADS) ** -0.5,
    },
    "qwen3": {"intermediate_size": 96, "head_dim": WIDTH // HEADS},
    "ernie4_5_moe": {
        "intermediate_size": 192,
        "moe_intermediate_size": 64,
        "moe_num_shared_experts": 3,
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_layer_start_index": 0,
    },
}
COUNT = {
    "mixtral": "num_local_experts",
    "granitemoeshared": "num_local_experts",
    "ernie4_5_moe": "moe_num_experts",
    "qwen2_moe": "num_experts",
    "qwen3_moe": "num_experts",
}
TOP_K = {"ernie4_5_moe": "moe_k"}
SCALINGS: Mapping[str, Mapping[str, Any]] = {
    "linear": {"rope_type": "linear", "rope_theta": 50000.0, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 50000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 50000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 128,
    },
}
Edit = Callable[[PreTrainedModel], None]


def _as_it_is(_: PreTrainedModel) -> None:
    pass


@dataclass(frozen=True)
class Toy:
    """One model to make: a format, what is particular about it, and how it is got."""

    format: str
    feature: str
    config: Mapping[str, Any] = field(default_factory=dict)
    edit: Edit = _as_it_is
    packed: bool = False

    @property
    def name(self) -> str:
        """A name for files."""
        return f"{self.format}-{self.feature}".replace(" ", "-").replace(",", "")


def toys() -> list[Toy]:
    """List all models, by format."""
    return [toy for kind in COUNT for toy in (*_for_all(kind), *_OWN[kind])]


def make(toy: Toy, folder: Path, words: torch.Tensor) -> None:
    """Write a model; of its vocabulary it knows only `words`, so that no other token is ever answered."""
    torch.manual_seed(0)
    model = _unfilled(toy.format, toy.config)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            _fill(name, tensor, model.config.tie_word_embeddings)
        for table in {model.get_input_embeddings().weight, model.get_output_embeddings().weight}:
            known = table[words].clone()
            table.zero_()
            table[words] = known
        toy.edit(model)
    model.save_pretrained(folder, save_original_format=not toy.packed)


def make_blind(toy: Toy, model: PreTrainedModel) -> PreTrainedModel | None:
    """Read the tensors of a model by the plain config of its format; None where they do not fit."""
    if not toy.config:
        return None
    blind = _unfilled(toy.format, {})
    try:
        blind.load_state_dict(model.state_dict())
    except RuntimeError:
        return None
    return blind.eval()


def _unfilled(kind: str, more: Mapping[str, Any]) -> PreTrainedModel:
    config = AutoConfig.for_model(kind, **{**COMMON, **FORMATS[kind], **more})
    config.dtype = "float32"
    return AutoModelForCausalLM.from_config(config).float()


def _fill(name: str, tensor: torch.Tensor, tied: bool) -> None:
    if "norm" in name:
        tensor.normal_(1, 0.1)
    elif tensor.ndim == 1 or "correction_bias" in name:
        tensor.normal_(0, 0.0 if "correction_bias" in name else 0.1)
    else:
        # A tied head with large embeddings would answer each token with itself, whatever the layers do.
        embedding = 2.0 if tied else tensor.shape[-1] ** 0.5
        wide = {"embed_tokens": embedding, "lm_head": 2.0, "gate.weight": 2.0, "router": 2.0}
        tensor.normal_(
            0, next((scale for part, scale in wide.items() if part in name), 1.0) * max(1, tensor.shape[-1]) ** -0.5
        )


def _for_all(kind: str) -> list[Toy]:
    count, top_k = COUNT[kind], TOP_K.get(kind, "num_experts_per_tok")
    shared = {"moe_num_shared_experts": 24} if kind == "ernie4_5_moe" else {}
    return [
        Toy(kind, "top-2 of 4 experts", {top_k: 2}),
        Toy(kind, "top-1 of 4", {top_k: 1}),
        Toy(kind, "all of 4", {top_k: 4}),
        *([Toy(kind, "top-2 of 3", {count: 3})] if kind == "mixtral" else []),
        Toy(kind, "one expert", {count: 1, top_k: 1}),
        Toy(kind, "experts 8 wide", {_width(kind): 8} | shared),
        Toy(kind, "tied head", {"tie_word_embeddings": True}),
        Toy(kind, "head_dim other than width / heads", {"head_dim": 64} | _multiplier(kind, 64)),
        *(Toy(kind, f"rope scaling {name}", {"rope_parameters": dict(SCALINGS[name])}) for name in _scalings(kind)),
        Toy(kind, "packed tensor names", packed=True),
    ]


def _scalings(kind: str) -> list[str]:
    # The code is shared by all formats in each server: Mixtral, which once was different, is asked for all.
    return list(SCALINGS) if kind == "mixtral" else ["llama3", "yarn"]


def _width(kind: str) -> str:
    return "intermediate_size" if kind in ("mixtral", "granitemoeshared") else "moe_intermediate_size"


def _multiplier(kind: str, head_dim: int) -> dict[str, float]:
    return {"attention_multiplier": head_dim**-0.5} if kind == "granitemoeshared" else {}


def _zero(part: str) -> Edit:
    def edit(model: PreTrainedModel) -> None:
        found = [tensor for name, tensor in model.named_parameters() if part in name]
        if not found:
            raise SystemExit(f"No tensor has {part} in its name.")
        for tensor in found:
            tensor.zero_()

    return edit


_DENSE = [
    Toy("qwen2_moe", "norm_topk_prob false, top-2", {"norm_topk_prob": False, "num_experts_per_tok": 2}),
    Toy("qwen2_moe", "mlp_only_layers", {"mlp_only_layers": [1]}),
    Toy("qwen2_moe", "decoder_sparse_step 2", {"decoder_sparse_step": 2}),
]
_WINDOW = {"use_sliding_window": True, "sliding_window": 16}
_OWN: Mapping[str, list[Toy]] = {
    "mixtral": [Toy("mixtral", "sliding window", {"sliding_window": 16})],
    "qwen2_moe": [
        *_DENSE,
        Toy("qwen2_moe", "sliding window", _WINDOW | {"layer_types": ["sliding_attention"] * 3}),
        Toy("qwen2_moe", "qkv_bias false", {"qkv_bias": False}),
        Toy("qwen2_moe", "shared expert 0 wide", {"shared_expert_intermediate_size": 0}),
        Toy("qwen2_moe", "shared down_proj 0", edit=_zero("shared_expert.down_proj")),
        Toy("qwen2_moe", "shared gate 0", edit=_zero("shared_expert_gate")),
    ],
    "qwen3_moe": [
        *(Toy("qwen3_moe", toy.feature, toy.config) for toy in _DENSE),
        Toy("qwen3_moe", "sliding window", _WINDOW),
        Toy("qwen3_moe", "attention_bias", {"attention_bias": True}),
    ],
    "granitemoeshared": [
        Toy("granitemoeshared", "shared expert 0 wide", {"shared_intermediate_size": 0}),
        Toy("granitemoeshared", "attention_bias", {"attention_bias": True}),
    ],
    "ernie4_5_moe": [
        Toy("ernie4_5_moe", "first layer dense", {"moe_layer_start_index": 1}),
        Toy("ernie4_5_moe", "last layer dense", {"moe_layer_end_index": 1}),
        Toy("ernie4_5_moe", "no shared expert", {"moe_num_shared_experts": 0}),
        Toy("ernie4_5_moe", "use_bias", {"use_bias": True}),
    ],
}
