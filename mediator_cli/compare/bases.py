"""Whether adapters were trained on the base at hand, where they tell: by the digests of its files or tensors."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from mediator_cli.bundle.adapter import ADAPTER_MANIFEST, AdapterManifest
from mediator_cli.bundle.digest import digest_tensors
from mediator_cli.bundle.manifest import read_record
from mediator_cli.checkpoint.adapter.open import Adapter
from mediator_cli.checkpoint.digest import Digests
from mediator_cli.checkpoint.header import read_json
from mediator_cli.checkpoint.source import open_checkpoint
from mediator_cli.errors import MediatorError, Problem
from mediator_cli.pipeline.record import commit_of
from mediator_cli.pipeline.sources import changed_sources, source_files

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from mediator_cli.bundle.record import SourceFile
    from mediator_cli.checkpoint.header import TensorInfo
    from mediator_cli.pipeline.settings import Settings
    from mediator_cli.plan.model import Plan
    from mediator_cli.recipe.compare import LoadedCompare

_COMMIT = re.compile(r"[0-9a-f]{40}")


def other_bases(loaded: LoadedCompare, plan: Plan, files: Sequence[SourceFile], run: Settings) -> Iterator[Problem]:
    """Tell of adapters that were trained on other numbers than the base's, whose weight files are `files`.

    Those that tell nothing, or nothing that can be compared, are let pass.
    """
    compared: dict[str, str | None] = {}
    for index, expert in enumerate(plan.experts):
        if not isinstance(expert.source, Adapter):
            continue
        difference = _by_record(expert.source.path, plan, files) or _by_revision(expert.source.path, plan)
        if difference is None and (named := expert.source.base_name):
            if named not in compared:
                compared[named] = _by_folder(Path(named), plan, files, run)
            difference = compared[named]
        if difference is not None:
            hint = "name the base that it was trained on, or train it again on this one"
            message = f"{expert.name} was trained on another base: {difference}"
            yield Problem(loaded.place("experts", index, "model"), message, hint)


def _by_record(folder: Path, plan: Plan, files: Sequence[SourceFile]) -> str | None:
    """Compare with what an adapter that was made here notes of its base: the digests of its weight files."""
    file = folder / ADAPTER_MANIFEST
    if not file.is_file():
        return None
    try:
        noted = read_record(file, AdapterManifest, "manifest of an adapter").base
    except MediatorError:
        return None
    own = {each.name: each for each in files}
    for each in noted.files:
        # Files of other names are the same tensors cut otherwise, for all that is known.
        if each.name in own and changed_sources({"x": (each,)}, {"x": (own[each.name],)}):
            return f"{each.name} of its base has the digest {each.digest[:12]}, here it is {own[each.name].digest[:12]}"
    return _revisions(noted.revision, commit_of(plan.base.repo)) if not noted.files else None


def _by_revision(folder: Path, plan: Plan) -> str | None:
    """Compare commits, where PEFT noted one and the base is of the Hub."""
    return _revisions(read_json(folder / "adapter_config.json").get("revision"), commit_of(plan.base.repo))


def _revisions(noted: object, own: str | None) -> str | None:
    if own is None or not isinstance(noted, str) or not _COMMIT.fullmatch(noted) or noted == own:
        return None
    return f"commit {noted[:12]} of it, here it is {own[:12]}"


def _by_folder(folder: Path, plan: Plan, files: Sequence[SourceFile], run: Settings) -> str | None:
    """Compare with the base that an adapter names, where that lies here."""
    if not folder.is_dir() or folder.resolve() == plan.base.path.resolve():
        return None
    try:
        other = open_checkpoint(folder.absolute())
        theirs = source_files(replace(plan, base=other, experts=()), Digests(), run)["base"]
    except MediatorError:
        return None
    if not changed_sources({"x": tuple(files)}, {"x": theirs}) and all(each.digest for each in files):
        return None
    name = first_difference(plan.base.tensors, other.tensors)
    return None if name is None else f"{name} of {folder} is not the same as here"


def first_difference(one: Mapping[str, TensorInfo], other: Mapping[str, TensorInfo]) -> str | None:
    """Name the first tensor that differs in shape, dtype or any bit; None where two models are the same."""
    for name, info in one.items():
        if name not in other or (other[name].shape, other[name].dtype) != (info.shape, info.dtype):
            return name
    if more := [name for name in other if name not in one]:
        return more[0]
    ours, theirs = digest_tensors(one), digest_tensors(other)
    return next((name for name in ours if ours[name] != theirs[name]), None)
