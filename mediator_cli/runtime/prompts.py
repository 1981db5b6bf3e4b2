"""What a router reads of a prompt: the last user turn, however it is wrapped.

A templated and a raw prompt must give the same features, so the text of the turn is cut out of the chat template and
tokenised anew. What wraps a turn is found by rendering the template with known words.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from mediator_cli.errors import BundleError, Problem, first_line

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

Message = dict[str, str]
_SYSTEM, _FIRST, _ANSWER, _LAST = "Alphaword", "Betaword", "Gammaword", "Deltaword"


@dataclass(frozen=True)
class PromptReader:
    """Reads prompts of one tokenizer; without a chat template both patterns are None."""

    tokenizer: PreTrainedTokenizerBase
    opening: re.Pattern[str] | None
    closing: re.Pattern[str] | None

    def encode(self, text: str) -> list[int]:
        """Tokenise a text as it is, without special tokens and outer white space."""
        return list(self.tokenizer.encode(text.strip(), add_special_tokens=False))

    def content(self, ids: Sequence[int]) -> list[int]:
        """Return the tokens of the last user turn; of the whole prompt where no template is recognised."""
        turn = self._last_turn(self._decode(list(ids)))
        return self.encode(self._decode(self._without_ends(ids)) if turn is None else turn)

    def _last_turn(self, text: str) -> str | None:
        if self.opening is None or self.closing is None:
            return None
        start = max((match.end() for match in self.opening.finditer(text)), default=None)
        end = None if start is None else self.closing.search(text, start)
        # An opening that nothing closes is part of what a user wrote.
        return text[start : end.start()] if end else None

    def _without_ends(self, ids: Sequence[int]) -> list[int]:
        """Drop what a tokenizer and padding put around a prompt."""
        outer = set(self.tokenizer.all_special_ids) - {self.tokenizer.unk_token_id}
        inner = [at for at, token in enumerate(ids) if token not in outer]
        return list(ids[inner[0] : inner[-1] + 1]) if inner else []

    def _decode(self, ids: list[int]) -> str:
        return cast("str", self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)) if ids else ""


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model folder; raise BundleError when it holds none that works."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        tokenizer.encode("a", add_special_tokens=False)
    except Exception as error:  # noqa: BLE001 - the tokenizers library raises plain Exception for a damaged file
        hint = "a router needs the tokenizer; put tokenizer.json and tokenizer_config.json there"
        raise BundleError(Problem(str(folder), f"has no usable tokenizer: {first_line(error)}", hint)) from None
    return cast("PreTrainedTokenizerBase", tokenizer)


def prompt_reader(tokenizer: PreTrainedTokenizerBase) -> PromptReader:
    """Find out what the tokenizer's chat template, if it has one, puts around a user's turn."""
    return PromptReader(
        tokenizer,
        _any_of(tokenizer, _openings(tokenizer)),
        _any_of(tokenizer, _closings(tokenizer)),
    )


def chat_ids(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, raw: bool = False) -> list[int]:
    """Tokenise a chat with the tokenizer's template, or the bare texts where it has none or `raw` is set."""
    if raw or not tokenizer.chat_template:
        return list(tokenizer.encode("\n".join(message["content"] for message in messages)))
    encoded: Any = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, return_dict=True)
    return list(encoded["input_ids"])


def _openings(tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Give what stands before a user's text: at the start, after an answer, after a system message."""
    first = _around(_render(tokenizer, ("user", _FIRST)))[0]
    later = _between(_dialogue(tokenizer), _ANSWER, _LAST)
    after_system = _between(_render(tokenizer, ("system", _SYSTEM), ("user", _FIRST)), _SYSTEM, _FIRST)
    shared = _common_end(first, later) if first and later else ""
    # A first turn may follow a default system message, which another prompt need not have, and so its end.
    alone = shared.removeprefix(_around(_render(tokenizer, ("user", _FIRST), answer=False))[1])
    yield from (alone if alone.strip() else shared,) if shared.strip() else (first, later)
    yield after_system


def _closings(tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Give what stands behind a user's text: the opening of an answer, or the bare end of the turn."""
    yield _around(_render(tokenizer, ("user", _FIRST)))[1]
    yield _between(_dialogue(tokenizer), _FIRST, _ANSWER)
    yield _around(_render(tokenizer, ("user", _FIRST), answer=False))[1]


def _dialogue(tokenizer: PreTrainedTokenizerBase) -> str:
    return _render(tokenizer, ("user", _FIRST), ("assistant", _ANSWER), ("user", _LAST))


def _render(tokenizer: PreTrainedTokenizerBase, *turns: tuple[str, str], answer: bool = True) -> str:
    """Render a chat as text; empty where there is no template or it takes no such chat."""
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        return ""
    chat = [{"role": role, "content": content} for role, content in turns]
    try:
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=answer)
    except (TemplateError, TypeError, ValueError, KeyError):
        return ""
    return str(text)


def _around(text: str) -> tuple[str, str]:
    """Cut what stands before and behind the first user's word; both empty unless it is there."""
    before, word, behind = text.partition(_FIRST)
    return (before, behind) if word else ("", "")


def _between(text: str, before: str, behind: str) -> str:
    """Cut what stands between two words; empty unless both are there, in this order."""
    tail = text.partition(before)[2]
    return tail.partition(behind)[0] if behind in tail else ""


def _common_end(one: str, other: str) -> str:
    n = 0
    while n < min(len(one), len(other)) and one[-n - 1] == other[-n - 1]:
        n += 1
    return one[len(one) - n :]


def _any_of(tokenizer: PreTrainedTokenizerBase, markers: Iterable[str]) -> re.Pattern[str] | None:
    """Match any of the markers as the tokenizer writes them back, longest first; None where all are empty."""
    patterns = {_pattern(tokenizer, marker) for marker in markers if marker.strip()} - {""}
    return re.compile("|".join(sorted(patterns, key=lambda text: (-len(text), text)))) if patterns else None


def _pattern(tokenizer: PreTrainedTokenizerBase, marker: str) -> str:
    """Write a marker as a pattern that allows for any white space between its words and special tokens."""
    ids = tokenizer.encode(marker, add_special_tokens=False)
    text = cast("str", tokenizer.decode(ids, clean_up_tokenization_spaces=False))
    special = "|".join(re.escape(token) for token in tokenizer.all_special_tokens)
    words = re.split(rf"\s+|({special})" if special else r"\s+", text)
    return r"\s*".join(re.escape(word) for word in words if word)
