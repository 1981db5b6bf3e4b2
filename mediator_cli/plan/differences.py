"""Settings in which the sources differ, and who wins: config, generation config, tokenizer, chat template."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

from mediator_cli.checkpoint.header import read_json
from mediator_cli.plan.model import Difference
from mediator_cli.plan.tokens.settings import CONFIG, GENERATION, is_token_setting

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from mediator_cli.plan.model import TokenSettings
    from mediator_cli.recipe.schema import Recipe

_NOT_BEHAVIOUR = {"transformers_version", "torch_dtype", "dtype", "use_cache", "architectures"}
_ABSENT = "(absent)"


def find_differences(folders: Mapping[str, Path], recipe: Recipe, written: TokenSettings) -> Iterator[Difference]:
    """Compare the side files of all sources with what is written; `folders` has the base first."""
    configs = {name: _json(folder / CONFIG) for name, folder in folders.items()}
    full = {name: config for name, config in configs.items() if config}
    winner = recipe.tokenizer_of if recipe.tokenizer_of in full else "base"
    for setting in _settings(full):
        owner = winner if is_token_setting(setting) else "base"
        owner = recipe.tokenizer.removeprefix("expert:") if setting == "vocab_size" else owner
        yield from _differing(setting, owner, written.config, full)
    generation = {name: _json(folder / GENERATION) for name, folder in folders.items() if name in full}
    for setting in _settings(generation):
        label = f"generation_config.{setting}"
        yield from _differing(setting, winner, written.generation or {}, generation, label)
    for label, read in (("tokenizer", _tokenizer_digest), ("chat_template", _chat_template)):
        values = {name: value for name, folder in folders.items() if (value := read(folder)) is not None}
        if recipe.tokenizer_of in values:
            yield from _differing(
                label,
                recipe.tokenizer_of,
                {label: values[recipe.tokenizer_of]},
                {name: {label: value} for name, value in values.items()},
            )


def _json(file: Path) -> dict[str, Any]:
    return read_json(file) if file.is_file() else {}


def _settings(configs: Mapping[str, Mapping[str, Any]]) -> list[str]:
    names = dict.fromkeys(name for config in configs.values() for name in config)
    # What starts with an underscore is the library's own note, such as where the config came from.
    return [name for name in names if name not in _NOT_BEHAVIOUR and not name.startswith("_")]


def _differing(
    setting: str, winner: str, written: Mapping[str, Any], sources: Mapping[str, Mapping[str, Any]], label: str = ""
) -> Iterator[Difference]:
    value = written.get(setting, _ABSENT)
    values = {name: source.get(setting, _ABSENT) for name, source in sources.items()}
    if others := {name: other for name, other in values.items() if other != value}:
        yield Difference(label or setting, winner, value, others)


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
