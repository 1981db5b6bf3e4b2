"""The low-rank pairs of an adapter, checked by themselves: which tensor in memory each changes, its rank and scale."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from mediator_cli.checkpoint.adapter.changes import Rows
from mediator_cli.errors import Problem, some_names

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    from mediator_cli.checkpoint.adapter.config import AdapterConfig
    from mediator_cli.checkpoint.adapter.parts import Parts
    from mediator_cli.checkpoint.header import TensorInfo

    Roles = Mapping[str, TensorInfo]

DAMAGED = "the file is damaged"
_BY_HAND = "was the file edited by hand?"
_IN_ORDER = ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")
"""Parameters of one module as transformers defines them: PEFT wraps the first one innermost."""


class Fault(NamedTuple):
    """What is wrong with one tensor; faults that say the same are told as one problem."""

    name: str
    message: str
    hint: str


def to_problems(file: Path, faults: Iterable[Fault]) -> list[Problem]:
    """Join faults that say the same of several tensors."""
    names: dict[tuple[str, str], list[str]] = {}
    for fault in faults:
        names.setdefault((fault.message, fault.hint), []).append(fault.name)
    return [Problem(f"{file}: {some_names(known)}", *said) for said, known in names.items()]


@dataclass(frozen=True)
class Pair:
    """scale · B·A for one tensor in memory; with experts, one such product for each, side by side in A and B."""

    tensor: str
    a: TensorInfo
    b: TensorInfo
    rank: int
    scale: float
    n_experts: int = 1
    is_embedding: bool = False
    magnitude: TensorInfo | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the tensor, if it is stored rows first."""
        if self.is_embedding:
            return (self.a.shape[1], self.b.shape[0])
        matrix = (self.b.shape[0], *self.a.shape[1:])
        return matrix if self.n_experts == 1 else (self.n_experts, *matrix)

    @property
    def is_square(self) -> bool:
        """Whether the shape of its matrices does not tell rows from columns."""
        return self.shape[-2:] == self.shape[:-3:-1]

    def __str__(self) -> str:
        return f"B {list(self.b.shape)} · A {list(self.a.shape)}"


def find_pairs(parts: Parts, config: AdapterConfig, base: Iterable[str]) -> tuple[list[Pair], list[Fault]]:
    """Pair the factors of all modules; `base` are the names of the base's tensors."""
    modules = {".".join(name.split(".")[-2:]) for name in base}
    by_module: dict[str, dict[int, Roles]] = {}
    for wrapped, roles in parts.wraps.items():
        if set(roles) != {"tokens"}:
            by_module.setdefault(wrapped.module, {})[wrapped.depth] = roles
    pairs: list[Pair] = []
    faults: list[Fault] = []
    for module, layers in by_module.items():
        names = _tensors_of(module, len(layers), config, modules)
        if names is None or set(layers) != set(range(len(layers))):
            message = f"has {len(layers)} wrapped parameters, target_parameters does not say which"
            faults.append(Fault(module, message, "merge the adapter into its base with PEFT's merge_and_unload"))
            continue
        for depth, (tensor, key) in enumerate(names):
            pair = _pair(module, tensor, key, layers[depth], config)
            if isinstance(pair, Fault):
                faults.append(pair)
            else:
                pairs.append(pair)
    return pairs, faults


def _tensors_of(module: str, count: int, config: AdapterConfig, known: set[str]) -> list[tuple[str, str]] | None:
    """Name the tensors that a module's wrappers change, outermost first, each with its key for rank_pattern."""
    targets = [target.rpartition(".") for target in config.target_parameters]
    ours = {name for owner, _, name in targets if not owner or f".{module}".endswith(f".{owner}")}
    last = module.rpartition(".")[2]
    if f"{last}.weight" in known or not ours:
        tensor = f"{module}.weight"
        return [(tensor, tensor if "weight" in ours else module)] if count == 1 else None
    if last == "experts" or not any(f"{last}.{name}" in known for name in ours):
        ours &= set(_IN_ORDER) if len(ours) > count else ours
    else:
        ours = {name for name in ours if f"{last}.{name}" in known}
    if len(ours) != count or (count > 1 and not ours <= set(_IN_ORDER)):
        return None
    names = [name for name in reversed(_IN_ORDER) if name in ours] if count > 1 else sorted(ours)
    return [(f"{module}.{name}", f"{module}.{name}") for name in names]


