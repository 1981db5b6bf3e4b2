"""Open base and experts and check that they belong together. Headers and configs only."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from mediator_cli.checkpoint.adapter import Adapter, open_adapter
from mediator_cli.checkpoint.header import FLOAT_DTYPES
from mediator_cli.checkpoint.layout import missing_layers
from mediator_cli.checkpoint.source import Checkpoint, find_folder, is_adapter, open_checkpoint
from mediator_cli.errors import CheckpointError, Problem
from mediator_cli.plan.model import ExpertSource

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mediator_cli.recipe.load import LoadedRecipe
    from mediator_cli.recipe.schema import ExpertSpec

_HEAD = "lm_head.weight"
_SHOWN = 3


def open_base(loaded: LoadedRecipe) -> Checkpoint:
    """Open the base; raise CheckpointError with the recipe's line in front of each problem."""
    place = loaded.place("base")
    try:
        folder = find_folder(loaded.recipe.base, loaded.resolve(loaded.recipe.base))
        base = without_tied_head(open_checkpoint(folder))
    except CheckpointError as error:
        raise CheckpointError(_at(place, error)) from None
    if fault := missing_layers(base.tensors, base.config):
        hint = "is the checkpoint complete?"
        raise CheckpointError(Problem(f"{place}: {folder}", fault, hint))
    return base


def open_experts(loaded: LoadedRecipe, base: Checkpoint) -> tuple[list[ExpertSource], list[Problem]]:
    """Open all experts and fit them to the base; give those that fit and all problems of the others."""
    experts: list[ExpertSource] = []
    problems: list[Problem] = []
    for index, spec in enumerate(loaded.recipe.experts):
        place = loaded.place("experts", index, "model")
        prompts = loaded.resolve(spec.prompts) if spec.prompts else None
        try:
            source = _open_expert(loaded, spec, base)
        except CheckpointError as error:
            problems += _at(place, error)
            continue
        problems += [] if isinstance(source, Adapter) else _compare(place, base, source)
        experts.append(ExpertSource(spec.name, spec.weight, source, prompts))
    return experts, problems


def check_experts_alone(loaded: LoadedRecipe) -> Iterator[Problem]:
    """Say what is wrong with the experts' folders where there is no base to compare them with."""
    for index, spec in enumerate(loaded.recipe.experts):
        try:
            folder = find_folder(spec.model, loaded.resolve(spec.model))
            if not is_adapter(folder):
                open_checkpoint(folder)
        except CheckpointError as error:
            yield from _at(loaded.place("experts", index, "model"), error)


def _open_expert(loaded: LoadedRecipe, spec: ExpertSpec, base: Checkpoint) -> Checkpoint | Adapter:
    folder = find_folder(spec.model, loaded.resolve(spec.model))
    if is_adapter(folder):
        return open_adapter(folder, base.tensors)
    return without_tied_head(open_checkpoint(folder))


def _at(place: str, error: CheckpointError) -> list[Problem]:
    return [Problem(f"{place}: {item.place}", item.message, item.hint) for item in error.problems]


def without_tied_head(checkpoint: Checkpoint) -> Checkpoint:
    """Leave out a stored copy of the head where the config ties it to the input embeddings."""
    if not checkpoint.is_tied or _HEAD not in checkpoint.tensors or len(checkpoint.tensors) == 1:
        return checkpoint
    kept = {name: info for name, info in checkpoint.tensors.items() if name != _HEAD}
    return replace(checkpoint, tensors=kept)


def _compare(place: str, base: Checkpoint, expert: Checkpoint) -> Iterator[Problem]:
    ours, theirs = base.config.get("model_type"), expert.config.get("model_type")
    if ours != theirs:
        hint = "all experts must be fine-tunes of the base"
        yield Problem(f"{place}: {expert.path}", f"other architecture: model_type {theirs}, the base is {ours}", hint)
        return
    if missing := [name for name in base.tensors if name not in expert.tensors]:
        yield Problem(f"{place}: {expert.path}", f"lacks tensor {_some(missing)}", "is the checkpoint complete?")
    if extra := [name for name in expert.tensors if name not in base.tensors]:
        hint = "is the head untied? tie_word_embeddings must be as in the base" if extra == [_HEAD] else _FINE_TUNE
        yield Problem(f"{place}: {expert.path}", f"has tensor {_some(extra)}, which the base lacks", hint)
    for name, info in expert.tensors.items():
        mine = base.tensors.get(name)
        if mine is not None and mine.shape != info.shape:
            message = f"shape {list(info.shape)}, the base has {list(mine.shape)}"
            yield Problem(f"{place}: {expert.path} {name}", message, _shape_hint(mine.shape, info.shape))
        if mine is not None and (mine.dtype in FLOAT_DTYPES) != (info.dtype in FLOAT_DTYPES):
            message = f"dtype {info.dtype}, the base has {mine.dtype}"
            yield Problem(f"{place}: {expert.path} {name}", message, _FINE_TUNE)


_FINE_TUNE = "all experts must be fine-tunes of the base"


def _shape_hint(ours: tuple[int, ...], theirs: tuple[int, ...]) -> str:
    if len(ours) == len(theirs) == 2 and ours[1] == theirs[1]:
        return "was the vocabulary changed? resize the embeddings to the base's number of tokens"
    return _FINE_TUNE


def _some(names: list[str]) -> str:
    rest = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + rest
