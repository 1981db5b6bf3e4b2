"""The second expert: a small GPT-NeoX with a tokenizer of its own, trained from nothing on the letters."""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING

from scripts.demo.train import rate

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from scripts.demo.tasks import Row

TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
SPECIAL = ("<|end|>", "<|user|>", "<|assistant|>", "<|system|>")
SHAPE = {
    "hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 6, "intermediate_size": 768,
    "max_position_embeddings": 512, "tie_word_embeddings": False, "attention_bias": True,
}  # fmt: skip
STEPS, BATCH, PEAK = 500, 48, 2e-3


def make_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerBase:
    """Train a byte-level BPE on the texts of the task."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=alphabet, special_tokens=list(SPECIAL), show_progress=False
    )
    inner.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<|end|>", pad_token="<|end|>", chat_template=TEMPLATE
    )


def train_letters(rows: Sequence[Row], folder: Path, seed: int, report: Callable[[int, int, float], None]) -> None:
    """Train the expert and write it; reports step, steps and loss."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    tokenizer = make_tokenizer([text for row in rows for text in (row.prompt, row.answer)])
    config = AutoConfig.for_model(
        "gpt_neox", vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
        pad_token_id=tokenizer.pad_token_id, **SHAPE,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    encoded = [_encode(tokenizer, row) for row in rows]
    _fit(model, encoded, Random(seed), report)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _encode(tokenizer: PreTrainedTokenizerBase, row: Row) -> tuple[list[int], int]:
    """Give the tokens of question and answer, and how many of them are the question's."""
    chat = [{"role": "user", "content": row.prompt}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
    answer = tokenizer(row.answer, add_special_tokens=False)["input_ids"]
    return [*prompt, *answer, tokenizer.eos_token_id], len(prompt)


def _fit(
    model: PreTrainedModel,
    rows: Sequence[tuple[list[int], int]],
    rng: Random,
    report: Callable[[int, int, float], None],
) -> None:
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, STEPS))
    model.train()
    for step in range(1, STEPS + 1):
        loss = model(**_batch(rng.sample(rows, BATCH), model.config.pad_token_id)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        report(step, STEPS, loss.item())


def _batch(rows: Sequence[tuple[list[int], int]], pad: int) -> dict[str, torch.Tensor]:
    import torch

    width = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([[*row, *[pad] * (width - len(row))] for row, _ in rows])
    places = torch.arange(width)[None]
    lengths = torch.tensor([len(row) for row, _ in rows])[:, None]
    starts = torch.tensor([n for _, n in rows])[:, None]
    is_due = (places >= starts) & (places < lengths)
    return {"input_ids": ids, "attention_mask": (places < lengths).long(), "labels": ids.masked_fill(~is_due, -100)}