def _pair(module: str, tensor: str, key: str, roles: Roles, config: AdapterConfig) -> Pair | Fault:
    is_embedding = "lora_embedding_A" in roles or "lora_embedding_B" in roles
    prefix = "lora_embedding_" if is_embedding else "lora_"
    a, b = roles.get(f"{prefix}A"), roles.get(f"{prefix}B")
    if a is None or b is None:
        alone = [role for role in roles if role.startswith("lora_")]
        return Fault(module, f"has {alone[0]} alone" if alone else f"has {next(iter(roles))} without factors", DAMAGED)
    if said := _disagreement(roles, config, is_embedding):
        return Fault(module, *said)
    rank = config.rank_of(key)
    is_matrix = len(a.shape) >= 2 and not (is_embedding and len(a.shape) > 2)
    if not is_matrix or a.shape[:1] != b.shape[1:2] or any(size != 1 for size in b.shape[2:]):
        return Fault(tensor, f"B {list(b.shape)} · A {list(a.shape)} do not fit together", DAMAGED)
    n_experts, rest = divmod(a.shape[0], rank)
    is_stack = n_experts > 1 and not rest and len(a.shape) == 2 and not tensor.endswith(".weight")
    if is_stack and "magnitude" in roles:
        return Fault(tensor, "has magnitudes for stacked experts, which PEFT does not define", _BY_HAND)
    if a.shape[0] != rank and not is_stack:
        return Fault(tensor, f"has rank {a.shape[0]}, adapter_config.json says r={rank}", _BY_HAND)
    return Pair(tensor, a, b, rank, config.scale_of(key), n_experts, is_embedding, roles.get("magnitude"))


def _disagreement(roles: Roles, config: AdapterConfig, is_embedding: bool) -> tuple[str, str] | None:
    """Say where the file holds more, or less, than the config says: PEFT would pass over it, or make it up."""
    for role, setting, expected in (
        ("magnitude", "use_dora", config.has_magnitudes),
        ("bias", "lora_bias", config.has_bias and not is_embedding),
    ):
        if (role in roles) != expected:
            found, said = ("has a", "not set") if role in roles else ("has no", "set")
            return f"{found} {role} but {setting} is {said} in adapter_config.json", _BY_HAND
    return None


def find_absent(parts: Parts, config: AdapterConfig) -> Iterator[Fault]:
    """Tell what the config promises and the file does not hold at all."""
    promised = {
        "modules_to_save": bool(config.modules_to_save) and not parts.wholes,
        "trainable_token_indices": config.token_indices
        and not any("tokens" in roles for roles in parts.wraps.values()),
    }
    for setting, is_absent in promised.items():
        if is_absent:
            yield Fault(setting, "is set in adapter_config.json, but the file holds nothing for it", DAMAGED)


def find_rows(parts: Parts, config: AdapterConfig) -> Iterator[tuple[str, Rows] | Fault]:
    """List the tensors in memory of which single rows were trained."""
    for wrapped, roles in parts.wraps.items():
        if "tokens" not in roles:
            continue
        module, info = wrapped.module, roles["tokens"]
        keys = [key for key in config.token_indices if not key or f".{module}".endswith(f".{key}")]
        numbers = config.token_indices[max(keys, key=len)] if keys else ()
        if len(info.shape) != 2 or info.shape[0] != len(numbers):
            message = f"has rows {list(info.shape)}, trainable_token_indices names {len(numbers)} tokens"
            yield Fault(f"{module}.weight", message, _BY_HAND)
        else:
            yield f"{module}.weight", Rows(info, numbers)
