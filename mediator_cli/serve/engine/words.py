"""Tokens as text while they come: no broken characters, no half of a stop sequence."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from mediator_cli.serve.engine.request import Scored

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedTokenizerBase

_BROKEN = "\N{REPLACEMENT CHARACTER}"
_CONTEXT = 8
"""Tokens before the new ones that a decoder may need to write spaces and joined characters rightly."""


@dataclass
class Vocabulary:
    """Texts and bytes of single tokens."""

    tokenizer: PreTrainedTokenizerBase
    n_ids: int

    def text(self, token: int) -> str:
        """Give the text of a token alone."""
        return str(self.tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def raw(self, token: int) -> bytes:
        """Give the bytes that a token stands for, which need not be whole characters."""
        text = self.text(token)
        if _BROKEN not in text:
            return text.encode()
        piece = self.tokenizer.convert_ids_to_tokens(token)
        if isinstance(piece, str) and len(piece) == 6 and piece.startswith("<0x"):
            return bytes([int(piece[3:5], 16)])
        if isinstance(piece, str) and all(letter in self._byte_of for letter in piece):
            return bytes(self._byte_of[letter] for letter in piece)
        return text.encode()

    @cached_property
    def _byte_of(self) -> dict[str, int]:
        """Invert the alphabet of byte-level tokenizers: printable bytes as they are, the others from U+0100."""
        printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        others = [byte for byte in range(0x100) if byte not in printable]
        return {chr(byte): byte for byte in printable} | {chr(0x100 + at): byte for at, byte in enumerate(others)}

    def scored(self, token: int, log_probs: torch.Tensor | None, n_best: int, added: str | None = None) -> Scored:
        """Tell of a token with the log probabilities [vocabulary] in its place; None where there are none."""
        text = self.text(token) if added is None else added
        if log_probs is None:
            return Scored(token, text, self.raw(token), None)
        return Scored(token, text, self.raw(token), float(log_probs[token]), self._best(log_probs, n_best))

    def _best(self, log_probs: torch.Tensor, n_best: int) -> tuple[tuple[int, str, bytes, float], ...]:
        if not n_best:
            return ()
        top = log_probs.topk(min(n_best, len(log_probs)))
        pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
        return tuple((token, self.text(token), self.raw(token), value) for token, value in pairs)


@dataclass
class Writer:
    """Writes an answer: `add` takes tokens and gives the text that is certain by now; `is_stopped` once a stop came."""

    tokenizer: PreTrainedTokenizerBase
    stop: Sequence[str] = ()
    tokens: list[int] = field(default_factory=list)
    is_stopped: bool = False
    _start: int = 0
    _done: int = 0
    _held: str = ""

    def add(self, token: int) -> str:
        """Take one more token; give the text that it made certain."""
        self.tokens.append(token)
        before = self._decode(self.tokens[self._start : self._done])
        now = self._decode(self.tokens[self._start :])
        # A character that is not complete yet is written as a broken one.
        if len(now) <= len(before) or now.endswith(_BROKEN):
            return ""
        self._done = len(self.tokens)
        self._start = max(self._start, self._done - _CONTEXT) if self._keeps(now) else self._start
        return self._released(now[len(before) :])

    def finish(self) -> str:
        """Give what was held back, as no more comes."""
        if self.is_stopped:
            return ""
        before = self._decode(self.tokens[self._start : self._done])
        rest = self._decode(self.tokens[self._start :])[len(before) :]
        self._done = len(self.tokens)
        released = self._released(rest)
        held, self._held = self._held, ""
        return released if self.is_stopped else released + held

    def _keeps(self, now: str) -> bool:
        """Whether fewer tokens before the new ones are enough to write them."""
        late = self._decode(self.tokens[max(self._start, self._done - _CONTEXT) :])
        return len(self.tokens) - self._start > 2 * _CONTEXT and now.endswith(late) and not late.startswith(_BROKEN)

    def _released(self, new: str) -> str:
        """Cut at the first stop sequence, and hold back what may be the beginning of one."""
        text = self._held + new
        found = [at for at in (text.find(stop) for stop in self.stop) if at >= 0]
        if found:
            self.is_stopped, self._held = True, ""
            return text[: min(found)]
        n_held = max((_overlap(text, stop) for stop in self.stop), default=0)
        cut = len(text) - n_held
        self._held = text[cut:]
        return text[:cut]

    def _decode(self, tokens: list[int]) -> str:
        if not tokens:
            return ""
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _overlap(text: str, stop: str) -> int:
    """Count the characters at the end of a text with which a stop sequence begins."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
