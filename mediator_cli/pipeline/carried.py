"""What of a fine-tune an adapter can carry: matrices of modules as factors, other tensors whole, if asked."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Literal

from mediator_cli.checkpoint.adapter.products import stored_flipped
from mediator_cli.checkpoint.layout import place_of
from mediator_cli.plan.tokens.tensors import token_embeddings

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from mediator_cli.plan.model import Plan, TensorPlan

Kind = Literal["linear", "embedding", "other"]
_TASKS = (
    ("ForCausalLM", "CAUSAL_LM"),
    ("LMHeadModel", "CAUSAL_LM"),
    ("ForSequenceClassification", "SEQ_CLS"),
    ("ForTokenClassification", "TOKEN_CLS"),
    ("ForQuestionAnswering", "QUESTION_ANS"),
    ("ForConditionalGeneration", "SEQ_2_SEQ_LM"),
)
_GATES = ("gate", "router", "wg")
VOCABULARY = "is an embedding or a head; give --embeddings"
TIED = "is embedding and head in one, which factors cannot change"
_TIED_BY_PEFT = "embed_tokens"
"""The name of an embedding that PEFT keeps tied to its head."""


@dataclass(frozen=True)
class Part:
    """One tensor: how an adapter carries it, or the `reason` why not. What is flipped is stored [in, out]."""

    tensor: TensorPlan
    kind: Kind
    reason: str = ""
    is_flipped: bool = False

    @property
    def module(self) -> str:
        """The module that it is a parameter of."""
        return self.tensor.name.rpartition(".")[0]


@dataclass(frozen=True)
class Choice:
    """Which tensors are looked at: globs on their names, and whether those with a row per token may change."""

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    embeddings: bool = False

    def takes(self, name: str) -> bool:
        """Whether a tensor is chosen."""
        is_in = not self.include or any(fnmatchcase(name, glob) for glob in self.include)
        return is_in and not any(fnmatchcase(name, glob) for glob in self.exclude)


def find_parts(plan: Plan, choice: Choice) -> list[Part]:
    """Say of each chosen tensor that is merged how an adapter carries it."""
    tensors = [tensor for tensor in plan.tensors if tensor.average is not None and choice.takes(tensor.name)]
    flipped = stored_flipped(plan.base.tensors)
    layers = {place_of(tensor.name).layer for tensor in plan.tensors if ".experts." in tensor.name}
    tied = token_embeddings(plan.base.tensors, plan.base.config) if is_tied(plan) else ()
    ground = _Ground(flipped, frozenset(layers), frozenset(tied), choice.embeddings)
    return [_part(tensor, ground) for tensor in tensors]


def is_tied(plan: Plan) -> bool:
    """Whether the head of the base is its embedding: the config says so, or a model with a head stores none."""
    has_head = any(tensor.role == "head" for tensor in plan.tensors)
    return not has_head and (plan.base.is_tied or task_type(plan.base.config) in ("CAUSAL_LM", "SEQ_2_SEQ_LM"))


def task_type(config: Mapping[str, Any]) -> str | None:
    """Say in PEFT's words what a model is for, by its class; None where PEFT has no word for it."""
    names = config.get("architectures") or [""]
    found = (task for end, task in _TASKS if str(names[0]).endswith(end))
    return next(found, None)


@dataclass(frozen=True)
class _Ground:
    """The layers whose weights are flipped, those with experts, embeddings that are heads too, and what is asked."""

    flipped: Mapping[str | None, bool]
    expert_layers: frozenset[str | None]
    tied: frozenset[str]
    takes_embeddings: bool


def _part(tensor: TensorPlan, ground: _Ground) -> Part:
    place = place_of(tensor.name)
    if reason := _reason(tensor, ground):
        return Part(tensor, "other", reason)
    if tensor.role == "embedding":
        return Part(tensor, "embedding")
    return Part(tensor, "linear", is_flipped=ground.flipped.get(place.layer, False))


def _reason(tensor: TensorPlan, ground: _Ground) -> str:
    """Say why factors cannot change a tensor; empty where they can."""
    name, place = tensor.name, place_of(tensor.name)
    if place.layer in ground.expert_layers and (".experts." in name or place.kind in _GATES):
        return "belongs to experts, which are one tensor in memory"
    if len(tensor.shape) != 2:
        return "is a vector" if len(tensor.shape) < 2 else f"has {len(tensor.shape)} dimensions"
    if not name.endswith(".weight"):
        return "is not the weight of a module"
    if tensor.role == "linear" or (ground.takes_embeddings and name not in ground.tied):
        return ""
    return TIED if ground.takes_embeddings else VOCABULARY


@dataclass(frozen=True)
class Saved:
    """A tensor that is stored whole, its name in the file, and its module where all of that is stored."""

    tensor: str
    name: str
    module: str = ""


def find_saved(parts: Sequence[Part], names: Sequence[str], carried: Iterable[str]) -> Iterator[Saved]:
    """Say which of these tensors can be stored whole, and what goes with them.

    `names` are those of all tensors of the base. Biases of modules with factors stand beside these; a saved module has
    all of its parameters; PEFT wants an embedding that is the head under both names.
    """
    modules, wrapped = {name.rpartition(".")[0] for name in names}, set(carried)
    for part in parts:
        module = part.module
        if part.tensor.name.endswith(".bias") and module in wrapped:
            yield Saved(part.tensor.name, f"{module}.base_layer.bias")
        elif part.reason == TIED and place_of(part.tensor.name).kind != _TIED_BY_PEFT:
            continue
        elif module and module not in wrapped and not any(other.startswith(f"{module}.") for other in modules):
            yield from (Saved(name, name, module) for name in names if name.rpartition(".")[0] == module)
            if part.reason == TIED:
                yield Saved(part.tensor.name, "lm_head.weight")
