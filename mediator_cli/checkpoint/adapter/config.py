"""adapter_config.json of a PEFT LoRA adapter: what it says of ranks and scales, and what is refused by name."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mediator_cli.checkpoint.header import read_json
from mediator_cli.errors import CheckpointError, Problem, first_line

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

_MERGE = "merge the adapter into its base with PEFT's merge_and_unload and name that folder"
_BY_HAND = "was the file edited by hand?"
_READ = {
    "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "peft_type", "base_model_name_or_path",
    "fan_in_fan_out", "use_dora", "lora_bias", "modules_to_save", "target_parameters", "trainable_token_indices",
    "ensure_weight_tying", "task_type", "init_lora_weights",
}  # fmt: skip
# These steer training or loading and do not change what a finished adapter computes: what they name is in the file.
_HARMLESS = {
    "inference_mode", "revision", "lora_dropout", "target_modules", "exclude_modules", "peft_version", "bias",
    "auto_mapping", "qalora_group_size", "runtime_config", "loftq_config", "megatron_core", "eva_config",
    "corda_config", "lora_ga_config", "velora_config", "layers_pattern", "layers_to_transform",
}  # fmt: skip
_REFUSED = {
    "alora_invocation_tokens": ("acts only behind its invocation tokens, so no set of weights is it", "leave it out"),
    "arrow_config": ("chooses adapters token by token, so no set of weights is it", "name its adapters one by one"),
    "layer_replication": ("gives the model more layers than the base has", _MERGE),
    "kasa_config": ("cuts singular values out of the base's weights", _MERGE),
    "use_qalora": ("fits a quantised base only", "train on the float base, or leave it out"),
    "use_bdlora": ("holds block-diagonal factors", _MERGE),
    "monteclora_config": ("draws its weights at random", _MERGE),
    "megatron_config": ("belongs to Megatron's layers", _MERGE),
}
_PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva", "mica")
_MUTATING_STARTS = re.compile(r"^(pissa(_niter_\d+)?|olora|corda|lora_ga)$", re.IGNORECASE)
_CONVERT = (
    "save it again as a plain LoRA with PEFT's save_pretrained(FOLDER, path_initial_model_for_weight_conversion=START),"
    " where START is the adapter as it was before training"
)


@dataclass(frozen=True)
class AdapterConfig:
    """What a LoRA adapter's config says; `token_indices` by module name, "" stands for every module."""

    file: Path
    base_name: str
    rank: int
    alpha: float
    is_rank_stabilised: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    is_fan_in_fan_out: bool
    has_magnitudes: bool
    has_bias: bool
    keeps_tied: bool
    has_head: bool
    modules_to_save: tuple[str, ...] = ()
    target_parameters: tuple[str, ...] = ()
    token_indices: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def rank_of(self, key: str) -> int:
        """Give the rank of a module, or of a parameter, by its name in the model."""
        return self.rank_pattern.get(_pattern_of(self.rank_pattern, key), self.rank)

    def scale_of(self, key: str) -> float:
        """Give the factor of B·A for a module, or for a parameter, by its name in the model."""
        alpha = self.alpha_pattern.get(_pattern_of(self.alpha_pattern, key), self.alpha)
        rank = self.rank_of(key)
        return alpha / (math.sqrt(rank) if self.is_rank_stabilised else rank)


def _pattern_of(patterns: Mapping[str, object], key: str) -> str:
    """Find the first pattern that matches at the end of a name, as PEFT does."""
    return next((pattern for pattern in patterns if re.match(rf"(.*\.)?({pattern})$", key)), key)


