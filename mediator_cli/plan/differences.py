"""Settings in which the sources differ, and who wins: config, generation config, tokenizer, chat template."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

from mediator_cli.checkpoint.header import read_json
from mediator_cli.plan.model import Difference

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

_NOT_BEHAVIOUR = {"_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache", "architectures"}
TOKEN_SETTINGS = ("bos_token_id", "eos_token_id", "pad_token_id")
"""Config settings that go with the tokenizer, not with the base."""
_ABSENT = "(absent)"


def find_differences(folders: Mapping[str, Path], tokenizer_of: str) -> Iterator[Difference]:
    """Compare the side files of all sources; `folders` has the base first, `tokenizer_of` wins for the tokenizer."""
    configs = {name: _json(folder / "config.json") for name, folder in folders.items()}
    full = {name: config for name, config in configs.items() if config}
    for setting in _settings(full):
        winner = tokenizer_of if setting in TOKEN_SETTINGS and tokenizer_of in full else "base"
        yield from _differing(setting, winner, {name: config.get(setting, _ABSENT) for name, config in full.items()})
    generation = {name: _json(folder / "generation_config.json") for name, folder in folders.items() if name in full}
    for setting in _settings(generation):
        values = {name: config.get(setting, _ABSENT) for name, config in generation.items()}
        winner = tokenizer_of if tokenizer_of in full else "base"
        yield from _differing(f"generation_config.{setting}", winner, values)
    for label, read in (("tokenizer", _tokenizer_digest), ("chat_template", _chat_template)):
        values = {name: value for name, folder in folders.items() if (value := read(folder)) is not None}
        if tokenizer_of in values:
            yield from _differing(label, tokenizer_of, values)


def _json(file: Path) -> dict[str, Any]:
    return read_json(file) if file.is_file() else {}


def _settings(configs: Mapping[str, Mapping[str, Any]]) -> list[str]:
    names = dict.fromkeys(name for config in configs.values() for name in config)
    return [name for name in names if name not in _NOT_BEHAVIOUR]


def _differing(setting: str, winner: str, values: Mapping[str, Any]) -> Iterator[Difference]:
    others = {name: value for name, value in values.items() if value != values[winner]}
    if others:
        yield Difference(setting, winner, values[winner], others)


def _tokenizer_digest(folder: Path) -> str | None:
    files = [folder / name for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")]
    found = next((file for file in files if file.is_file()), None)
    return None if found is None else f"{found.name} {hashlib.sha256(found.read_bytes()).hexdigest()[:12]}"


def _chat_template(folder: Path) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        text = file.read_text(encoding="utf-8")
    else:
        text = json.dumps(_json(folder / "tokenizer_config.json").get("chat_template"))
    return None if text == "null" else f"sha256 {hashlib.sha256(text.encode()).hexdigest()[:12]}"
