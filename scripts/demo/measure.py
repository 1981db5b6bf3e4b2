"""Accuracy by greedy generation: how often the answer is exactly the expected one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from scripts.demo.tasks import Row

BATCH = 25
MAX_TOKENS = 8


def accuracy(base: Path, expert: Path | None, rows: Sequence[Row]) -> float:
    """Return the share of rows answered exactly, by the base alone or by an expert made from it."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base, padding_side="left")
    answers = answer(load(base, expert), tokenizer, [row.prompt for row in rows])
    return sum(_plain(found) == _plain(row.answer) for found, row in zip(answers, rows, strict=True)) / len(rows)


def load(base: Path, expert: Path | None) -> PreTrainedModel:
    """Return the base, or the expert in a folder: a complete model or an adapter on the base."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    complete = expert is not None and (expert / "config.json").exists()
    model = AutoModelForCausalLM.from_pretrained(expert if complete else base, dtype="auto")
    if expert is not None and not complete:
        model = PeftModel.from_pretrained(model, expert)
    return model.eval()


def answer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[str]:
    """Answer prompts in batches, a few tokens each."""
    answers: list[str] = []
    for start in range(0, len(prompts), BATCH):
        chats = [[{"role": "user", "content": prompt}] for prompt in prompts[start : start + BATCH]]
        asked = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt"
        )
        output = model.generate(**asked, max_new_tokens=MAX_TOKENS, do_sample=False)
        answers += tokenizer.batch_decode(output[:, asked["input_ids"].shape[1] :], skip_special_tokens=True)
    return answers


def _plain(text: str) -> str:
    return text.strip().rstrip(".").lower()
