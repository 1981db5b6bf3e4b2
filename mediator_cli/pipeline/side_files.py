"""What stands beside the weights: config, generation config, tokenizer, chat template, model card."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import yaml

from mediator_cli.checkpoint.header import read_json
from mediator_cli.checkpoint.source import side_files
from mediator_cli.plan.differences import TOKEN_SETTINGS

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from mediator_cli.plan.model import Plan


def write_side_files(plan: Plan, folder: Path) -> None:
    """Write the dense expert's config and copy the tokenizer files of the source that the recipe names."""
    winner = plan.tokenizer_folder
    write_json(folder / "config.json", _config(plan))
    generation = next((f for f in (winner, plan.base.path) if (f / "generation_config.json").is_file()), None)
    if generation is not None:
        shutil.copyfile(generation / "generation_config.json", folder / "generation_config.json")
    owner = winner if side_files(winner) else plan.base.path
    for file in side_files(owner):
        target = folder / file.relative_to(owner)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, target)


def _config(plan: Plan) -> dict[str, Any]:
    config = dict(plan.base.config)
    own = plan.tokenizer_folder / "config.json"
    if plan.tokenizer_folder != plan.base.path and own.is_file():
        other = read_json(own)
        config |= {name: other[name] for name in TOKEN_SETTINGS if name in other}
    if plan.loaded.recipe.output.dtype != "base":
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = plan.loaded.recipe.output.dtype
    return config


def write_json(file: Path, data: Mapping[str, Any]) -> None:
    """Write a JSON file as Hugging Face libraries do."""
    file.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def license_of(folder: Path) -> str | None:
    """Read the licence that a model folder's card declares; None where it declares none."""
    card = folder / "README.md"
    if not card.is_file():
        return None
    text = card.read_text(encoding="utf-8", errors="replace")
    head = text.split("\n---", 1)[0].removeprefix("---") if text.startswith("---") else ""
    try:
        facts = yaml.safe_load(head)
    except yaml.YAMLError:
        return None
    return str(facts["license"]) if isinstance(facts, dict) and facts.get("license") else None
