"""Which files of a folder belong to what mediator wrote there, and what it was made of. Nothing is sent from here."""

from __future__ import annotations

import json
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from mediator_cli.bundle.adapter import ADAPTER_MANIFEST, AdapterManifest
from mediator_cli.bundle.lineage import Parent, parents_of
from mediator_cli.bundle.manifest import MANIFEST, Manifest, file_names, read_manifest, read_record
from mediator_cli.checkpoint.header import read_json, read_tensors
from mediator_cli.checkpoint.heterogeneous import MANIFEST as HETEROGENEOUS_MANIFEST
from mediator_cli.checkpoint.source import is_wanted
from mediator_cli.engine.publish import MANIFESTS
from mediator_cli.errors import BundleError, Problem

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

_REPORT = "compression.json"
_BELONGING = (
    "*.safetensors", "*.gguf", "router.json", "export.json", "semantic-router.yaml", "serve.sh", "serve_config.yaml",
    "llmisvc.yaml", "conflicts.json", "training.json", "LICENSE*", "LICENCE*", "NOTICE*",
)  # fmt: skip


@dataclass(frozen=True)
class Found:
    """A folder that can be pushed: its kind, the names of its files, those that stay, and its parents.

    `manifest` is that of a bundle.
    """

    folder: Path
    kind: str
    names: tuple[str, ...]
    left_out: tuple[str, ...]
    parents: tuple[Parent, ...]
    manifest: Manifest | None = None


def belongs(name: str) -> bool:
    """Whether a file of this name may be part of a model, adapter or export; never code, pickles or hidden files.

    >>> [belongs(name) for name in ("a/model.safetensors", "tokenizer.json", "run.py", ".git/config", "notes.txt")]
    [True, True, False, False, False]
    """
    path = PurePosixPath(name)
    if any(part.startswith(".") for part in path.parts):
        return False
    own = path.name in MANIFESTS or any(fnmatchcase(path.name, pattern) for pattern in _BELONGING)
    return own or is_wanted(name) or is_wanted(path.name)


def look_into(folder: Path) -> Found:
    """Find out what a folder is and which of its files belong to it.

    Raises BundleError where it is nothing that mediator writes, or where its files lead out of it.
    """
    if not folder.is_dir():
        raise BundleError(Problem(str(folder), "no such folder", "check the path"))
    present = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
    if MANIFEST in present:
        manifest = read_manifest(folder)
        return _found(folder, _kind(manifest), present, {*file_names(manifest), MANIFEST}, manifest=manifest)
    whole = folder.resolve()
    names = {name for name in present if belongs(name) and (folder / name).resolve().is_relative_to(whole)}
    kind = _kind_of_names(folder, names)
    if kind is None:
        hint = "push a bundle, a model folder with config.json and safetensors, an adapter, or an export"
        raise BundleError(Problem(str(folder), "holds nothing that mediator writes", hint))
    return _found(folder, kind, present, names)


def _found(
    folder: Path, kind: str, present: Iterable[str], names: Collection[str], manifest: Manifest | None = None
) -> Found:
    left_out = tuple(name for name in present if name not in names)
    parents = parents_of((manifest.base, *manifest.experts)) if manifest else _parents(folder, names)
    return Found(folder, kind, tuple(sorted(names)), left_out, parents, manifest)


def _kind(manifest: Manifest) -> str:
    if manifest.moe is not None:
        return "Mixture of Experts"
    return "bundle" if manifest.sparse or manifest.router else "static merge"


def _kind_of_names(folder: Path, names: Collection[str]) -> str | None:
    """Name what such files are; None where no weights with their config, or no router, are among them."""
    if HETEROGENEOUS_MANIFEST in names:
        return "heterogeneous Mixture of Experts"
    if _REPORT in names:
        return "compressed Mixture of Experts"
    if "adapter_config.json" in names and "adapter_model.safetensors" in names:
        return "adapter"
    if "config.json" in names and any(name.endswith(".safetensors") for name in names):
        # As other programs find the tensors: an index without its shards is no model.
        read_tensors(folder)
        return "model"
    if any(name.endswith(".gguf") for name in names):
        return "GGUF model"
    has_parts = any(name.endswith(("/adapter_config.json", "/config.json")) for name in names)
    return "export" if has_parts or {"router.json", "export.json"} & set(names) else None


def _parents(folder: Path, names: Collection[str]) -> tuple[Parent, ...]:
    """Read what a folder without a routing manifest was made of; nothing where it does not say."""
    if ADAPTER_MANIFEST in names:
        adapter = read_record(folder / ADAPTER_MANIFEST, AdapterManifest, "manifest of an adapter")
        return parents_of((adapter.base, *adapter.experts))
    if HETEROGENEOUS_MANIFEST in names:
        rows = read_json(folder / HETEROGENEOUS_MANIFEST).get("experts")
        return tuple(_parent(row) for row in rows or () if isinstance(row, dict))
    if _REPORT in names:
        return (Parent("source", str(read_json(folder / _REPORT).get("source") or "")),)
    return ()


def _parent(row: dict[str, Any]) -> Parent:
    name, model = str(row.get("name") or ""), str(row.get("model") or "")
    return Parent(name, model, row.get("commit"), row.get("license"))


def read_text(folder: Path, name: str) -> str:
    """Read a text file of a folder; empty where there is none."""
    file = folder / name
    return file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""


def is_causal(folder: Path) -> bool:
    """Whether a folder's config is that of a model that generates text."""
    try:
        config = json.loads(read_text(folder, "config.json") or "{}")
    except ValueError:
        return False
    names = config.get("architectures") if isinstance(config, dict) else None
    return any("CausalLM" in str(name) for name in names or ())