def read_config(file: Path) -> AdapterConfig:
    """Read adapter_config.json; raise CheckpointError with every field that is not supported."""
    data = read_json(file)
    if data.get("peft_type") != "LORA":
        message = f"{data.get('peft_type')} adapters are not supported"
        raise CheckpointError(Problem(f"{file} peft_type", message, f"use a LoRA adapter, or {_MERGE}"))
    problems = [Problem(f"{file} {name}", message, hint) for name, message, hint in _faults(data)]
    if problems:
        raise CheckpointError(problems)
    return AdapterConfig(
        file=file,
        base_name=str(data.get("base_model_name_or_path") or ""),
        rank=int(data["r"]),
        alpha=float(data["lora_alpha"]),
        is_rank_stabilised=bool(data.get("use_rslora")),
        rank_pattern={key: int(value) for key, value in (data.get("rank_pattern") or {}).items()},
        alpha_pattern={key: float(value) for key, value in (data.get("alpha_pattern") or {}).items()},
        is_fan_in_fan_out=bool(data.get("fan_in_fan_out")),
        has_magnitudes=bool(data.get("use_dora")),
        has_bias=bool(data.get("lora_bias")),
        keeps_tied=bool(data.get("ensure_weight_tying")),
        has_head=data.get("task_type") in (None, "CAUSAL_LM", "SEQ_2_SEQ_LM"),
        modules_to_save=tuple(data.get("modules_to_save") or ()),
        target_parameters=tuple(data.get("target_parameters") or ()),
        token_indices=_token_indices(data.get("trainable_token_indices")),
    )


def _token_indices(value: Any) -> dict[str, tuple[int, ...]]:  # noqa: ANN401 - parsed JSON
    named = value if isinstance(value, dict) else {"": value} if value else {}
    return {str(module): tuple(indices) for module, indices in named.items()}


def _faults(data: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    for name, patterns, is_whole in (("r", "rank_pattern", True), ("lora_alpha", "alpha_pattern", False)):
        if not _is_positive(data.get(name), is_whole):
            yield name, f"must be a positive number, is {data.get(name)!r}", _BY_HAND
        yield from _pattern_faults(patterns, data.get(patterns) or {}, is_whole)
    yield from _list_faults(data)
    yield from _start_faults(data.get("init_lora_weights", True))
    for name, value in data.items():
        if name not in _READ and name not in _HARMLESS and value not in (None, False, 0, "", {}, []):
            reason, hint = _REFUSED.get(name, ("", _MERGE))
            yield name, f"{name}={value!r} is not supported{f': it {reason}' if reason else ''}", hint


def _list_faults(data: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    for name in ("modules_to_save", "target_parameters"):
        if not _is_list(data.get(name) or [], str):
            yield name, f"must be a list of names, is {data[name]!r}", _BY_HAND
    tokens = data.get("trainable_token_indices") or []
    if not all(_is_list(value, int) for value in (tokens.values() if isinstance(tokens, dict) else [tokens])):
        yield "trainable_token_indices", "must be a list of token numbers, or one for each module", _BY_HAND


def _start_faults(start: object) -> Iterator[tuple[str, str, str]]:
    name = "init_lora_weights"
    if isinstance(start, str) and _MUTATING_STARTS.match(start):
        message = f"{name}={start!r} is not supported: it changed the base's weights, and the file does not hold how"
        yield name, message, _CONVERT
    elif start == "loftq":
        message = f"{name}='loftq' is not supported: the adapter belongs to a base quantised by LoftQ"
        yield name, message, f"{_MERGE}; give PEFT the base that LoftQ wrote"
    elif start not in _PLAIN_STARTS:
        yield name, f"{name}={start!r} is not supported", _MERGE


def _pattern_faults(name: str, patterns: object, is_whole: bool) -> Iterator[tuple[str, str, str]]:
    if not isinstance(patterns, dict):
        yield name, f"must map names to numbers, is {patterns!r}", _BY_HAND
        return
    for pattern, value in patterns.items():
        if not _is_positive(value, is_whole):
            yield name, f"must be a positive number for {pattern!r}, is {value!r}", _BY_HAND
        try:
            re.compile(rf"(.*\.)?({pattern})$")
        except re.error as error:
            yield name, f"{pattern!r} is no regular expression: {first_line(error)}", _BY_HAND


def _is_positive(value: object, is_whole: bool) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        return False
    return not is_whole or value == int(value)


def _is_list(value: object, kind: type) -> bool:
    return isinstance(value, list) and all(type(item) is kind for item in value)
