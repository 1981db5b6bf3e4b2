"""Config and generation config of the output: the base's, with the winner's token ids, agreeing with the tokenizer."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mediator_cli.checkpoint.header import read_json
from mediator_cli.plan.model import TokenSettings

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from mediator_cli.checkpoint.source import Checkpoint
    from mediator_cli.checkpoint.vocabulary import Vocabulary
    from mediator_cli.plan.tokens.match import VocabularyPlan

_TOKEN_SETTING = re.compile(r"_token_ids?$|_token_index$")
_INSIDE = "text_config"
CONFIG, GENERATION = "config.json", "generation_config.json"


def is_token_setting(name: str) -> bool:
    """Whether a setting names tokens by id, and so goes with the tokenizer.

    >>> is_token_setting("eos_token_id"), is_token_setting("image_token_index"), is_token_setting("hidden_size")
    (True, True, False)
    """
    return _TOKEN_SETTING.search(name) is not None


def find_token_settings(base: Checkpoint, winner: Path, vocabulary: VocabularyPlan) -> TokenSettings:
    """Take token ids from the folder `winner` where it has them, else from the base, by the token's text.

    Then eos, bos and pad are made those of the tokenizer, where it has a row for them.
    """
    notices: list[str] = []
    ids = _Ids(vocabulary, notices)
    config = _config(base.config, {} if winner == base.path else _read(winner / CONFIG) or {}, ids)
    generation = None if winner == base.path else _read(winner / GENERATION)
    if generation is None and (own := _read(base.path / GENERATION)) is not None:
        generation = ids.translated(own, GENERATION)
    if generation is not None:
        generation = ids.agreeing(generation, GENERATION, needs_eos=True)
    config = ids.agreeing(config, CONFIG, needs_eos=generation is None)
    if isinstance(config.get(_INSIDE), dict):
        config[_INSIDE] = ids.agreeing(config[_INSIDE], f"{CONFIG} {_INSIDE}", needs_eos=False)
    return TokenSettings(config, generation, tuple(dict.fromkeys(notices)))


def _read(file: Path) -> dict[str, Any] | None:
    return read_json(file) if file.is_file() else None


def _config(base: Mapping[str, Any], winner: Mapping[str, Any], ids: _Ids) -> dict[str, Any]:
    config = ids.translated(base, CONFIG, winner)
    inside, theirs = base.get(_INSIDE), winner.get(_INSIDE, winner)
    if isinstance(inside, dict):
        config[_INSIDE] = ids.translated(inside, f"{CONFIG} {_INSIDE}", theirs if isinstance(theirs, dict) else {})
    return config


@dataclass(frozen=True)
class _Ids:
    """Ids of the base as ids of the output; what is worth knowing goes to `notices`."""

    vocabulary: VocabularyPlan
    notices: list[str]

    def translated(
        self, settings: Mapping[str, Any], file: str, winner: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Give a level of settings the winner's token ids, or its own by text, and the output's number of rows."""
        theirs = {name: value for name, value in (winner or {}).items() if is_token_setting(name)}
        own = {
            name: self._translate(f"{file} {name}", value)
            for name, value in settings.items()
            if is_token_setting(name) and name not in theirs
        }
        rows = {"vocab_size": self.vocabulary.n_rows} if self.vocabulary.rows and "vocab_size" in settings else {}
        return {**settings, **own, **theirs, **rows}

    def _translate(self, place: str, value: object) -> object:
        if isinstance(value, list):
            return [found for item in value if (found := self._translate(place, item)) is not None]
        base, output = self.vocabulary.base, self.vocabulary.output
        if base is None or output is None or isinstance(value, bool) or not isinstance(value, int):
            return value
        text = base.texts.get(value)
        found = output.tokens.get(text) if text is not None else (None if value in output.texts else value)
        if found is None:
            self.notices.append(f"{place}: {value} ({text or 'a reserved row'}) is no token of the output: left out")
        return found

    def agreeing(self, settings: Mapping[str, Any], file: str, *, needs_eos: bool) -> dict[str, Any]:
        """Make eos, bos and pad those of the output's tokenizer where they are set, and eos where it is needed."""
        changed = {}
        for role, number, text in _roles(self.vocabulary.output, self.vocabulary.n_rows):
            name = f"{role}_token_id"
            old = settings.get(name)
            is_wanted = old is not None or (needs_eos and role == "eos")
            if is_wanted and number not in (old if isinstance(old, list) else [old]):
                # Generation stops at each eos of a list, so the old one may stay.
                others = old if isinstance(old, list) else [old] if old is not None and file == GENERATION else []
                changed[name] = [number, *others] if role == "eos" and others else number
                said = "is not set" if old is None else f"is {old}"
                self.notices.append(
                    f"{file}: {name} {said}, the tokenizer's {text} is {number}; it becomes {changed[name]}"
                )
        return {**settings, **changed}


def _roles(output: Vocabulary | None, n_rows: int | None) -> Iterator[tuple[str, int, str]]:
    """Give role, id and text of the tokenizer's eos, bos and pad, those with a row."""
    for role in ("eos", "bos", "pad"):
        number = output.role_id(role) if output else None
        if output is not None and number is not None and (n_rows is None or number < n_rows):
            yield role, number, output.texts[number]
