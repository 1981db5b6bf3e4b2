"""What can be evaluated: model folders, LoRA adapters on a base, bundles and their experts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from mediator_cli.bundle.manifest import MANIFEST, read_manifest
from mediator_cli.checkpoint.adapter.open import open_adapter
from mediator_cli.checkpoint.header import read_json
from mediator_cli.checkpoint.heterogeneous import is_heterogeneous
from mediator_cli.checkpoint.hub.find import ONLINE, Access
from mediator_cli.checkpoint.source import find_location, is_adapter, open_checkpoint, side_files, weight_files
from mediator_cli.errors import CheckpointError, MediatorError, Problem, did_you_mean
from mediator_cli.pipeline.download import download, far_files
from mediator_cli.pipeline.progress import silent

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from mediator_cli.bundle.manifest import Manifest
    from mediator_cli.checkpoint.adapter.open import Adapter
    from mediator_cli.checkpoint.source import Checkpoint, Location
    from mediator_cli.pipeline.download import FarFile
    from mediator_cli.pipeline.progress import Progress
    from mediator_cli.runtime.combine import Combine

Kind = Literal["model", "adapter", "bundle"]
ROUTED, DENSE, ORACLE = "", "dense", "oracle"


@dataclass(frozen=True)
class Candidate:
    """One thing to evaluate, as the user named it.

    `part` of a bundle is an expert's name, DENSE, ORACLE (the expert named like the task) or ROUTED. `n_bytes` on disk
    are those that it needs: an adapter its base, an expert of a bundle the dense expert and its own sparse file. `far`
    are those of its files that are still on the Hub. `combine` says how several experts of a bundle answer, None = as
    its router's policy does.
    """

    name: str
    path: Path
    kind: Kind
    part: str = ROUTED
    base: Path | None = None
    n_bytes: int = 0
    far: tuple[FarFile, ...] = ()
    combine: Combine | None = None

    def mixture(self, task: str) -> str | None:
        """Say which mixture answers a task: None where a router decides, or where nothing is mixed."""
        if self.kind != "bundle" or self.part in (ROUTED, DENSE):
            return None
        return task if self.part == ORACLE else self.part


def find_candidates(
    names: Sequence[str], tasks: Sequence[str], base: str | Path | None = None, access: Access = ONLINE
) -> tuple[Candidate, ...]:
    """Look at every folder, Hub id or `BUNDLE::PART` from headers and manifests alone.

    Raises MediatorError with all problems: folders that hold no model, unknown parts, adapters without base.
    """
    problems: list[Problem] = []
    found: list[Candidate] = []
    for name in dict.fromkeys(names):
        try:
            found.append(_candidate(name, tasks, base, access))
        except MediatorError as error:
            problems += error.problems
    if problems:
        raise CheckpointError(list(dict.fromkeys(problems)))
    return tuple(found)


def _candidate(name: str, tasks: Sequence[str], base: str | Path | None, access: Access) -> Candidate:
    text, _, part = name.partition("::")
    location = _place(text, access)
    if location.repo and MANIFEST in location.repo.sizes:
        hint = f"`mediator pull {location.repo.repo_id}`, then name that folder"
        raise CheckpointError(Problem(text, "is a bundle, which is answered from a folder alone", hint))
    if (location.folder / MANIFEST).is_file():
        return _bundle(name, location.folder, tasks)
    if "::" in name:
        message = f"is no bundle, so it has no part '{part}'"
        raise CheckpointError(Problem(text, message, "name the folder alone"))
    if not is_adapter(location.folder):
        whole = open_checkpoint(location.folder, location.repo)
        return Candidate(name, location.folder, "model", n_bytes=_weight_bytes(whole), far=_far(whole))
    if base is None:
        raise CheckpointError(Problem(text, "is an adapter", "give its base: --base DIR"))
    return _adapter(name, location, _place(str(base), access))


def _place(text: str, access: Access) -> Location:
    """Find a model that answers: its weights have to be on disk, so a URL is refused."""
    location = find_location(text, Path(text).absolute(), access)
    if location.remote is not None:
        message = "is at a URL, and what answers is read from a folder"
        raise CheckpointError(Problem(location.shown, message, "copy it to a folder, then name that"))
    return location


def _adapter(name: str, location: Location, base: Location) -> Candidate:
    below = open_checkpoint(base.folder, base.repo)
    adapter = open_adapter(location.folder, below.tensors, location.repo)
    n_bytes = _weight_bytes(below) + _weight_bytes(adapter)
    far = (*_far(below), *_far(adapter))
    return Candidate(name, location.folder, "adapter", base=base.folder, n_bytes=n_bytes, far=far)


def _far(source: Checkpoint | Adapter) -> tuple[FarFile, ...]:
    return far_files(source.tensors, source.repo)


def _weight_bytes(source: Checkpoint | Adapter) -> int:
    far = _far(source)
    here = [file for file in weight_files(source.tensors) if file.is_file()]
    return sum(file.stat().st_size for file in here) + sum(file.n_bytes for file in far)


def _bundle(name: str, path: Path, tasks: Sequence[str]) -> Candidate:
    folder, _, part = name.partition("::")
    manifest = read_manifest(path)
    problems = list(_part_problems(folder, part, manifest, tasks))
    if problems:
        raise CheckpointError(problems)
    return Candidate(name, path, "bundle", part, n_bytes=_dense_bytes(path) + _beside_dense(manifest, part))


def _dense_bytes(bundle: Path) -> int:
    return _weight_bytes(open_checkpoint(bundle))


def _part_problems(folder: str, part: str, manifest: Manifest, tasks: Sequence[str]) -> Iterator[Problem]:
    experts = [source.name for source in manifest.experts]
    if part == ROUTED and manifest.sparse and manifest.router is None and manifest.gates is None:
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
    used = [record for record in manifest.sparse if part in (ROUTED, ORACLE, record.expert)]
    shared = [manifest.shared] if used and manifest.shared is not None else []
    files = [file for record in used for file in record.files] + [file for record in shared for file in record.files]
    sparse = sum(file.bytes for file in files)
    router = manifest.router.file if manifest.router is not None and part == ROUTED else None
    gates = manifest.gates.file if manifest.gates is not None and part == ROUTED else None
    return sparse + sum(file.bytes for file in (router, gates) if file is not None)


def download_candidates(candidates: Sequence[Candidate], progress: Progress = silent) -> None:
    """Bring the weights of candidates that are still on the Hub into its cache."""
    files = {file.repo.folder / file.name: file for candidate in candidates for file in candidate.far}
    download(tuple(file for path, file in files.items() if not path.is_file()), progress)


def load_candidate(candidate: Candidate) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model and its tokenizer; raise BundleError or CheckpointError when it is damaged."""
    from mediator_cli.runtime.open import load_dense, open_bundle
    from mediator_cli.runtime.prompts import load_tokenizer

    download_candidates([candidate])
    if candidate.kind == "model" and is_heterogeneous(read_json(candidate.path / "config.json")):
        import mediator_cli.moe.heterogeneous  # noqa: F401 - teaches the Auto classes to load it
    if candidate.kind == "bundle" and candidate.part != DENSE:
        return open_bundle(candidate.path, combine=candidate.combine), load_tokenizer(candidate.path)
    if candidate.base is None:
        return load_dense(candidate.path), load_tokenizer(candidate.path)
    model = load_dense(candidate.base)
    _add_adapter(model, candidate.path, candidate.base)
    return model, load_tokenizer(candidate.path if side_files(candidate.path) else candidate.base)


def _add_adapter(model: PreTrainedModel, folder: Path, base: Path) -> None:
    """Add scale · B·A to each tensor that the adapter changes, as a merge reads it: in float32, rounded once."""
    import torch

    from mediator_cli.checkpoint.adapter.read import AdapterReader
    from mediator_cli.checkpoint.read import FullReader, open_files, read_floats

    tensors = open_checkpoint(base).tensors
    adapter = open_adapter(folder, tensors)
    parameters = dict(model.named_parameters())
    with open_files([*weight_files(tensors), adapter.file]) as descriptors:
        reader = AdapterReader(FullReader(descriptors, tensors), descriptors, adapter)
        for name, change in adapter.changes.items():
            if name not in parameters or parameters[name].shape != change.shape:
                message = "transformers loads this tensor under another name or in another shape"
                hint = "merge the adapter with PEFT's merge_and_unload and name that folder"
                raise CheckpointError(Problem(f"{folder}: {name}", message, hint))
            data = read_floats(reader, name, 0, change.size).reshape(change.shape)
            parameters[name].data.copy_(torch.from_numpy(data))
