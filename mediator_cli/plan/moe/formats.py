"""Which models each format takes, what may stand in their layers, and what a config becomes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mediator_cli.checkpoint.moe_layout import FORMATS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mediator_cli.checkpoint.moe_layout import MoeFormat

_NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight")
_ATTENTION = tuple(f"self_attn.{name}_proj.weight" for name in "qkvo")
_BIASES = tuple(f"self_attn.{name}_proj.bias" for name in "qkv")
_QUERY_NORMS = ("self_attn.q_norm.weight", "self_attn.k_norm.weight")
OUTSIDE = ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")
"""All tensors outside the layers of the models that become a Mixture of Experts."""
SHARED_WIDTH = 8
"""Neurons of Qwen2-MoE's shared expert, which adds nothing here: servers want it, with rows of 16 bytes at least."""


@dataclass(frozen=True)
class Taken:
    """What a format takes: dense models by `model_type`, the tensors of a layer beside the feed-forward block.

    `zeros` are those that it has though the model may not: they are zero then. `windows` says whether it knows sliding
    attention as Mistral does.
    """

    models: tuple[str, ...]
    tensors: tuple[str, ...]
    zeros: tuple[str, ...] = ()
    windows: bool = False

    @property
    def known(self) -> frozenset[str]:
        """All tensors that a layer may have."""
        return frozenset((*self.tensors, *self.zeros))


TAKEN: Mapping[str, Taken] = {
    "mixtral": Taken(("llama", "mistral"), (*_NORMS, *_ATTENTION), windows=True),
    "qwen2_moe": Taken(("qwen2", "llama", "mistral"), (*_NORMS, *_ATTENTION), zeros=_BIASES),
    "qwen3_moe": Taken(("qwen3",), (*_NORMS, *_ATTENTION, *_QUERY_NORMS)),
    "granitemoeshared": Taken(("granite", "llama", "mistral"), (*_NORMS, *_ATTENTION)),
}
"""What each format takes; the first that suits is the default for a model."""
_DEFAULT = {"llama": "mixtral", "mistral": "mixtral", "qwen2": "qwen2_moe", "qwen3": "qwen3_moe",
            "granite": "granitemoeshared"}  # fmt: skip
_SOURCE_ONLY = (
    "architectures", "model_type", "auto_map", "attention_bias", "mlp_bias", "pretraining_tp", "_name_or_path",
    "transformers_version",
)  # fmt: skip
"""Fields of a dense model's config that mean nothing, or something else, in that of a Mixture of Experts."""


def formats_for(model_type: str) -> tuple[str, ...]:
    """List the formats that take a model.

    >>> formats_for("llama"), formats_for("gemma2")
    (('mixtral', 'qwen2_moe', 'granitemoeshared'), ())
    """
    return tuple(name for name, taken in TAKEN.items() if model_type in taken.models)


def default_format(model_type: str, *, some_layers: bool) -> str | None:
    """Choose the format that suits a model best; None where none takes it.

    >>> default_format("llama", some_layers=False), default_format("llama", some_layers=True)
    ('mixtral', 'qwen2_moe')
    """
    chosen = _DEFAULT.get(model_type)
    if chosen and some_layers and not FORMATS[chosen].takes_dense_layers:
        able = [name for name in formats_for(model_type) if FORMATS[name].takes_dense_layers]
        return able[0] if able else chosen
    return chosen


_DEFAULTS: Mapping[str, Any] = {
    "hidden_act": "silu", "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
    "max_position_embeddings": 2048, "vocab_size": 32000,
}  # fmt: skip
_OTHER_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "mistral": {"sliding_window": 4096, "num_key_value_heads": 8, "max_position_embeddings": 131072},
    "qwen2": {"max_position_embeddings": 32768, "vocab_size": 151936, "bos_token_id": None, "eos_token_id": None},
    "qwen3": {"max_position_embeddings": 32768, "vocab_size": 151936, "bos_token_id": None, "eos_token_id": None,
              "head_dim": 128},
}  # fmt: skip


def complete(config: Mapping[str, Any]) -> dict[str, Any]:
    """Write out what a dense model's config leaves to its model class, since the defaults of another class differ."""
    own = {**_DEFAULTS, **_OTHER_DEFAULTS.get(str(config.get("model_type")), {})}
    heads = {"num_key_value_heads": config["num_attention_heads"]} if config.get("num_attention_heads") else {}
    full = {**heads, **own, **{name: value for name, value in config.items() if value is not None or name not in heads}}
    parameters = config.get("rope_parameters")
    has_theta = "rope_theta" in config or (isinstance(parameters, dict) and "rope_theta" in parameters)
    return full if has_theta else {"rope_theta": 10000.0, **full}


def moe_config(
    dense: Mapping[str, Any], form: MoeFormat, n_experts: int, top_k: int, inner: int, dense_layers: Sequence[int]
) -> dict[str, Any]:
    """Turn a dense model's config into that of a Mixture of Experts whose experts have `inner` neurons."""
    kept = {name: value for name, value in complete(dense).items() if name not in _SOURCE_ONLY}
    config = {"architectures": [form.architecture], "model_type": form.name, **kept, form.inner: inner}
    config |= {form.n_experts: n_experts, form.top_k: top_k, "output_router_logits": False}
    if form.name in ("qwen2_moe", "qwen3_moe"):
        # Its default is false: the probabilities of the chosen experts would sum to less than one.
        config |= {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": list(dense_layers)}
    return {**config, **_own(dense, form)}


def _own(dense: Mapping[str, Any], form: MoeFormat) -> dict[str, Any]:
    """Give the fields of one format alone, which make it do what the dense model does."""
    if form.name == "qwen2_moe":
        return {"shared_expert_intermediate_size": SHARED_WIDTH, "qkv_bias": True,
                "use_sliding_window": bool(dense.get("use_sliding_window", False))}  # fmt: skip
    if form.name == "qwen3_moe":
        return {"use_sliding_window": bool(dense.get("use_sliding_window", False)), "attention_bias": False}
    if form.name == "granitemoeshared":
        head = dense.get("head_dim") or dense["hidden_size"] // dense["num_attention_heads"]
        neutral = {"embedding_multiplier": 1.0, "residual_multiplier": 1.0, "logits_scaling": 1.0,
                   "attention_multiplier": head**-0.5}  # fmt: skip
        own = {name: dense.get(name, 1.0) for name in neutral if dense.get("model_type") == "granite"}
        return {**neutral, **own, "shared_intermediate_size": dense["intermediate_size"], "attention_bias": False}
    # Without its own, rope scaling of kind yarn fails in transformers' Mixtral.
    head = dense.get("head_dim") or dense["hidden_size"] // dense["num_attention_heads"]
    is_mistral = dense.get("model_type") == "mistral"
    return {"head_dim": head, "sliding_window": complete(dense).get("sliding_window") if is_mistral else None}
