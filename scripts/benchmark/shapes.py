"""The true shapes of the Qwen2.5 models, and of a tiny one for trials. Standard library only."""

from __future__ import annotations

import math
from dataclasses import dataclass

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Size:
    """The numbers that fix all shapes of a Qwen2 model with tied embeddings."""

    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    positions: int
    end: int

    def config(self) -> dict[str, object]:
        """Write what config.json of such a model says."""
        return {
            "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu",
            "hidden_size": self.hidden, "intermediate_size": self.inner, "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads, "num_key_value_heads": self.kv_heads, "vocab_size": self.vocab,
            "max_position_embeddings": self.positions, "rope_theta": 1000000.0, "rms_norm_eps": 1e-6,
            "sliding_window": self.positions, "max_window_layers": self.layers, "use_sliding_window": False,
            "attention_dropout": 0.0, "initializer_range": 0.02, "tie_word_embeddings": True, "use_cache": True,
            "bos_token_id": self.end, "eos_token_id": self.end, "torch_dtype": "bfloat16",
        }  # fmt: skip

    def shapes(self) -> Shapes:
        """Names and shapes of all tensors."""
        found: Shapes = {"model.embed_tokens.weight": (self.vocab, self.hidden)}
        for n in range(self.layers):
            found |= {f"model.layers.{n}.{name}": shape for name, shape in self.layer().items()}
        return found | {"model.norm.weight": (self.hidden,)}

    def layer(self) -> Shapes:
        """Names and shapes within one decoder layer."""
        kv = self.hidden // self.heads * self.kv_heads
        found: Shapes = {}
        for name, rows in (("q", self.hidden), ("k", kv), ("v", kv)):
            found[f"self_attn.{name}_proj.weight"] = (rows, self.hidden)
            found[f"self_attn.{name}_proj.bias"] = (rows,)
        found["self_attn.o_proj.weight"] = (self.hidden, self.hidden)
        found |= {f"mlp.{name}_proj.weight": (self.inner, self.hidden) for name in ("gate", "up")}
        found["mlp.down_proj.weight"] = (self.hidden, self.inner)
        return found | {f"{name}_layernorm.weight": (self.hidden,) for name in ("input", "post_attention")}

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return sum(math.prod(shape) for shape in self.shapes().values())

    @property
    def n_bytes(self) -> int:
        """Bytes of all tensors in bfloat16."""
        return 2 * self.parameters


SIZES = {
    "tiny": Size(64, 128, 5, 4, 2, 512, 128, 1),
    "0.5B": Size(896, 4864, 24, 14, 2, 151936, 32768, 151643),
    "1.5B": Size(1536, 8960, 28, 12, 2, 151936, 131072, 151643),
    "3B": Size(2048, 11008, 36, 16, 2, 151936, 32768, 151643),
}
