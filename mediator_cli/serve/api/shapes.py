"""The two forms of an answer: messages of a chat, and texts that go on from a prompt."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from mediator_cli.serve.api.flow import Answer
    from mediator_cli.serve.engine.request import Reason, Scored, Started, Text

_LEAST = -9999.0
"""What OpenAI writes for a probability of zero; JSON has no infinity."""


class Shape(Protocol):
    """Writes choices, whole or in the parts of a stream."""

    @property
    def kind(self) -> str:
        """Name a whole answer."""

    @property
    def chunk_kind(self) -> str:
        """Name a part of a stream."""

    @property
    def prefix(self) -> str:
        """Begin the ids of answers."""

    def whole(self, at: int, answer: Answer) -> dict[str, Any]:
        """Write a complete answer."""

    def opening(self, at: int, started: Started) -> dict[str, Any]:
        """Write the first chunk of an answer."""

    def more(self, at: int, text: Text) -> dict[str, Any]:
        """Write what was added."""

    def closing(self, at: int, reason: Reason) -> dict[str, Any]:
        """Write the last chunk."""


@dataclass(frozen=True)
class ChatShape:
    """Messages of a chat."""

    logprobs: bool
    kind: str = "chat.completion"
    chunk_kind: str = "chat.completion.chunk"
    prefix: str = "chatcmpl-"

    def whole(self, at: int, answer: Answer) -> dict[str, Any]:
        """Write a message."""
        message = {"role": "assistant", "content": answer.text, "refusal": None}
        return {
            "index": at,
            "message": message,
            "logprobs": self._logprobs(answer.tokens),
            "finish_reason": answer.end.reason if answer.end else None,
        }

    def opening(self, at: int, started: Started) -> dict[str, Any]:
        """Say who speaks."""
        return self._chunk(at, {"role": "assistant", "content": ""})

    def more(self, at: int, text: Text) -> dict[str, Any]:
        """Write more of a message."""
        return self._chunk(at, {"content": text.text}) | {"logprobs": self._logprobs(text.tokens)}

    def closing(self, at: int, reason: Reason) -> dict[str, Any]:
        """Say why the message ends."""
        return self._chunk(at, {}) | {"finish_reason": reason}

    def _chunk(self, at: int, delta: dict[str, str]) -> dict[str, Any]:
        return {"index": at, "delta": delta, "logprobs": None, "finish_reason": None}

    def _logprobs(self, tokens: Iterable[Scored]) -> dict[str, Any] | None:
        return {"content": [_entry(scored) for scored in tokens], "refusal": None} if self.logprobs else None


@dataclass
class CompletionShape:
    """Texts that go on from prompts; `echoes` are the prompts as text where they are wanted, one for each choice."""

    logprobs: bool
    echoes: Sequence[str] = ()
    kind: str = "text_completion"
    chunk_kind: str = "text_completion"
    prefix: str = "cmpl-"
    offsets: dict[int, int] = field(default_factory=dict)

    def whole(self, at: int, answer: Answer) -> dict[str, Any]:
        """Write a text, after its prompt where that is wanted."""
        echoed = answer.started.prompt if answer.started is not None and self.echoes else ()
        return {
            "index": at,
            "text": self._echo(at) + answer.text,
            "logprobs": self._logprobs(at, [*echoed, *answer.tokens]),
            "finish_reason": answer.end.reason if answer.end else None,
        }

    def opening(self, at: int, started: Started) -> dict[str, Any]:
        """Begin with the prompt where that is wanted."""
        return self._chunk(at, self._echo(at), started.prompt if self.echoes else ())

    def more(self, at: int, text: Text) -> dict[str, Any]:
        """Write more of a text."""
        return self._chunk(at, text.text, text.tokens)

    def closing(self, at: int, reason: Reason) -> dict[str, Any]:
        """Say why the text ends."""
        return self._chunk(at, "", ()) | {"finish_reason": reason}

    def _chunk(self, at: int, text: str, tokens: Sequence[Scored]) -> dict[str, Any]:
        return {
            "index": at,
            "text": text,
            "logprobs": self._logprobs(at, tokens) if tokens else None,
            "finish_reason": None,
        }

    def _echo(self, at: int) -> str:
        return self.echoes[at] if self.echoes else ""

    def _logprobs(self, at: int, tokens: Sequence[Scored]) -> dict[str, Any] | None:
        if not self.logprobs:
            return None
        offsets, place = [], self.offsets.get(at, 0)
        for scored in tokens:
            offsets.append(place)
            place += len(scored.text)
        self.offsets[at] = place
        return {
            "tokens": [scored.text for scored in tokens],
            "token_logprobs": [_number(scored.log_prob) for scored in tokens],
            "top_logprobs": [_best(scored) for scored in tokens],
            "text_offset": offsets,
        }


def _entry(scored: Scored) -> dict[str, Any]:
    best = [_one(text, raw, value) for _, text, raw, value in scored.best]
    return _one(scored.text, scored.raw, scored.log_prob) | {"top_logprobs": best}


def _one(text: str, raw: bytes, log_prob: float | None) -> dict[str, Any]:
    return {"token": text, "logprob": _number(log_prob), "bytes": list(raw)}


def _best(scored: Scored) -> dict[str, float | None] | None:
    """Write the best tokens by their texts, and the token itself; of tokens with one text the best is kept."""
    if scored.log_prob is None:
        return None
    found: dict[str, float | None] = {}
    for _, text, _, value in scored.best:
        found.setdefault(text, _number(value))
    found.setdefault(scored.text, _number(scored.log_prob))
    return found


def _number(log_prob: float | None) -> float | None:
    return log_prob if log_prob is None else max(log_prob, _LEAST) if math.isfinite(log_prob) else _LEAST
