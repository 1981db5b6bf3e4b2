"""A path as the user wrote it to an opened source: headers and configs only, no tensor is read."""

from __future__ import annotations

from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from mediator_cli.checkpoint.formats import SAFETENSORS, find_weights, list_names, refuse_pointers
from mediator_cli.checkpoint.gguf_file import find_gguf, open_gguf
from mediator_cli.checkpoint.header import Header, TensorInfo, read_json, read_tensors, unreadable
from mediator_cli.checkpoint.hub.find import (
    ONLINE,
    Access,
    find_repo,
    find_unseen,
    is_hub_id,
    missing_file,
    read_far_headers,
)
from mediator_cli.checkpoint.quantised import refuse_quantised_config, refuse_quantised_tensors
from mediator_cli.checkpoint.remote.folder import RemoteFolder, find_remote, read_remote
from mediator_cli.checkpoint.remote.url import is_url
from mediator_cli.checkpoint.vocabulary import TOKENIZER_FILES
from mediator_cli.errors import CheckpointError, Problem

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mediator_cli.checkpoint.hub.repo import HubRepo

_SIDE_PATTERNS = (
    *TOKENIZER_FILES, "additional_chat_templates/*.jinja", "preprocessor_config.json", "processor_config.json",
    "video_preprocessor_config.json", "modules.json", "config_sentence_transformers.json", "sentence_*_config.json",
    "*_Pooling/config.json",
)  # fmt: skip
_SETTINGS = ("config.json", "generation_config.json", "adapter_config.json", "README.md", "*.index.json")
_NEVER = (".py", ".pyc", ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf", ".tflite")
"""Code, which is never fetched nor copied, and weights, which are not side files whatever they are called."""


@dataclass(frozen=True)
class Location:
    """Where a source lies: a folder on disk, or the folder in the cache that a Hub repository or URL has."""

    folder: Path
    repo: HubRepo | None = None
    remote: RemoteFolder | None = None

    @property
    def shown(self) -> str:
        """The name to say in messages: what the user wrote of a Hub id, a URL, the path of a folder."""
        if self.repo:
            return self.repo.source
        return self.remote.url if self.remote else str(self.folder)


@dataclass(frozen=True)
class Checkpoint:
    """A model folder: its config and where each tensor lies; those of a Hub repository `repo` may still be there."""

    path: Path
    config: Mapping[str, Any] = field(repr=False)
    tensors: Mapping[str, TensorInfo] = field(repr=False)
    repo: HubRepo | None = None

    @property
    def is_tied(self) -> bool:
        """Whether the head shares the input embeddings, by the config."""
        return bool(self.config.get("tie_word_embeddings", False))


def weight_files(tensors: Mapping[str, TensorInfo]) -> tuple[Path, ...]:
    """List the files that hold the tensors, each once."""
    return tuple(dict.fromkeys(info.file for info in tensors.values()))


def find_location(source: str, path: Path, access: Access = ONLINE) -> Location:
    """Find what the user calls `source`: a URL, the folder `path` where there is one, else org/name[@revision].

    From the Hub and from a URL only small files are fetched: configs, tokenizer, templates, card.
    """
    if is_url(source):
        found = find_remote(source, _is_wanted_from_afar, offline=access.offline)
        return Location(found.folder, remote=found)
    try:
        is_folder, exists = path.is_dir(), path.exists()
    except OSError as error:
        raise unreadable(path, error) from None
    if is_folder:
        gguf = find_gguf(path)
        return Location(open_gguf(gguf) if gguf else path)
    if path.suffix == ".gguf" and exists:
        return Location(open_gguf(path))
    if exists:
        hint = f"name the folder that holds config.json, here perhaps {path.parent}"
        raise CheckpointError(Problem(str(path), "is not a folder", hint))
    if is_hub_id(source):
        repo = find_repo(source, access, is_wanted)
        return Location(repo.folder, repo)
    hint = (
        "relative paths in a recipe start at the recipe's folder; a model on the Hub is org/name or org/name@revision"
    )
    raise CheckpointError(Problem(str(path), "no such folder", hint))


def open_checkpoint(folder: Path, repo: HubRepo | None = None) -> Checkpoint:
    """Open a full checkpoint of float tensors, in safetensors or in a .bin; raise CheckpointError for anything else."""
    remote = read_remote(folder)
    place = repo.source if repo else remote.url if remote else str(folder)
    weights = _find_weights(folder, repo, remote)
    if repo is None:
        refuse_pointers(sorted(folder.glob("*")))
    elif "config.json" not in repo.sizes:
        raise missing_file(repo, "config.json")
    if remote is not None and "config.json" not in remote.files:
        raise CheckpointError(Problem(place, "holds no config.json", "is it the folder of a model?"))
    if repo is None and is_adapter(folder) and not (folder / "config.json").is_file():
        message = "is an adapter, and a model is needed here"
        raise CheckpointError(Problem(place, message, "name the model that it was trained on"))
    config = read_json(folder / "config.json")
    refuse_quantised_config(place, f"{remote.url if remote else folder}/config.json", config)
    tensors = _read_weights(folder, weights, repo, config)
    refuse_quantised_tensors(tensors.values())
    return Checkpoint(folder, config, tensors, repo)


def look_at(folder: Path, repo: HubRepo | None = None) -> Checkpoint:
    """Read the headers of any checkpoint, also of one that can't be merged, such as a quantised one."""
    weights = _find_weights(folder, repo, read_remote(folder))
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    return Checkpoint(folder, config, _read_weights(folder, weights, repo, config), repo)


def _find_weights(folder: Path, repo: HubRepo | None, remote: RemoteFolder | None) -> str:
    if repo is not None:
        return _find_far_weights(repo)
    if remote is None:
        return find_weights(str(folder), list_names(folder))
    weights = find_weights(remote.url, list(remote.files))
    if weights.endswith(".bin"):
        hint = "save it as safetensors there, or copy the folder to a disk"
        raise CheckpointError(Problem(remote.url, "holds no safetensors, and no other file is read from afar", hint))
    return weights


def _read_weights(folder: Path, weights: str, repo: HubRepo | None, config: Mapping[str, Any]) -> dict[str, TensorInfo]:
    read = _read_bins if weights.endswith(".bin") else _read_headers
    return read(folder, weights, repo, config)


def _find_far_weights(repo: HubRepo) -> str:
    try:
        return find_weights(repo.source, list(repo.sizes))
    except CheckpointError:
        if repo.offline:
            # The cache does not tell which weights the repository has, so the usual ones are missed.
            raise missing_file(repo, SAFETENSORS) from None
        raise


def _read_headers(
    folder: Path, weights: str, repo: HubRepo | None, _config: Mapping[str, Any]
) -> dict[str, TensorInfo]:
    return read_tensors(folder, lambda files: read_far_headers(files, repo), weights)


def _read_bins(folder: Path, weights: str, repo: HubRepo | None, config: Mapping[str, Any]) -> dict[str, TensorInfo]:
    """Find the tensors in files of torch.save, which must lie on disk; only here torch is needed to open a source."""
    from mediator_cli.checkpoint.torch_file import read_torch_file, without_second_names  # noqa: PLC0415

    if repo is not None and (problem := find_unseen(repo)):
        raise CheckpointError(problem)
    found = read_tensors(folder, lambda files: [Header(read_torch_file(file), {}, 0) for file in files], weights)
    return without_second_names(found, config)


def is_adapter(folder: Path) -> bool:
    """Whether the folder holds a PEFT adapter instead of a full checkpoint."""
    return (folder / "adapter_config.json").is_file()


def side_files(folder: Path) -> tuple[Path, ...]:
    """List the files that go with a model's tokenizer and templates, sorted by name; never code, never weights."""
    found = {file for pattern in _SIDE_PATTERNS for file in folder.glob(pattern)}
    return tuple(sorted(file for file in found if file.suffix not in _NEVER and file.is_file()))


def is_wanted(name: str) -> bool:
    """Whether a file of a Hub repository is small and needed before any weight is read."""
    if PurePosixPath(name).suffix in _NEVER:
        return False
    return any(_matches(name, pattern) for pattern in (*_SIDE_PATTERNS, *_SETTINGS))


def _is_wanted_from_afar(name: str) -> bool:
    return name == "routing_manifest.json" or is_wanted(name)


def _matches(name: str, pattern: str) -> bool:
    # As in a glob of a folder, a star matches no slash.
    return name.count("/") == pattern.count("/") and fnmatchcase(name, pattern)
