"""The output's tokenizer: the winner's files as they are, or with the tokens that experts add."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

from mediator_cli.checkpoint.header import read_json
from mediator_cli.checkpoint.source import side_files
from mediator_cli.checkpoint.vocabulary import (
    ADDED_TOKENS,
    EXTRA_TOKENS,
    SPECIAL_TOKENS,
    TOKENIZER_CONFIG,
    TOKENIZER_JSON,
    is_tokenizer_file,
)

if TYPE_CHECKING:
    from pathlib import Path

    from mediator_cli.checkpoint.vocabulary import Vocabulary
    from mediator_cli.plan.model import Plan


def write_tokenizer(plan: Plan, folder: Path) -> None:
    """Copy tokenizer and chat templates of the source that the recipe names, all else that is beside weights from base.

    Tokens that experts add go behind the base's.
    """
    winner = plan.tokenizer_folder
    owner = winner if any(map(is_tokenizer_file, side_files(winner))) else plan.base.path
    _copy(plan.base.path, [file for file in side_files(plan.base.path) if not is_tokenizer_file(file)], folder)
    _copy(owner, [file for file in side_files(owner) if is_tokenizer_file(file)], folder)
    if plan.union is not None:
        add_tokens(folder, plan.union)
    if plan.chat_template is not None:
        _write_template(folder, plan.chat_template)


def _write_template(folder: Path, text: str) -> None:
    """Write the chat template, and leave no other one beside it."""
    (folder / "chat_template.json").unlink(missing_ok=True)
    (folder / "chat_template.jinja").write_text(text, encoding="utf-8")
    config = _existing(folder / TOKENIZER_CONFIG)
    if config is not None and "chat_template" in config:
        _rewrite(folder / TOKENIZER_CONFIG, {name: value for name, value in config.items() if name != "chat_template"})


def _copy(owner: Path, files: list[Path], folder: Path) -> None:
    for file in files:
        target = folder / file.relative_to(owner)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)


def add_tokens(folder: Path, vocabulary: Vocabulary) -> None:
    """Put all added tokens of a vocabulary that tokenizer files lack into them, with their ids and flags."""
    tokens = sorted(vocabulary.added.values(), key=lambda token: token.id)
    data = read_json(folder / TOKENIZER_JSON)
    listed = data.get("added_tokens") or []
    known = {entry["content"] for entry in listed}
    new = [token for token in tokens if token.content not in known]
    data["added_tokens"] = [*listed, *({"id": t.id, "content": t.content, **t.flags} for t in new)]
    _rewrite(folder / TOKENIZER_JSON, data)
    config = _existing(folder / TOKENIZER_CONFIG)
    if config is not None:
        decoder = config.get("added_tokens_decoder")
        if isinstance(decoder, dict):
            decoder |= {str(t.id): {"content": t.content, **t.flags} for t in new if str(t.id) not in decoder}
        # Before transformers 5, extra_special_tokens was a mapping of roles.
        default = EXTRA_TOKENS[1] if isinstance(decoder, dict) else EXTRA_TOKENS[0]
        _rewrite(folder / TOKENIZER_CONFIG, _with_extra(config, vocabulary.extra, default))
    special = _existing(folder / SPECIAL_TOKENS)
    if special is not None:
        _rewrite(folder / SPECIAL_TOKENS, _with_extra(special, vocabulary.extra, None))
    added = _existing(folder / ADDED_TOKENS)
    if added is not None:
        _rewrite(folder / ADDED_TOKENS, {**added, **{t.content: t.id for t in new if t.content not in added}})


def _existing(file: Path) -> dict[str, Any] | None:
    return read_json(file) if file.is_file() else None


def _with_extra(config: dict[str, Any], extra: tuple[str, ...], default: str | None) -> dict[str, Any]:
    """Name the special tokens without a role where a file lists them, or else in the field `default`."""
    name = next((name for name in EXTRA_TOKENS if name in config), default)
    if name is None or not isinstance(config.get(name, []), list):
        return config
    listed = config.get(name, [])
    known = {entry["content"] if isinstance(entry, dict) else entry for entry in listed}
    new = [text for text in extra if text not in known]
    return {**config, name: [*listed, *new]} if new else config


def _rewrite(file: Path, data: dict[str, Any]) -> None:
    """Write JSON in the form that the file has: indented or in one line, so that it does not grow."""
    is_indented = file.read_text(encoding="utf-8").startswith("{\n")
    form = {"indent": 2} if is_indented else {"separators": (",", ":")}
    file.write_text(json.dumps(data, ensure_ascii=False, **form) + "\n", encoding="utf-8")
