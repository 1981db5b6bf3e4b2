"""PEFT LoRA adapters: what is supported is read exactly, everything else is refused by name."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mediator_cli.checkpoint.adapter.config import read_config
from mediator_cli.checkpoint.adapter.fit import fit_adapter
from mediator_cli.checkpoint.adapter.parts import read_parts

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from mediator_cli.checkpoint.adapter.changes import Change
    from mediator_cli.checkpoint.header import TensorInfo
    from mediator_cli.checkpoint.hub.repo import HubRepo


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter fitted to a base: its tensors by their own names, and its changes by the base's names.

    `shapes` has the new shapes of those tensors of the base that it changes in shape: other numbers of tokens.
    The file of an adapter of a Hub repository `repo` may still be there.
    """

    path: Path
    base_name: str
    file: Path
    tensors: Mapping[str, TensorInfo] = field(repr=False)
    changes: Mapping[str, Change] = field(repr=False)
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict, repr=False)
    repo: HubRepo | None = None


def open_adapter(folder: Path, base: Mapping[str, TensorInfo], repo: HubRepo | None = None) -> Adapter:
    """Open a LoRA adapter, in a folder or in the folder that a Hub repository has, and fit it to the base's tensors.

    Raises CheckpointError with every field and tensor that is not supported or does not fit.
    """
    config = read_config(folder / "adapter_config.json")
    parts = read_parts(folder, repo)
    changes = fit_adapter(parts, config, base)
    shapes = {name: change.shape for name, change in changes.items() if change.shape != base[name].shape}
    return Adapter(folder, config.base_name, parts.file, parts.tensors, changes, shapes, repo)
