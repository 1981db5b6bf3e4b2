"""Many short chats in one sequence, so that training computes their common beginning once and pads nothing.

Prompts of one wording open with the same tokens: the chat template's system message and the instruction. A packed
sequence holds chats of one wording: what they share once, then the rest of each. The mask lets a chat see that
beginning and itself, and the positions count on from the beginning, so each chat gets the logits it would get alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from scripts.demo.tasks import Row

Ids = tuple[int, ...]
SHARED = 0
PADDING = -1


@dataclass(frozen=True)
class Chat:
    """The tokens of a templated prompt, and those of its answer with the end-of-turn token."""

    prompt: Ids
    answer: Ids


@dataclass(frozen=True)
class Sequence1D:
    """One packed sequence: per token its id, position and chat; and which tokens predict which answer tokens."""

    ids: list[int]
    positions: list[int]
    owners: list[int]
    predicting: list[int]
    targets: list[int]


@dataclass(frozen=True)
class Batch:
    """Packed sequences as tensors; ``predicting`` indexes the flattened tokens."""

    ids: torch.Tensor
    positions: torch.Tensor
    mask: torch.Tensor
    predicting: torch.Tensor
    targets: torch.Tensor


def encode(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row]) -> list[Chat]:
    """Tokenise rows exactly as they will be asked later."""
    chats = []
    for row in rows:
        chat = [{"role": "user", "content": row.prompt}]
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
        answer = tokenizer(row.answer, add_special_tokens=False)["input_ids"]
        chats.append(Chat(tuple(prompt), (*answer, tokenizer.eos_token_id)))
    return chats


def epoch(wordings: Sequence[Sequence[Chat]], width: int, height: int, rng: Random) -> list[Batch]:
    """Shuffle the chats of each wording and pack all into batches of ``height`` sequences of ``width`` tokens."""
    rows = [row for chats in wordings for row in _pack(chats, width, rng)]
    rng.shuffle(rows)
    return [_batch(rows[start : start + height]) for start in range(0, len(rows), height)]


def _pack(chats: Sequence[Chat], width: int, rng: Random) -> list[Sequence1D]:
    shared = _opening([chat.prompt for chat in chats])
    shuffled = rng.sample(list(chats), len(chats))
    return [_sequence(group, shared, width) for group in _fill(shuffled, len(shared), width)]


def _opening(prompts: Sequence[Ids]) -> Ids:
    # What the first and the last in order share, all between them share too.
    first, last = min(prompts), max(prompts)
    differing = (at for at, (one, other) in enumerate(zip(first, last, strict=False)) if one != other)
    return first[: next(differing, len(first) - 1)]


def _fill(chats: Sequence[Chat], shared: int, width: int) -> list[list[Chat]]:
    groups: list[list[Chat]] = [[]]
    used = shared
    for chat in chats:
        length = len(chat.prompt) - shared + len(chat.answer) - 1
        if groups[-1] and used + length > width:
            groups.append([])
            used = shared
        groups[-1].append(chat)
        used += length
    return groups


def _sequence(group: Sequence[Chat], shared: Ids, width: int) -> Sequence1D:
    start = len(shared)
    line = Sequence1D(list(shared), list(range(start)), [SHARED] * start, [], [])
    for owner, chat in enumerate(group, SHARED + 1):
        # The last answer token is only predicted, never read.
        own = (*chat.prompt[start:], *chat.answer[:-1])
        end = len(line.ids) + len(own)
        line.predicting.extend(range(end - len(chat.answer), end))
        line.targets.extend(chat.answer)
        line.ids.extend(own)
        line.positions.extend(range(start, start + len(own)))
        line.owners.extend([owner] * len(own))
    spare = width - len(line.ids)
    line.ids.extend([0] * spare)
    line.positions.extend(range(spare))
    line.owners.extend([PADDING] * spare)
    return line


def _batch(lines: Sequence[Sequence1D]) -> Batch:
    import torch

    width = len(lines[0].ids)
    owners = torch.tensor([line.owners for line in lines])
    related = (owners[:, :, None] == owners[:, None, :]) | (owners[:, None, :] == SHARED)
    earlier = torch.ones(width, width, dtype=torch.bool).tril()
    return Batch(
        ids=torch.tensor([line.ids for line in lines]),
        positions=torch.tensor([line.positions for line in lines]),
        mask=(related & earlier)[:, None],
        predicting=torch.tensor([row * width + at for row, line in enumerate(lines) for at in line.predicting]),
        targets=torch.tensor([target for line in lines for target in line.targets]),
    )
