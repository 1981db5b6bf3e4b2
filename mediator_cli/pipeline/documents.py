"""Several merges in one file, each in its turn: later ones read what earlier ones wrote."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mediator_cli.bundle.manifest import MANIFEST, read_manifest
from mediator_cli.checkpoint.hub.collections import collection_lister
from mediator_cli.checkpoint.remote.url import is_url
from mediator_cli.errors import MediatorError, OutputError, Problem, RecipeError
from mediator_cli.pipeline.download import plan_with_unseen
from mediator_cli.pipeline.merge import merge
from mediator_cli.pipeline.record import recipe_digest
from mediator_cli.recipe.documents import read_steps
from mediator_cli.recipe.load import load_partly

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mediator_cli.checkpoint.hub.find import Access
    from mediator_cli.pipeline.settings import Settings
    from mediator_cli.recipe.documents import Step
    from mediator_cli.recipe.load import LoadedRecipe


def load_last(
    path: Path, changes: Sequence[str], output: str | None, access: Access, settings: Settings, *, alone: bool = True
) -> LoadedRecipe:
    """Read a recipe; of a file with several merges carry out all but the last, and give that.

    The others are written to a folder beside the output, named after it, each under its own name. With `resume` those
    that stand there are not merged again. `changes` are for the last. Only a process that works `alone` does it.
    """
    steps = read_steps(path)
    if len(steps) == 1:
        return load_partly(path, changes, collection_lister(access))
    if not alone:
        message = "a file with several merges is carried out by one process"
        raise OutputError(Problem("--executor", message, "leave it out, or write one recipe a file"))
    if output is not None and is_url(output):
        message = "a file with several merges needs a folder to write the earlier ones beside"
        raise OutputError(Problem("--output", message, "merge into a folder, then copy it"))
    target = Path(output).absolute() if output is not None else Path.cwd() / path.stem
    folder = target.with_name(f"{target.name}.steps")
    folders = {str(step.name): folder / str(step.name) for step in steps[:-1]}
    for step, loaded in zip(steps[:-1], _load_all(steps, folders, changes), strict=False):
        name = str(step.name)
        if not (settings.resume and _is_made(folder / name, loaded)):
            settings.notify(f"merging {name} into {folder / name}")
            plan = plan_with_unseen(loaded, access, settings.progress)
            for notice in plan.notices:
                settings.notify(notice)
            merge(plan, folder / name, settings=settings)
    return steps[-1].load(folders, changes)


def _load_all(steps: Sequence[Step], folders: Mapping[str, Path], changes: Sequence[str]) -> list[LoadedRecipe]:
    """Read every merge before the first is carried out; raise RecipeError with the faults of form in any of them."""
    found: list[LoadedRecipe] = []
    problems: list[Problem] = []
    for step in steps:
        try:
            found.append(step.load(folders, changes if step is steps[-1] else ()))
            problems += found[-1].problems
        except MediatorError as error:
            problems += error.problems
    if problems:
        raise RecipeError(problems)
    return found


def _is_made(folder: Path, loaded: LoadedRecipe) -> bool:
    """Whether a folder holds what a recipe asks for."""
    try:
        return (folder / MANIFEST).is_file() and read_manifest(folder).recipe.sha256 == recipe_digest(loaded)
    except MediatorError:
        return False
