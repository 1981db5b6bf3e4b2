"""Tiny Mixtures of Experts in the formats that can be compressed, and what they are compressed with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tiny_tokens import word_tokenizer

from mediator_cli.moe.compress.job import Wishes
from mediator_cli.moe.compress.run import Rows, Settings, compress, open_job

VOCAB, HIDDEN, INNER, LAYERS = 20, 16, 24, 2
_COUNT = {"mixtral": "num_local_experts"}
_INNER = {"mixtral": "intermediate_size"}


def make_mixture(folder: Path, kind: str = "mixtral", n_experts: int = 6, seed: int = 0, **changes: Any) -> Path:
    """Write a random model of a format in float32, its tokenizer beside it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {
        "vocab_size": VOCAB, "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 8, "num_experts_per_tok": 2, "initializer_range": 0.3, "bos_token_id": 1,
        "eos_token_id": 2, "pad_token_id": None, "intermediate_size": INNER,
    }  # fmt: skip
    sizes |= {_COUNT.get(kind, "num_experts"): n_experts, _INNER.get(kind, "moe_intermediate_size"): INNER}
    if kind == "qwen2_moe":
        sizes |= {"shared_expert_intermediate_size": 8}
    if kind == "qwen3_moe":
        sizes |= {"norm_topk_prob": True}
    config = AutoConfig.for_model(kind, **sizes | changes)
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


def load(folder: Path) -> Any:
    """Load a model folder with transformers alone."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """Read all tensors of a folder."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def edit(folder: Path, change: Any) -> Path:
    """Change the tensors of a folder of one weight file, given as a dict."""
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def make_rows(n: int = 12, seed: int = 0) -> Rows:
    """Draw rows of 3 to 9 tokens."""
    rng = np.random.default_rng(seed)
    return Rows(tuple(tuple(map(int, rng.integers(3, VOCAB, rng.integers(3, 10)))) for _ in range(n)), ())


def run(folder: Path, target: Path, method: str, rows: Rows | None = None, **wishes: Any) -> Any:
    """Compress a folder on the usual rows; `statistics`, `mode` and `shard_size` are settings, all else wishes."""
    statistics, mode = wishes.pop("statistics", None), wishes.pop("mode", "new")
    size = wishes.pop("shard_size", 5_000_000_000)
    settings = Settings(mode, statistics, lambda stage, done, total: None, "mediator", shard_size=size)
    opened = open_job(folder, Wishes(method, **wishes))
    return compress(opened, rows or make_rows(), target, settings)


def logits_of(folder: Path, rows: Rows) -> torch.Tensor:
    """Answer rows one by one; [tokens of all rows, vocabulary]."""
    model = load(folder)
    with torch.no_grad():
        return torch.cat([model(torch.tensor([row])).logits[0] for row in rows.prompts])
