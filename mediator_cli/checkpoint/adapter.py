"""PEFT LoRA adapters: what is supported is read exactly, everything else is refused by name."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mediator_cli.checkpoint.header import FLOAT_DTYPES, TensorInfo, read_header, read_json
from mediator_cli.errors import CheckpointError, Problem

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

_TENSOR = re.compile(r"^base_model\.model\.(?P<module>.+)\.lora_(?P<factor>[AB])(\.default)?\.weight$")
_READ = {"r", "lora_alpha", "use_rslora", "peft_type", "base_model_name_or_path"}
# These steer training or loading and do not change what a finished adapter computes.
_HARMLESS = {
    "task_type", "inference_mode", "revision", "lora_dropout", "target_modules", "exclude_modules", "peft_version",
    "auto_mapping", "qalora_group_size", "ensure_weight_tying", "runtime_config", "loftq_config", "megatron_core",
    "eva_config", "corda_config", "layers_pattern", "layers_to_transform", "lora_ga_config", "use_bdlora",
}  # fmt: skip
_DEFAULTS: dict[str, tuple[object, ...]] = {
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),
}


@dataclass(frozen=True)
class LoraFactor:
    """The change of one linear weight: delta = scale · B·A, with A [r, in] and B [out, r]."""

    a: TensorInfo
    b: TensorInfo
    scale: float


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter: its factors by the name of the base tensor that they change."""

    path: Path
    base_name: str
    factors: Mapping[str, LoraFactor] = field(repr=False)
    file: Path

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        """All tensors of the adapter by their own names."""
        return {info.name: info for factor in self.factors.values() for info in (factor.a, factor.b)}


def open_adapter(folder: Path, base: Mapping[str, TensorInfo]) -> Adapter:
    """Open a LoRA adapter and fit it to the base's tensors.

    Raises CheckpointError with every field and tensor that is not supported or does not fit.
    """
    config_file = folder / "adapter_config.json"
    config = read_json(config_file)
    problems = list(_check_config(config_file, config))
    if problems:
        raise CheckpointError(problems)
    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        hint = "save the adapter with PEFT's save_pretrained, which writes safetensors"
        raise CheckpointError(Problem(str(folder), "holds no adapter_model.safetensors", hint))
    scale = float(config["lora_alpha"]) / (math.sqrt(config["r"]) if config.get("use_rslora") else config["r"])
    pairs, problems = _pair_up(file)
    factors = {f"{module}.weight": LoraFactor(pair["A"], pair["B"], scale) for module, pair in pairs.items()}
    problems += [
        problem for name, factor in factors.items() for problem in _check_factor(name, factor, base, config["r"])
    ]
    if problems:
        raise CheckpointError(problems)
    return Adapter(folder, str(config.get("base_model_name_or_path") or ""), factors, file)


def _check_config(file: Path, config: Mapping[str, Any]) -> Iterator[Problem]:
    if config.get("peft_type") != "LORA":
        yield Problem(
            f"{file} peft_type", f"{config.get('peft_type')} adapters are not supported", "use a LoRA adapter"
        )
        return
    for name in ("r", "lora_alpha"):
        value = config.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            yield Problem(f"{file} {name}", f"must be a positive number, is {value!r}", "was the file edited by hand?")
    for name, value in config.items():
        if name in _READ or name in _HARMLESS or value in _DEFAULTS.get(name, ()):
            continue
        if value not in (None, False, 0, {}, []):
            hint = "merge the adapter into its base with PEFT's merge_and_unload and name that folder"
            yield Problem(f"{file} {name}", f"{name}={value!r} is not supported yet", hint)


def _pair_up(file: Path) -> tuple[dict[str, dict[str, TensorInfo]], list[Problem]]:
    pairs: dict[str, dict[str, TensorInfo]] = {}
    problems: list[Problem] = []
    for info in read_header(file).tensors:
        match = _TENSOR.match(info.name)
        if match is None:
            problems.append(
                Problem(f"{file}: {info.name}", "tensor is not supported yet", "only lora_A and lora_B are")
            )
        elif info.dtype not in FLOAT_DTYPES:
            problems.append(
                Problem(f"{file}: {info.name}", f"dtype {info.dtype} is not a float type", "save it as bf16")
            )
        else:
            pairs.setdefault(match["module"], {})[match["factor"]] = info
    for module, pair in pairs.items():
        if len(pair) != 2:
            problems.append(Problem(f"{file}: {module}", f"has lora_{next(iter(pair))} alone", "the file is damaged"))
    return ({} if problems else pairs), problems


def _check_factor(name: str, factor: LoraFactor, base: Mapping[str, TensorInfo], rank: float) -> Iterator[Problem]:
    place = f"{factor.a.file}: {name}"
    if name not in base:
        yield Problem(place, "the base has no such tensor", "was the adapter trained on another base?")
        return
    fits = len(factor.a.shape) == len(factor.b.shape) == len(base[name].shape) == 2
    if not fits or (factor.b.shape[0], factor.a.shape[1]) != base[name].shape or factor.b.shape[1] != factor.a.shape[0]:
        shapes = f"B {list(factor.b.shape)} · A {list(factor.a.shape)} does not give {list(base[name].shape)}"
        yield Problem(place, shapes, "was the adapter trained on another base?")
    elif factor.a.shape[0] != rank:
        message = f"has rank {factor.a.shape[0]}, adapter_config.json says r={rank}"
        yield Problem(place, message, "was the file edited by hand?")
