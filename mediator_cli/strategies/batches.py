"""Rows as padded batches, for what is learned by gradients: the same prompts and answers that are scored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn import functional

from mediator_cli.runtime.tokens import answer_tokens, end_tokens, prompt_tokens

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from transformers import PreTrainedTokenizerBase

    from mediator_cli.evaluate.tasks import Row
    from mediator_cli.runtime.model import RoutedModel


@dataclass(frozen=True, eq=False)
class Example:
    """One row as token ids: its prompt, and its answer with the end of the turn where the model has one."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Batch:
    """Examples padded at the left: ids, mask, `is_prompt` [rows, width]; targets [rows, n_kept], with -100 for none."""

    ids: torch.Tensor
    mask: torch.Tensor
    is_prompt: torch.Tensor
    targets: torch.Tensor


def read_examples(model: RoutedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row]) -> list[Example]:
    """Turn rows into tokens as `evaluate` does: chat template, answer, and the first token that ends a turn."""
    prompts = prompt_tokens(tokenizer, [row.prompt for row in rows])
    answers = answer_tokens(tokenizer, prompts, [row.answer for row in rows])
    ends = end_tokens(model, tokenizer)[:1]
    return [Example(tuple(p.ids), (*a, *ends)) for p, a in zip(prompts, answers, strict=True)]


def batches(examples: Sequence[Example], size: int, seed: int, pad: int = 0) -> Iterator[Batch]:
    """Give all examples once, in an order drawn with the seed."""
    order = np.random.default_rng(seed).permutation(len(examples))
    for start in range(0, len(order), size):
        yield make_batch([examples[at] for at in order[start : start + size]], pad)


def make_batch(examples: Sequence[Example], pad: int = 0) -> Batch:
    """Pad examples at the left, so that all answers end together."""
    fed = [(*example.prompt, *example.answer[:-1]) for example in examples]
    width, kept = max(map(len, fed)), max(len(example.answer) for example in examples)
    ids, mask = torch.full((len(fed), width), pad), torch.zeros(len(fed), width, dtype=torch.int64)
    is_prompt = torch.zeros(len(fed), width, dtype=torch.bool)
    targets = torch.full((len(fed), kept), -100)
    for at, (tokens, example) in enumerate(zip(fed, examples, strict=True)):
        ids[at, width - len(tokens) :] = torch.tensor(tokens)
        mask[at, width - len(tokens) :] = 1
        is_prompt[at, width - len(tokens) : width - len(tokens) + len(example.prompt)] = True
        targets[at, kept - len(example.answer) :] = torch.tensor(example.answer)
    return Batch(ids, mask, is_prompt, targets)


def answer_logits(model: RoutedModel, batch: Batch) -> torch.Tensor:
    """Compute the logits [rows, n_kept, vocabulary] that predict the answers; with gradients, if they are on."""
    positions = (batch.mask.cumsum(1) - 1).clamp(min=0)
    with model.reading(batch.is_prompt):
        logits: torch.Tensor = model(
            input_ids=batch.ids,
            attention_mask=batch.mask,
            position_ids=positions,
            logits_to_keep=batch.targets.shape[1],
            use_cache=False,
        ).logits
    return logits


def answer_loss(model: RoutedModel, batch: Batch) -> torch.Tensor:
    """Mean -ln p of an answer, summed over its tokens, in nats."""
    logits = answer_logits(model, batch).float()
    total = functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=-100, reduction="sum")
    return total / len(batch.targets)
