"""Names for what was computed, so that it is found again, and not found when anything that made it has changed."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

from mediator_cli.checkpoint.source import weight_files

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from mediator_cli.compare.variants import Model
    from mediator_cli.plan.model import Plan

_READ = (".safetensors", ".json", ".jinja", ".model", ".txt")
"""The files of a model folder that weights, tokenizers and settings are read from."""

_WITHOUT_EFFECT: Any = {"router": True, "output": {"path", "shard_size"}, "experts": {"__all__": {"prompts"}}}
"""Fields of a recipe that change no score once the mixture of a row is given."""


def model_key(plan: Plan, model: Model) -> str:
    """Name the base, the experts' own models, or the bundle of a plan by recipe and sources."""
    if model != "bundle":
        return _digest([model, _files(plan)])
    # Defaults are resolved here: a program with others makes another bundle of the same recipe.
    resolved = [(t.name, repr(t.extract), t.average and t.average.key) for t in plan.tensors]
    return _digest([model, plan.loaded.recipe.model_dump_json(exclude=_WITHOUT_EFFECT), resolved, _files(plan)])


def conflict_key(plan: Plan) -> str:
    """Name the conflict report of a plan by experts, denoising and sources."""
    names = [expert.name for expert in plan.experts]
    recipe = plan.loaded.recipe
    align = recipe.align and [recipe.align.model_dump_json(), recipe.seed]
    return _digest([names, recipe.conflict.model_dump_json(), align, _files(plan)])


def _digest(data: Any) -> str:  # noqa: ANN401 - any JSON
    return hashlib.sha256(json.dumps(data).encode()).hexdigest()[:16]


def _files(plan: Plan) -> list[tuple[str, int, int]]:
    """List names, sizes and times of all source files."""
    folders = (plan.base.path, *(e.source.path for e in plan.experts))
    beside = [file for e in plan.experts if e.moments for file in weight_files(e.moments.tensors)]
    return [_facts(file) for file in (*(file for folder in folders for file in _read_from(folder)), *beside)]


def _read_from(folder: Path) -> Iterator[Path]:
    yield from (file for file in sorted(folder.iterdir()) if file.suffix in _READ and file.is_file())


def _facts(file: Path) -> tuple[str, int, int]:
    return file.name, file.stat().st_size, file.stat().st_mtime_ns
