"""What transformers answers, and how sure it is: the measure for servers."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedModel

Ids = Sequence[Sequence[int]]
"""Token ids of several prompts, or of their answers."""


@dataclass(frozen=True)
class Reference:
    """Greedy answers [prompt][token], the log probability of each token, and its lead over the second in logits.

    An answer goes on behind a token that ends it, one of `ends`: servers are compared up to there.
    """

    tokens: list[list[int]]
    logprobs: list[list[float]]
    leads: list[list[float]]
    ends: tuple[int, ...] = ()

    def until_end(self, tokens: Sequence[int]) -> list[int]:
        """Give the part of an answer before the first token that ends it."""
        return list(takewhile(lambda token: token not in self.ends, tokens))


def refer(model: PreTrainedModel, prompts: Ids, tokens: int) -> Reference:
    """Answer prompts one at a time, without a cache of keys and values."""
    answers = [_greedy(model, list(ids), tokens) for ids in prompts]
    end = model.config.eos_token_id
    ends = tuple(end) if isinstance(end, list) else (end,)
    return Reference(*([list(part) for part in zip(*answers, strict=True)]), ends=ends)


@torch.no_grad()
def _greedy(model: PreTrainedModel, ids: list[int], tokens: int) -> tuple[list[int], list[float], list[float]]:
    start = len(ids)
    for _ in range(tokens):
        logits = model(torch.tensor([ids])).logits[0, start - 1 :].double()
        ids = [*ids, int(logits[-1].argmax())]
    added = torch.tensor(ids[start:])
    chosen = logits.log_softmax(-1).gather(1, added[:, None])[:, 0]
    best = logits.topk(2).values
    return added.tolist(), chosen.tolist(), (best[:, 0] - best[:, 1]).tolist()


@torch.no_grad()
def score(model: PreTrainedModel, prompts: Ids, answers: Ids) -> list[list[float]]:
    """Give the log probability of each token of given answers."""
    return [_scored(model, list(ids), list(tokens)) for ids, tokens in zip(prompts, answers, strict=True)]


def _scored(model: PreTrainedModel, ids: list[int], tokens: list[int]) -> list[float]:
    logits = model(torch.tensor([[*ids, *tokens]])).logits[0, len(ids) - 1 : -1].double()
    found: list[float] = logits.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0].tolist()
    return found


def apart(one: Sequence[Sequence[float]], other: Sequence[Sequence[float]]) -> float:
    """Give the largest difference of two tables of log probabilities.

    >>> apart([[-1.0, -2.0], [-3.0]], [[-1.5, -2.0], [-2.0]])
    1.0
    """
    return max(abs(a - b) for ours, theirs in zip(one, other, strict=True) for a, b in zip(ours, theirs, strict=True))


def words_of(folder: Path) -> torch.Tensor:
    """List the tokens of a tokenizer that are plain words: a server that speaks text never splits or withholds them."""
    found = [token for text, token in AutoTokenizer.from_pretrained(folder).get_vocab().items() if _is_word(text)]
    return torch.tensor(sorted(found))


def _is_word(text: str) -> bool:
    return re.fullmatch(r"Ġ[A-Za-z]{3,}", text) is not None
