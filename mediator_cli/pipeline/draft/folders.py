"""Folders of experts among the sources of a draft: each expert by itself, and the folder that the recipe may name."""

from __future__ import annotations

import re
from pathlib import Path, PurePath
from typing import TYPE_CHECKING

from mediator_cli.recipe.collections import expert_folders
from mediator_cli.recipe.names import LEGAL_NAME, check_expert_names

if TYPE_CHECKING:
    from collections.abc import Sequence


def each_expert(sources: Sequence[str]) -> list[tuple[str, str]]:
    """Put the experts in a folder in its place, each with that folder; "" for a source that is one by itself."""
    found: list[tuple[str, str]] = []
    for source in sources:
        names = expert_folders(Path(source)) if Path(source).is_dir() else []
        found += [(f"{source.rstrip('/')}/{name}", source) for name in names] or [(source, "")]
    return found


def names_in_folders(names: Sequence[str], sources: Sequence[str], folders: Sequence[str]) -> tuple[str, ...] | None:
    """Name the experts of folders after their own, as `from` does, others by `names`; None where that cannot be."""
    own = [
        PurePath(source).name if folder else name for name, source, folder in zip(names, sources, folders, strict=True)
    ]
    try:
        check_expert_names(own)
    except ValueError:
        return None
    return tuple(own) if all(re.fullmatch(LEGAL_NAME, name) for name in own) else None
