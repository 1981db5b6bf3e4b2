"""Which file of a folder holds the weights; a folder without any is refused with the way out.

All of it looks at names alone, so that a repository on the Hub is judged as a folder is.
"""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from mediator_cli.checkpoint.header import unreadable
from mediator_cli.errors import CheckpointError, Problem

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

SAFETENSORS, TORCH = "model.safetensors", "pytorch_model.bin"
_SHARD = re.compile(r"-\d{5}-of-\d{5}\.\w+$")
_POINTER, _POINTER_BYTES = b"version https://git-lfs.github.com/spec", 1024
_SAVE = "load it with what wrote it, and save it with save_pretrained of transformers"
_OLD = "pip install 'transformers<5' {0}, load it there with {1}=True, and save it with save_pretrained"
# What other formats are known by, what they are, and what to do; the first that fits counts.
_OTHERS = (
    ("model_index.json", "is a pipeline of diffusers", "only models of transformers can be merged"),
    ("consolidated*.pth", "holds the original weights of Meta", "use the repository for transformers, often named -hf"),
    ("*.gguf", "holds GGUF files and no safetensors", "download one of them and name that file"),
    ("tf_model*.h5", "holds TensorFlow weights alone", _OLD.format("tensorflow tf-keras", "from_tf")),
    ("flax_model*.msgpack", "holds Flax weights alone", _OLD.format("flax", "from_flax")),
    ("*.onnx", "holds an ONNX export alone", "use the checkpoint that it was exported from"),
    ("*.pt", "holds weights under a name that transformers does not read", _SAVE),
    ("*.pth", "holds weights under a name that transformers does not read", _SAVE),
    ("*.ckpt", "holds weights under a name that transformers does not read", _SAVE),
)


def list_names(folder: Path) -> list[str]:
    """List the files of a folder and of the folders in it, by their paths from there."""
    try:
        found = [*folder.glob("*"), *folder.glob("*/*")]
        return sorted(file.relative_to(folder).as_posix() for file in found if file.is_file())
    except OSError as error:
        raise unreadable(folder, error) from None


def find_weights(place: str, names: Sequence[str]) -> str:
    """Name the file that holds the weights, or that an index stands for; safetensors win over .bin.

    `names` are those of a folder or repository, which errors call `place`. Raises CheckpointError where no file
    holds weights, or more than one could be meant.
    """
    for name in (SAFETENSORS, TORCH):
        if name in names or f"{name}.index.json" in names:
            return name
        if found := [other for other in names if fnmatchcase(other, _pattern(name)) and "/" not in other]:
            return _only(place, name, found)
    raise CheckpointError(_no_weights(place, names))


def refuse_pointers(files: Iterable[Path]) -> None:
    """Raise CheckpointError where git-lfs left a pointer instead of a file."""
    for file in files:
        if _is_pointer(file):
            message = "is a pointer of git-lfs, not the file itself"
            raise CheckpointError(Problem(str(file), message, f"run `git lfs pull` in {file.parent}"))


def _is_pointer(file: Path) -> bool:
    try:
        if not file.is_file() or file.stat().st_size > _POINTER_BYTES:
            return False
        with file.open("rb") as stream:
            return stream.read(len(_POINTER)) == _POINTER
    except OSError as error:
        raise unreadable(file, error) from None


def _pattern(name: str) -> str:
    return "*.safetensors" if name == SAFETENSORS else "pytorch_model*.bin"


def _only(place: str, usual: str, found: Sequence[str]) -> str:
    """Take the one file of weights under another name; shards and several files need an index."""
    # Mistral ships its own format beside that of transformers.
    found = [name for name in found if not name.startswith("consolidated")] or found
    if len(found) == 1 and not _SHARD.search(found[0]):
        return found[0]
    shown = ", ".join(found[:3]) + (", ..." if len(found) > 3 else "")
    hint = f"fetch {usual}.index.json as well, or save it again with save_pretrained of transformers"
    raise CheckpointError(Problem(place, f"holds {shown} without the index {usual}.index.json", hint))


def _no_weights(place: str, names: Sequence[str]) -> Problem:
    if not names:
        return Problem(place, "is an empty folder", "was the download or training finished?")
    top = [name for name in names if "/" not in name]
    for pattern, message, hint in _OTHERS:
        if any(fnmatchcase(name, pattern) for name in top) or (pattern == "*.onnx" and _has_onnx(names)):
            return Problem(place, message, hint)
    usual = (SAFETENSORS, f"{SAFETENSORS}.index.json", TORCH, f"{TORCH}.index.json", "adapter_config.json")
    if inner := [name.split("/")[0] for name in names if name.count("/") == 1 and name.split("/")[1] in usual]:
        return Problem(place, f"holds no weights itself, {inner[-1]} in it does", f"name {place}/{inner[-1]}")
    hint = "a checkpoint has model.safetensors, pytorch_model.bin, or the index of either"
    return Problem(place, "holds no safetensors weights", hint)


def _has_onnx(names: Sequence[str]) -> bool:
    return any(fnmatchcase(name, "onnx/*.onnx") for name in names)
