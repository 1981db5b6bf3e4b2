"""Tiny checkpoints, adapters and recipes, made in the test's own folder."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mediator_cli import Settings, load_recipe, make_plan, merge

HIDDEN, INNER, VOCAB, LAYERS = 8, 12, 20, 3
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": VOCAB,
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def shapes(layers: int = LAYERS) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a tiny tied Llama."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN)}
    for n in range(layers):
        layer = f"model.layers.{n}"
        found |= {
            f"{layer}.self_attn.q_proj.weight": (HIDDEN, HIDDEN),
            f"{layer}.self_attn.k_proj.weight": (HIDDEN // 2, HIDDEN),
            f"{layer}.self_attn.v_proj.weight": (HIDDEN // 2, HIDDEN),
            f"{layer}.self_attn.o_proj.weight": (HIDDEN, HIDDEN),
            f"{layer}.mlp.gate_proj.weight": (INNER, HIDDEN),
            f"{layer}.mlp.up_proj.weight": (INNER, HIDDEN),
            f"{layer}.mlp.down_proj.weight": (HIDDEN, INNER),
            f"{layer}.input_layernorm.weight": (HIDDEN,),
            f"{layer}.post_attention_layernorm.weight": (HIDDEN,),
        }
    return found | {"model.norm.weight": (HIDDEN,)}


def random_tensors(seed: int, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """Draw the tensors of a tiny base."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes().items()}


def fine_tune(base: dict[str, torch.Tensor], seed: int, size: float = 0.05) -> dict[str, torch.Tensor]:
    """Move every entry of a base a little."""
    generator = torch.Generator().manual_seed(seed)
    return {k: (v.float() + size * torch.randn(v.shape, generator=generator)).to(v.dtype) for k, v in base.items()}


def write_checkpoint(folder: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any] | None = None) -> Path:
    """Write a model folder as transformers would."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG | (config or {})))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, "do_sample": False}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0"}))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


def write_adapter(folder: Path, seed: int, rank: int = 2, **config: Any) -> Path:
    """Write a LoRA adapter on the linear weights of all layers as PEFT would."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for name, shape in shapes().items():
        if name.endswith("_proj.weight"):
            module = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{module}.lora_A.weight"] = 0.2 * torch.randn(rank, shape[1], generator=generator)
            tensors[f"{module}.lora_B.weight"] = 0.2 * torch.randn(shape[0], rank, generator=generator)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    facts = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "base_model_name_or_path": "base", "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(facts | config))
    return folder


@dataclass(frozen=True)
class Workshop:
    """A folder with a base, two full experts, one adapter, and recipes over them."""

    folder: Path
    base: dict[str, torch.Tensor]
    experts: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)

    def recipe(self, name: str = "recipe.yaml", **fields: Any) -> Path:
        """Write a recipe over base and experts a, b; fields win."""
        experts = [{"name": n, "model": f"./{n}"} for n in ("a", "b")]
        data = {"version": 1, "base": "./base", "experts": experts, **fields}
        path = self.folder / name
        path.write_text("\n".join(f"{key}: {json.dumps(value)}" for key, value in data.items()) + "\n")
        return path

    def merge(self, name: str = "out", /, settings: Settings | None = None, **fields: Any) -> Path:
        """Write a recipe, plan it and merge."""
        plan = make_plan(load_recipe(self.recipe(f"{name}.yaml", **fields)))
        return merge(plan, self.folder / name, settings=settings or Settings(workers=2))


@pytest.fixture
def workshop(tmp_path: Path) -> Workshop:
    """Make base, experts a and b, and adapter `lora`."""
    base = random_tensors(0)
    made = Workshop(tmp_path, base, {"a": fine_tune(base, 1), "b": fine_tune(base, 2)})
    write_checkpoint(tmp_path / "base", base)
    for name, tensors in made.experts.items():
        write_checkpoint(tmp_path / name, tensors)
    write_adapter(tmp_path / "lora", 3)
    return made
