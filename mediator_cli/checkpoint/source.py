"""A path as the user wrote it to an opened source: headers and configs only, no tensor is read."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mediator_cli.checkpoint.header import FLOAT_DTYPES, TensorInfo, read_json, read_tensors, unreadable
from mediator_cli.errors import CheckpointError, Problem

if TYPE_CHECKING:
    from collections.abc import Mapping

_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?$")
_QUANTISED_NAME = re.compile(r"\.(qweight|qzeros|scales|weight_scale(_inv)?|SCB|absmax|quant_map|weight_packed)$")
_DEQUANTISE = "load it with transformers, dequantise it, and save it as float safetensors first"
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "sentencepiece.bpe.model", "chat_template.json",
)  # fmt: skip


@dataclass(frozen=True)
class Checkpoint:
    """A model folder: its config and where each tensor lies."""

    path: Path
    config: Mapping[str, Any] = field(repr=False)
    tensors: Mapping[str, TensorInfo] = field(repr=False)

    @property
    def is_tied(self) -> bool:
        """Whether the head shares the input embeddings, by the config."""
        return bool(self.config.get("tie_word_embeddings", False))


def weight_files(tensors: Mapping[str, TensorInfo]) -> tuple[Path, ...]:
    """List the files that hold the tensors, each once."""
    return tuple(dict.fromkeys(info.file for info in tensors.values()))


def find_folder(source: str, path: Path) -> Path:
    """Check that `path`, which the recipe calls `source`, is a folder that can hold a model."""
    try:
        is_folder, exists = path.is_dir(), path.exists()
    except OSError as error:
        raise unreadable(path, error) from None
    if is_folder:
        return path
    if path.suffix == ".gguf":
        raise CheckpointError(Problem(str(path), "GGUF files are quantised and not supported", _DEQUANTISE))
    if exists:
        raise CheckpointError(Problem(str(path), "is not a folder", "name the folder that holds config.json"))
    if _HUB_ID.match(source):
        repo = source.split("@")[0]
        name = repo.split("/")[1]
        hint = f"Hub ids are not supported yet: `hf download {repo} --local-dir {name}`, then name the folder"
        raise CheckpointError(Problem(source, "no such folder", hint))
    raise CheckpointError(Problem(str(path), "no such folder", "relative paths start at the recipe's folder"))


def open_checkpoint(folder: Path) -> Checkpoint:
    """Open a full checkpoint; raise CheckpointError for anything that is not float safetensors."""
    config = read_json(folder / "config.json")
    _refuse_quantised(folder, config)
    _refuse_other_formats(folder)
    tensors = read_tensors(folder)
    for info in tensors.values():
        _refuse_quantised_tensor(info)
    return Checkpoint(folder, config, tensors)


def is_adapter(folder: Path) -> bool:
    """Whether the folder holds a PEFT adapter instead of a full checkpoint."""
    return (folder / "adapter_config.json").is_file()


def _refuse_quantised(folder: Path, config: Mapping[str, Any]) -> None:
    quantisation = config.get("quantization_config")
    if quantisation:
        known = quantisation.get("quant_method", "unknown") if isinstance(quantisation, dict) else "unknown"
        message = f"is quantised ({known}); only float checkpoints can be merged"
        raise CheckpointError(Problem(f"{folder / 'config.json'} quantization_config", message, _DEQUANTISE))


def _refuse_other_formats(folder: Path) -> None:
    if (folder / "model.safetensors").exists() or (folder / "model.safetensors.index.json").exists():
        return
    if any(folder.glob("*.gguf")):
        raise CheckpointError(Problem(str(folder), "holds GGUF files, which are quantised", _DEQUANTISE))
    if any(folder.glob("pytorch_model*.bin")):
        hint = "load it with transformers and save it again; it then writes safetensors"
        raise CheckpointError(Problem(str(folder), "holds pytorch_model.bin, not safetensors", hint))
    hint = "a checkpoint has model.safetensors or model.safetensors.index.json"
    raise CheckpointError(Problem(str(folder), "holds no safetensors weights", hint))


def _refuse_quantised_tensor(info: TensorInfo) -> None:
    is_packed = info.name.endswith(".weight") and info.dtype not in FLOAT_DTYPES
    if info.dtype.startswith("F8") or is_packed or _QUANTISED_NAME.search(info.name):
        message = f"dtype {info.dtype}: the checkpoint is quantised; only float checkpoints can be merged"
        raise CheckpointError(Problem(f"{info.file}: {info.name}", message, _DEQUANTISE))


def side_files(folder: Path) -> tuple[Path, ...]:
    """List the tokenizer and chat template files of a model folder, sorted by name."""
    names = [folder / name for name in TOKENIZER_FILES]
    templates = [*folder.glob("chat_template*.jinja"), *folder.glob("additional_chat_templates/*.jinja")]
    return tuple(sorted(path for path in {*names, *templates} if path.is_file()))
