"""What is asked of the engine, and what it tells while it answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from mediator_cli.errors import Problem

Reason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class Draw:
    """How tokens are chosen: the most probable at temperature 0, else drawn with a seed of the request's own.

    `top_k` 0 = all tokens. `bias` is added to the logits of tokens. `seed` None = another one each time.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    bias: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Request:
    """One answer that is wanted: a prompt of token ids, who answers, and how.

    `mixture` are the weights of experts by name, {} = the dense expert, None = as router or gates choose. The router
    reads `route_on`, token ids of its own, or the prompt. `logprobs` is how many alternatives of each token are told,
    0 = the token's own log probability alone, None = nothing; `echo` tells those of the prompt too. `max_tokens` may be
    0 with `echo`.
    """

    prompt: tuple[int, ...]
    max_tokens: int
    mixture: Mapping[str, float] | None = None
    route_on: tuple[int, ...] | None = None
    draw: Draw = field(default_factory=Draw)
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    echo: bool = False
    ignore_eos: bool = False


@dataclass(frozen=True)
class Scored:
    """A token as text and bytes, its log probability, and the most probable tokens in its place, best first.

    `text` is what the token adds to the text; `raw` the bytes that it stands for. `log_prob` is None for the first
    token of a prompt.
    """

    token: int
    text: str
    raw: bytes
    log_prob: float | None
    best: tuple[tuple[int, str, bytes, float], ...] = ()


@dataclass(frozen=True)
class Started:
    """The request is being answered by `mixture`, the weights of experts by name, {} = the dense expert.

    `probabilities`, `uncertainty` (0 to 1) and `is_outside` are the router's; None where the mixture was given, or
    gates choose. `n_cached` tokens of the prompt were read for an earlier request. `prompt` are the scored tokens of an
    echo.
    """

    mixture: Mapping[str, float]
    probabilities: Mapping[str, float] | None = None
    uncertainty: float | None = None
    is_outside: bool | None = None
    n_cached: int = 0
    prompt: tuple[Scored, ...] = ()


@dataclass(frozen=True)
class Text:
    """More of the answer; `text` may be empty while a character or a stop sequence is not complete."""

    text: str
    tokens: tuple[Scored, ...] = ()


@dataclass(frozen=True)
class Finished:
    """The answer is complete: why, and how many tokens were read and written (one that ends an answer counts)."""

    reason: Reason
    n_prompt: int
    n_answer: int


@dataclass(frozen=True)
class Failed:
    """There will be no (more) answer. `is_ours` tells a defect from what the caller can mend."""

    problem: Problem
    is_ours: bool = False


Event = Started | Text | Finished | Failed
