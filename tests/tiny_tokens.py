"""Tiny tokenizers, made in the test: bytes with merges, and whole words that fit the tiny Llama's vocabulary."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n"
    "{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
INST = (
    "{% if messages[0].role == 'system' %}{% set start = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set start = '' %}{% endif %}{% for m in messages %}"
    "{% if m.role == 'user' %}<s>[INST] {{ (start if loop.first else '') + m.content | trim }} [/INST]"
    "{% else %} {{ m.content }} </s>{% endif %}{% endfor %}"
)
ALPACA = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system message') }}{% endif %}"
    "{% if m.role == 'user' %}### Instruction:\n{{ m.content }}\n\n{% else %}### Response:\n{{ m.content }}\n\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}### Response:\n{% endif %}"
)
TEMPLATES = {"chatml": CHATML, "inst": INST, "alpaca": ALPACA}
SPECIALS = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]

SUMS, FILMS = ("two", "three", "plus", "apples", "left"), ("film", "actor", "plot", "dull", "fine")
WORDS = ["[UNK]", "<s>", "</s>", "<|user|>", "<|bot|>", *SUMS, *FILMS, "and", "the", "is", "a", "of"]
WORD_TEMPLATE = (
    "{% for m in messages %}<|{{ 'user' if m.role == 'user' else 'bot' }}|> {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}<|bot|>{% endif %}"
)


def byte_tokenizer(template: str | None = None) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer, which writes every text back as it was."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator(["how many apples are left in the box", *TEMPLATES.values()] * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>", chat_template=template,
        extra_special_tokens=SPECIALS[3:],
    )  # fmt: skip


def word_tokenizer(template: str | None = WORD_TEMPLATE) -> PreTrainedTokenizerFast:
    """Make a tokenizer of the 20 words of WORDS; all others are [UNK]."""
    inner = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="[UNK]", bos_token="<s>", eos_token="</s>", chat_template=template,
        extra_special_tokens=WORDS[3:5],
    )  # fmt: skip


def task_prompts(words: tuple[str, ...], n: int = 60) -> list[str]:
    """Make different prompts of three words of a task each, shorter ones first."""
    return [" ".join(chosen) for chosen in product(words, repeat=3)][:n]


def write_prompts(file: Path, prompts: list[str]) -> Path:
    """Write prompts as JSON lines."""
    file.write_text("".join(json.dumps({"prompt": prompt, "answer": "x"}) + "\n" for prompt in prompts))
    return file
