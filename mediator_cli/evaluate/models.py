"""What can be evaluated: model folders, LoRA adapters on a base, bundles and their experts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from mediator_cli.bundle.manifest import MANIFEST, read_manifest
from mediator_cli.checkpoint.adapter import open_adapter
from mediator_cli.checkpoint.source import find_folder, is_adapter, open_checkpoint, side_files, weight_files
from mediator_cli.errors import CheckpointError, MediatorError, Problem, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from mediator_cli.bundle.manifest import Manifest

Kind = Literal["model", "adapter", "bundle"]
ROUTED, DENSE, ORACLE = "", "dense", "oracle"


@dataclass(frozen=True)
class Candidate:
    """One thing to evaluate, as the user named it.

    `part` of a bundle is an expert's name, DENSE, ORACLE (the expert named like the task) or ROUTED. `n_bytes` on disk
    are those that it needs: an adapter its base, an expert of a bundle the dense expert and its own sparse file.
    """

    name: str
    path: Path
    kind: Kind
    part: str = ROUTED
    base: Path | None = None
    n_bytes: int = 0

    def mixture(self, task: str) -> str | None:
        """Say which mixture answers a task: None where a router decides, or where nothing is mixed."""
        if self.kind != "bundle" or self.part in (ROUTED, DENSE):
            return None
        return task if self.part == ORACLE else self.part


def find_candidates(names: Sequence[str], tasks: Sequence[str], base: Path | None = None) -> tuple[Candidate, ...]:
    """Look at every `PATH` or `BUNDLE::PART` from headers and manifests alone.

    Raises MediatorError with all problems: folders that hold no model, unknown parts, adapters without base.
    """
    problems: list[Problem] = []
    found: list[Candidate] = []
    for name in dict.fromkeys(names):
        try:
            found.append(_candidate(name, tasks, base))
        except MediatorError as error:
            problems += error.problems
    if problems:
        raise CheckpointError(list(dict.fromkeys(problems)))
    return tuple(found)


def _candidate(name: str, tasks: Sequence[str], base: Path | None) -> Candidate:
    text, _, part = name.partition("::")
    path = find_folder(text, Path(text).absolute())
    if (path / MANIFEST).is_file():
        return _bundle(name, path, tasks)
    if "::" in name:
        message = f"is no bundle, so it has no part '{part}'"
        raise CheckpointError(Problem(text, message, "name the folder alone"))
    if not is_adapter(path):
        return Candidate(name, path, "model", n_bytes=_weight_bytes(path))
    if base is None:
        raise CheckpointError(Problem(text, "is an adapter", "give its base: --base DIR"))
    adapter = open_adapter(path, open_checkpoint(base).tensors)
    return Candidate(name, path, "adapter", base=base, n_bytes=_weight_bytes(base) + adapter.file.stat().st_size)


def _weight_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in weight_files(open_checkpoint(folder).tensors))


def _bundle(name: str, path: Path, tasks: Sequence[str]) -> Candidate:
    folder, _, part = name.partition("::")
    manifest = read_manifest(path)
    problems = list(_part_problems(folder, part, manifest, tasks))
    if problems:
        raise CheckpointError(problems)
    return Candidate(name, path, "bundle", part, n_bytes=_weight_bytes(path) + _beside_dense(manifest, part))


def _part_problems(folder: str, part: str, manifest: Manifest, tasks: Sequence[str]) -> Iterator[Problem]:
    experts = [source.name for source in manifest.experts]
    if part == ROUTED and manifest.sparse and manifest.router is None:
        hint = f"`mediator fit-router {folder}`, or name a part: {folder}::{experts[0]}, ::{DENSE}, ::{ORACLE}"
        yield Problem(folder, "has no router", hint)
    if part == ORACLE:
        for task in tasks:
            if task not in experts:
                yield Problem(f"{folder}::{ORACLE}", f"no expert is named like the task '{task}'", _list(experts))
    elif part not in (ROUTED, DENSE, *experts):
        yield Problem(f"{folder}::{part}", "no such part", did_you_mean(part, [*experts, DENSE, ORACLE]))


def _list(experts: Sequence[str]) -> str:
    return f"the experts are {', '.join(experts)}; a task is named by its file"


def _beside_dense(manifest: Manifest, part: str) -> int:
    """Count the bytes that a part needs beside the dense expert."""
    sparse = sum(r.file.bytes for r in manifest.sparse if part in (ROUTED, ORACLE, r.expert))
    router = manifest.router.file.bytes if manifest.router is not None and part == ROUTED else 0
    return sparse + router


def load_candidate(candidate: Candidate) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model and its tokenizer; raise BundleError or CheckpointError when it is damaged."""
    from mediator_cli.runtime.open import load_dense, open_bundle
    from mediator_cli.runtime.prompts import load_tokenizer

    if candidate.kind == "bundle" and candidate.part != DENSE:
        return open_bundle(candidate.path), load_tokenizer(candidate.path)
    if candidate.base is None:
        return load_dense(candidate.path), load_tokenizer(candidate.path)
    model = load_dense(candidate.base)
    _add_adapter(model, candidate.path, candidate.base)
    return model, load_tokenizer(candidate.path if side_files(candidate.path) else candidate.base)


def _add_adapter(model: PreTrainedModel, folder: Path, base: Path) -> None:
    """Add scale · B·A to each tensor that the adapter changes, as a merge reads it: in float32, rounded once."""
    from mediator_cli.checkpoint.read import AdapterReader, FullReader, open_files

    tensors = open_checkpoint(base).tensors
    adapter = open_adapter(folder, tensors)
    parameters = dict(model.named_parameters())
    with open_files([*weight_files(tensors), adapter.file]) as descriptors:
        reader = AdapterReader(FullReader(descriptors, tensors), descriptors, adapter)
        for name in adapter.factors:
            if name not in parameters:
                message = "transformers loads this tensor under another name"
                hint = "merge the adapter with PEFT's merge_and_unload and name that folder"
                raise CheckpointError(Problem(f"{folder}: {name}", message, hint))
            data = reader.read(name, 0, tensors[name].size).view(tensors[name].shape)
            parameters[name].data.copy_(data)
