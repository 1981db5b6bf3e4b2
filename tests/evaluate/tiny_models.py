"""Tiny models and a word tokenizer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

N_WORDS = 60
TEMPLATE = (
    "{% for m in messages %}<user> {{ m['content'] }} <end>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
SPECIAL = ["<pad>", "<bos>", "<end>", "<user>", "<assistant>", "<unk>"]


def make_tokenizer(*, chat: bool = True, bos: bool = False) -> PreTrainedTokenizerFast:
    """Make a tokenizer of the words w0, w1, …"""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = [*SPECIAL, *(f"w{n}" for n in range(N_WORDS))]
    inner = Tokenizer(models.WordLevel({word: at for at, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        inner.post_processor = processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<bos>", eos_token="<end>", unk_token="<unk>",
        additional_special_tokens=["<user>", "<assistant>"],
    )  # fmt: skip
    if chat:
        tokenizer.chat_template = TEMPLATE
    return tokenizer


def make_model(kind: str = "llama", seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Make a random tiny model of a type, in float32, with weights large enough for clear favourites."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {
        "vocab_size": N_WORDS + len(SPECIAL), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.3,
    }  # fmt: skip
    config = AutoConfig.for_model(kind, **sizes | changes)
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
