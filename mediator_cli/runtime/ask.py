"""Ask the experts themselves about a prompt: how well each predicts it, or how near its delta is to what would help.

Both give an array [rows, experts + 1]: a number for each expert, and how many tokens were predicted. A prompt of which
no token is predicted says nothing; its numbers are zeros.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from mediator_cli.errors import BundleError, Problem
from mediator_cli.runtime.features import FeatureReader, context_length, length_batches
from mediator_cli.runtime.gradients import cosines, token_losses
from mediator_cli.runtime.prompts import chat_ids

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from mediator_cli.runtime.features import FeatureSpec, Floats32, Prompts
    from mediator_cli.runtime.gradients import Experts
    from mediator_cli.runtime.prompts import PromptReader

_PASS_TOKENS = 1024
"""Tokens of one pass with padding: its logits are as many rows of the vocabulary."""


def asking_reader(model: Experts, reader: PromptReader, spec: FeatureSpec) -> FeatureReader:
    """Make a reader that asks the experts of a bundle about prompts, given as the ids that `asked_ids` gives."""
    limit = context_length(model.config)
    front = _front(reader, spec)
    ask = perplexities if spec.kind == "perplexity" else cosines
    n_ids = len(cast("Any", model.get_input_embeddings()).weight)
    most = None if limit is None else limit - len(front)
    return FeatureReader(spec, partial(_with_front, model, ask, front), most, n_ids)


def asked_ids(reader: PromptReader, spec: FeatureSpec, ids: Sequence[int]) -> list[int]:
    """Choose the tokens of a prompt that are asked about: those of the last user turn, or all; none of an empty one."""
    content = reader.content(ids)
    return content if spec.reads == "turn" or not content else list(ids)


def text_ids(reader: PromptReader, spec: FeatureSpec, text: str) -> list[int]:
    """Give the tokens of a text that are asked about, wrapped as a chat of one turn where all tokens are."""
    content = reader.encode(text)
    if spec.reads == "turn" or not content:
        return content
    return chat_ids(reader.tokenizer, [{"role": "user", "content": text}])


def _front(reader: PromptReader, spec: FeatureSpec) -> tuple[int, ...]:
    if spec.first_token == "skip":
        return ()
    bos = cast("int | None", reader.tokenizer.bos_token_id)
    if bos is None:
        message = "has no beginning-of-text token to predict the first one from"
        raise BundleError(Problem("the tokenizer", message, "fit the router with first_token: skip"))
    return (bos,)


def _with_front(model: Experts, ask: Any, front: tuple[int, ...], prompts: Prompts) -> Floats32:  # noqa: ANN401
    # A beginning that the prompt has already, as templates write it, is not put there twice.
    rows = [list(prompt) if tuple(prompt[: len(front)]) == front else [*front, *prompt] for prompt in prompts]
    found: Floats32 = ask(model, rows)
    return found


def perplexities(model: Experts, prompts: Prompts) -> Floats32:
    """Give ln perplexity of prompts of token ids under each expert, and the tokens predicted [rows, experts + 1].

    ln PPL(x) = -(1/t) Σ ln p(x_j | x_<j), as in MergeME (arXiv:2502.00997, section 3.2), over all tokens but the first.
    """
    found = np.zeros((len(prompts), len(model.expert_names) + 1), np.float32)
    long = [row for row, prompt in enumerate(prompts) if len(prompt) > 1]
    one_hot = torch.eye(len(model.expert_names))
    for experts in _groups(model):
        chosen = [prompts[row] for row in long]
        for batch in length_batches(chosen, max(1, _PASS_TOKENS // len(experts))):
            values = _mean_losses(model, [chosen[at] for at in batch], one_hot[experts])
            for at, row_values in zip(batch, values, strict=True):
                found[long[at], experts] = row_values
    for row in long:
        found[row, -1] = len(prompts[row]) - 1
    return found


def _groups(model: Experts) -> Iterator[list[int]]:
    """Give the experts that are asked in one pass: all as rows of it, unless their products had to be decoded anew."""
    matrices = [mixer.matrix for mixer in model.opened.mixers if mixer.matrix is not None]
    experts = list(range(len(model.expert_names)))
    if all(matrix.keeps for matrix in matrices):
        yield experts
        return
    # Those whose matrices are there come first, before the others push them out.
    kept = model.opened.cache.entries
    one_hot = torch.eye(len(experts)).tolist()
    yield from ([expert] for expert in sorted(experts, key=lambda expert: tuple(one_hot[expert]) not in kept))


@torch.no_grad()
def _mean_losses(model: Experts, prompts: Prompts, mixtures: torch.Tensor) -> Floats32:
    """Compute the mean loss of each prompt, of two tokens or more, with each mixture [k, experts]: [rows, k]."""
    width = max(map(len, prompts))
    # Padding stands behind the tokens, where a causal model cannot see it.
    ids = torch.tensor([[*prompt, *[prompt[-1]] * (width - len(prompt))] for prompt in prompts], device=model.device)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=model.device)
    mask = torch.arange(width, device=model.device)[None] < lengths[:, None]
    n_prompts, n_mixtures = len(prompts), len(mixtures)
    with model.mixing(mixtures.repeat_interleave(n_prompts, dim=0)):
        logits = model(
            input_ids=ids.repeat(n_mixtures, 1), attention_mask=mask.repeat(n_mixtures, 1).long(), use_cache=False
        ).logits
    losses = token_losses(logits[:, :-1], ids[:, 1:].repeat(n_mixtures, 1)) * mask[:, 1:].repeat(n_mixtures, 1)
    means = losses.sum(1).view(n_mixtures, n_prompts) / (lengths - 1)
    found: Floats32 = means.t().float().cpu().numpy()
    return found
