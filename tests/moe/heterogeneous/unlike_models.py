"""Tiny models that differ in architecture, width, vocabulary, spelling of tokens, ties and biases."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tiny_architectures import DECODERS
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedTokenizerFast

LETTERS = "abcdefghijkl"
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<out>{% endif %}"
SIZES = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 64, "initializer_range": 0.3,
}  # fmt: skip


def byte_level(letters: str = LETTERS, extra: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """Make a tokenizer that writes a space as Ġ: each letter with and without one."""
    words = [*letters, *(f"Ġ{letter}" for letter in letters), "Ġ", "Ċ"]
    merges = [("Ġ", letter) for letter in letters]
    inner = Tokenizer(models.BPE({word: n for n, word in enumerate(words)}, merges))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    return _finished(inner, "<end>", extra)


def pieces(letters: str = LETTERS, extra: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """Make a tokenizer that writes a space as ▁ and a line's end as <0x0A>."""
    words = ["<0x0A>", "▁", *(f"▁{letter}" for letter in reversed(letters)), *reversed(letters)]
    merges = [("▁", letter) for letter in letters]
    inner = Tokenizer(models.BPE({word: n for n, word in enumerate(words)}, merges, byte_fallback=True))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    inner.decoder = decoders.Metaspace(prepend_scheme="never")
    return _finished(inner, "</s>", extra)


def _finished(inner: Tokenizer, end: str, extra: tuple[str, ...]) -> PreTrainedTokenizerFast:
    made = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=end, pad_token=end, chat_template=TEMPLATE)
    made.add_tokens([AddedToken(text, special=True, normalized=False) for text in ("<out>", *extra)])
    return made


def write_model(folder: Path, kind: str, tokenizer: PreTrainedTokenizerFast, seed: int = 0, **changes: Any) -> Path:
    """Write a causal language model of any architecture, all of its numbers random, in float32."""
    fields = {**SIZES, **DECODERS.get(kind, {}), **changes}
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    config = AutoConfig.for_model(kind, **{"vocab_size": len(tokenizer), **fields, **ids})
    torch.manual_seed(seed)
    auto = AutoModelForMaskedLM if kind == "bert" else AutoModelForCausalLM
    model = auto.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_recipe(folder: Path, experts: dict[str, str], **fields: Any) -> Path:
    """Write a recipe over folders; `experts` are folders by name."""
    listed = [{"name": name, "model": model} for name, model in experts.items()]
    data = {"version": 1, "kind": "heterogeneous_moe", "experts": listed, **fields}
    path = folder / "recipe.yaml"
    path.write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in data.items()))
    return path
