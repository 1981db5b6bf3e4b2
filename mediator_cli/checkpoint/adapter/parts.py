"""The tensors of an adapter file, sorted by what they do: PEFT writes it into their names."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from mediator_cli.checkpoint.header import FLOAT_DTYPES, TensorInfo
from mediator_cli.checkpoint.hub.find import find_unseen, has_file, read_far_header
from mediator_cli.checkpoint.hub.repo import HubRepo
from mediator_cli.errors import CheckpointError, Problem

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

_PREFIX = "base_model.model."
_DEFAULT = r"(?:\.default)?"
# What PEFT adds to a module's name; None says that the tensor does nothing once training is over.
_FORMS: tuple[tuple[re.Pattern[str], str | None], ...] = (
    (re.compile(rf"^(?P<module>.+)\.lora_A{_DEFAULT}\.weight$"), "lora_A"),
    (re.compile(rf"^(?P<module>.+)\.lora_B{_DEFAULT}\.weight$"), "lora_B"),
    (re.compile(rf"^(?P<module>.+)\.lora_B{_DEFAULT}\.bias$"), "bias"),
    (re.compile(rf"^(?P<module>.+)\.lora_embedding_A{_DEFAULT}(?:\.weight)?$"), "lora_embedding_A"),
    (re.compile(rf"^(?P<module>.+)\.lora_embedding_B{_DEFAULT}(?:\.weight)?$"), "lora_embedding_B"),
    (re.compile(rf"^(?P<module>.+)\.lora_magnitude_vector{_DEFAULT}(?:\.weight)?$"), "magnitude"),
    (re.compile(rf"^(?P<module>.+)\.token_adapter\.trainable_tokens_delta{_DEFAULT}$"), "tokens"),
    (re.compile(rf"^(?P<module>.+)\.lora_velora_embed{_DEFAULT}$"), None),
)
_WHOLE = re.compile(rf"^(?P<module>.+?)\.(?:modules_to_save{_DEFAULT}|base_layer)\.(?P<parameter>.+)$")
_ORIGINAL = re.compile(r"^(?P<module>.+?)\.original_module\.(?P<parameter>.+)$")
_UNKNOWN = "LoRA, DoRA, biases, saved modules and trainable tokens are"
_DEPTH = ".base_layer"


class Wrapped(NamedTuple):
    """A module that PEFT has wrapped; several parameters of one module are wrapped one in the other, 0 is outermost."""

    module: str
    depth: int


@dataclass(frozen=True)
class Parts:
    """The tensors of an adapter: `wraps` by module and role, `wholes` by the name of the tensor that they replace."""

    file: Path
    tensors: Mapping[str, TensorInfo]
    wraps: Mapping[Wrapped, Mapping[str, TensorInfo]]
    wholes: Mapping[str, TensorInfo]


def read_parts(folder: Path, repo: HubRepo | None = None) -> Parts:
    """Read the header of the adapter's file; raise CheckpointError with every tensor that is not known."""
    file, infos = _open(folder, repo)
    wraps: dict[Wrapped, dict[str, TensorInfo]] = {}
    wholes: dict[str, TensorInfo] = {}
    originals: dict[str, TensorInfo] = {}
    problems = [_not_float(info) for info in infos if info.dtype not in FLOAT_DTYPES]
    for info in infos:
        name = info.name.removeprefix(_PREFIX)
        if match := _ORIGINAL.match(name):
            originals[f"{match['module']}.{match['parameter']}"] = info
        elif not _sort_in(name, info, wraps, wholes):
            problems.append(Problem(f"{file}: {info.name}", "tensor is not supported", f"only {_UNKNOWN}"))
    # PEFT keeps the original of a saved module and never uses it.
    problems += [
        Problem(f"{file}: {info.name}", "tensor is not supported", f"only {_UNKNOWN}")
        for name, info in originals.items()
        if name not in wholes
    ]
    if problems:
        raise CheckpointError(problems)
    return Parts(file, {info.name: info for info in infos}, wraps, wholes)


def _open(folder: Path, repo: HubRepo | None) -> tuple[Path, Iterable[TensorInfo]]:
    file, pickled = folder / "adapter_model.safetensors", folder / "adapter_model.bin"
    if has_file(folder, file.name, repo):
        return file, read_far_header(file, repo).tensors
    if pickled.is_file():
        from mediator_cli.checkpoint.torch_file import read_torch_file  # noqa: PLC0415 - it needs torch

        return pickled, read_torch_file(pickled)
    if repo is not None and (problem := find_unseen(repo)):
        raise CheckpointError(problem)
    place, hint = repo.source if repo else str(folder), "save the adapter with PEFT's save_pretrained"
    raise CheckpointError(Problem(place, f"holds no {file.name}", hint))


def _not_float(info: TensorInfo) -> Problem:
    return Problem(f"{info.file}: {info.name}", f"dtype {info.dtype} is not a float type", "save it as bf16")


def _sort_in(
    name: str, info: TensorInfo, wraps: dict[Wrapped, dict[str, TensorInfo]], wholes: dict[str, TensorInfo]
) -> bool:
    """Put a tensor where it belongs; give False where there is no such place, or it is taken."""
    if name == info.name:
        return False
    for pattern, role in _FORMS:
        if match := pattern.match(name):
            module = _unwrapped(match["module"])
            known = wraps.setdefault(module, {}) if role else {}
            return role is None or known.setdefault(role, info) is info
    if any(part.startswith("lora_") for part in name.split(".")):
        return False
    match = _WHOLE.match(name)
    own = f"{match['module']}.{match['parameter']}" if match else name
    return wholes.setdefault(own, info) is info


def _unwrapped(module: str) -> Wrapped:
    depth = 0
    while module.endswith(_DEPTH):
        module, depth = module.removesuffix(_DEPTH), depth + 1
    return Wrapped(module, depth)
