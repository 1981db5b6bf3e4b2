"""Token ids of prompts and answers: through the chat template where there is one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mediator_cli.errors import CheckpointError, Problem

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Prompt:
    """A prompt as the model gets it: its text, and its token ids with what the tokenizer puts in front."""

    text: str
    ids: tuple[int, ...]
    n_front: int = 0


def prompt_tokens(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, raw: bool = False) -> list[Prompt]:
    """Tokenise prompts as one user turn each, or as plain text if `raw` or without chat template.

    Plain text gets the beginning-of-text token if the tokenizer puts one.
    """
    is_chat = bool(tokenizer.chat_template) and not raw
    front: tuple[int, ...] = ()
    if is_chat:
        chats = [[{"role": "user", "content": text}] for text in texts]
        texts = [str(tokenizer.apply_chat_template(c, tokenize=False, add_generation_prompt=True)) for c in chats]
    elif tokenizer.bos_token_id is not None and tokenizer.bos_token_id in _encode(tokenizer, [""], special=True)[0]:
        front = (tokenizer.bos_token_id,)
    found = [Prompt(text, front + ids, len(front)) for text, ids in zip(texts, _encode(tokenizer, texts), strict=True)]
    problems = [
        Problem(f"row {at + 1} prompt", "has no tokens", "write a prompt that the tokenizer knows")
        for at, prompt in enumerate(found)
        if not prompt.ids
    ]
    if problems:
        raise CheckpointError(problems)
    return found


def answer_tokens(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], answers: Sequence[str]
) -> list[tuple[int, ...]]:
    """Tokenise each answer as it reads behind its prompt, or by itself where the two would share a token."""
    together = _encode(tokenizer, [prompt.text + answer for prompt, answer in zip(prompts, answers, strict=True)])
    alone = _encode(tokenizer, answers)
    found = []
    for prompt, whole, own in zip(prompts, together, alone, strict=True):
        ids = prompt.ids[prompt.n_front :]
        found.append(whole[len(ids) :] if whole[: len(ids)] == ids and len(whole) > len(ids) else own)
    return found


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """List the tokens at which generation stops; empty when nothing says."""
    config = model.generation_config
    found = None if config is None else config.eos_token_id
    if found is None:
        found = tokenizer.eos_token_id
    if found is None:
        return ()
    return tuple(found) if isinstance(found, list | tuple) else (int(found),)


def _encode(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, special: bool = False
) -> list[tuple[int, ...]]:
    if not texts:
        return []
    return [tuple(ids) for ids in tokenizer(list(texts), add_special_tokens=special)["input_ids"]]
