"""A folder with all that `mediator compare` needs: base, adapters as PEFT writes them, rows, and a recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import save_file
from tiny_library import TASKS, random_change, toy_task, write_base

from mediator_cli.evaluate.tasks import Row
from mediator_cli.strategies.library import Change


def write_adapter_of(folder: Path, change: Change, **config: Any) -> Path:
    """Write what an expert adds as a LoRA adapter with scaling 1."""
    tensors = {}
    for name, delta in change.items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        tensors[f"{module}.lora_A.weight"] = delta.a.contiguous()
        tensors[f"{module}.lora_B.weight"] = delta.b.contiguous()
    rank = len(next(iter(change.values())).a)
    facts = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "base_model_name_or_path": "base", "bias": "none"}
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(facts | config))
    return folder


def write_rows_of(file: Path, rows: tuple[Row, ...]) -> None:
    """Write rows as JSON lines."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row.model_dump(exclude_none=True)) + "\n" for row in rows))


def write_contest(folder: Path, n_experts: int = 3, n_rows: int = 6, n_held_out: int = 1, **fields: Any) -> Path:
    """Write base, adapters, rows and recipe.yaml into a folder; give the recipe."""
    write_base(folder / "base")
    for at, name in enumerate(TASKS[:n_experts]):
        write_adapter_of(folder / "adapters" / name, random_change(at))
    for at, name in enumerate(TASKS[: n_experts + n_held_out]):
        task = toy_task(name, n_rows, is_held_out=at >= n_experts, train=8)
        for part in ("valid", "test") if task.is_held_out else ("train", "valid", "test"):
            write_rows_of(folder / "data" / f"{name}.{part}.jsonl", getattr(task, part))
    return write_recipe(folder, **fields)


def write_recipe(folder: Path, **fields: Any) -> Path:
    """Write a recipe of kind compare for what lies in a folder."""
    data = {
        "version": 1,
        "kind": "compare",
        "base": "./base",
        "experts": {"from": "./adapters"},
        "tasks": {"from": "./data"},
        "strategies": ["merge_uniform", {"name": "merge_uniform", "label": "twice", "scale": 2.0}],
        "output": {"path": "./results"},
    }
    file = folder / "recipe.yaml"
    file.write_text(
        yaml.safe_dump({key: value for key, value in (data | fields).items() if value is not None}, sort_keys=False)
    )
    return file
