"""Prompts as token ids, laid out to run through a model, and which of their tokens count."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from mediator_cli.errors import CheckpointError, Problem
from mediator_cli.runtime.features import context_length
from mediator_cli.runtime.prompts import chat_ids

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from transformers import PreTrainedTokenizerBase

    from mediator_cli.moe.layerwise import Batch, LayerwiseModel

_LONGEST = 512
"""Tokens of a prompt that are read: more of one say little about its task, and cost time."""


@dataclass(frozen=True)
class Asked:
    """Prompts of several groups as token ids; `groups` [prompts] is the group of each.

    Each prompt's first `opening` tokens are those that all prompts share, such as a system message: they tell nothing
    of a group, and are read but not counted.
    """

    ids: tuple[tuple[int, ...], ...]
    groups: tuple[int, ...]
    opening: int

    def counted(self, batch: Batch) -> torch.Tensor:
        """Tell which real tokens [real tokens] of a batch stand behind the common opening."""
        return (torch.arange(batch.real.shape[1]) >= self.opening)[None, :].expand_as(batch.real)[batch.real]


def ask(
    model: LayerwiseModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Mapping[str, Sequence[str]],
    *,
    chat: bool,
    whole: bool = False,
) -> Asked:
    """Tokenise the texts of each group as they are asked at run time, in the chat template or bare.

    With `whole`, bare texts are read as mergekit-moe reads them: to their end, behind the token that begins a text,
    even where the tokenizer itself puts none. Raises CheckpointError for a text that has no tokens.
    """
    bare = whole and not chat
    limit = None if bare else min(_LONGEST, context_length(model.skeleton.config) or _LONGEST)
    ids, groups = [], []
    for group, (name, own) in enumerate(texts.items()):
        for number, text in enumerate(own, 1):
            found = (_whole(tokenizer, text) if bare else _turn(tokenizer, text, chat=chat))[:limit]
            if not found:
                raise CheckpointError(Problem(f"{name}, prompt {number}", "has no tokens", "write some text"))
            ids.append(tuple(found))
            groups.append(group)
    return Asked(tuple(ids), tuple(groups), _opening(ids))


def _turn(tokenizer: PreTrainedTokenizerBase, text: str, *, chat: bool) -> list[int]:
    return chat_ids(tokenizer, [{"role": "user", "content": text}], raw=not chat)


def _whole(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer.encode((tokenizer.bos_token or "") + text, add_special_tokens=False))


def some_of(texts: Sequence[str], most: int) -> tuple[str, ...]:
    """Take at most so many texts, evenly from a list.

    >>> some_of("abcdefg", 3)
    ('a', 'c', 'e')
    """
    n = min(most, len(texts))
    return tuple(texts[at * len(texts) // n] for at in range(n))


def _opening(ids: Sequence[tuple[int, ...]]) -> int:
    """Count the tokens that all prompts begin with; none where a prompt has no others."""
    first, last = min(ids), max(ids)
    shared = next((at for at, pair in enumerate(zip(first, last, strict=False)) if pair[0] != pair[1]), len(first))
    return shared if all(len(prompt) > shared for prompt in ids) else 0
