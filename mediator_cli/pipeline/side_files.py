"""What stands beside the weights: config, generation config, tokenizer, chat template, model card."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import yaml

from mediator_cli.checkpoint.header import read_json
from mediator_cli.pipeline.tokenizer import write_tokenizer
from mediator_cli.plan.tokens.settings import CONFIG, GENERATION

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from mediator_cli.plan.model import Plan


def write_side_files(plan: Plan, folder: Path) -> None:
    """Write config, generation config and tokenizer of the dense expert, which agree in their token ids."""
    write_json(folder / CONFIG, _config(plan))
    if plan.settings.generation is not None:
        _write_generation(plan, plan.settings.generation, folder / GENERATION)
    write_tokenizer(plan, folder)


def _write_generation(plan: Plan, settings: Mapping[str, Any], target: Path) -> None:
    """Write the generation config; byte for byte where a source has the same one."""
    files = [owner / GENERATION for owner in (plan.tokenizer_folder, plan.base.path)]
    same = next((file for file in files if file.is_file() and read_json(file) == settings), None)
    if same is None:
        write_json(target, settings)
    else:
        shutil.copyfile(same, target)


def _config(plan: Plan) -> dict[str, Any]:
    config = dict(plan.settings.config)
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
