"""What of a causal language model is its embedding, its head and its body: asked of the model itself, without weights.

There is no list of architectures: whatever transformers builds as a causal language model can be an expert if it reads
`inputs_embeds`, keeps its state in `past_key_values`, and has nothing but a linear map behind its decoder.
"""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from mediator_cli.errors import BundleError, Problem
from mediator_cli.runtime.mixable import empty_model
from mediator_cli.runtime.parameters import match_parameters

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from transformers import PreTrainedModel

    from mediator_cli.runtime.parameters import Loaded, Owner

_NEEDED = ("inputs_embeds", "past_key_values", "attention_mask")
_ON_LOGITS = re.compile(r"^(?!attn|attention|router|output_router|num_|return_)\w*(logit|lm_head)\w*")
"""Fields of configs that say what is done to logits; those of attention and routers say nothing of the head."""
_FACTORS = {"logit_scale": 1, "logits_scaling": -1, "lm_head_multiplier": 1}
"""Fields that scale logits, and the power of their value by which: these go into the head's rows."""
_NEUTRAL = (None, False, 0, 1, 0.0, 1.0)


@dataclass(frozen=True)
class Body:
    """The parts of one model, by the names of its stored tensors.

    `width` is that of its states; `tensors` are those of the body by their names in the model without head. The rows
    of `embedding` and `head` are to be multiplied by their factors; `head` is the embedding where both are one.
    """

    width: int
    embedding: str
    embedding_factor: float
    head: str
    head_factor: float
    head_bias: str | None
    tensors: Mapping[str, str]

    @property
    def is_tied(self) -> bool:
        """Whether the head's rows are those of the embedding."""
        return self.embedding == self.head and self.embedding_factor == self.head_factor


def find_body(config: Mapping[str, Any], names: Iterable[str]) -> Body:
    """Take a causal language model apart by its config and the names of its stored tensors.

    Raises BundleError whose message is the reason why it can be no expert.
    """
    listed = list(names)
    model = empty_model(config)
    problems = list(_unfit(model))
    if problems:
        raise BundleError(problems)
    loaded = match_parameters(model, listed)
    if loaded.missing:
        raise BundleError(Problem("", f"lacks the tensor {loaded.missing[0]}"))
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    by_module = {(id(owner.module), owner.name): name for name, group in loaded.owners.items() for owner in group}
    outside = {by_module.get((id(module), name)) for module in (embedding, head) for name in ("weight", "bias")}
    return Body(
        width=int(head.weight.shape[1]),
        embedding=by_module[id(embedding), "weight"],
        embedding_factor=_embedding_factor(embedding) or 1.0,
        head=by_module[id(head), "weight"],
        head_factor=_head_factor(config),
        head_bias=by_module.get((id(head), "bias")),
        tensors=dict(_body_tensors(model, loaded, [name for name in listed if name not in outside])),
    )


def _unfit(model: PreTrainedModel) -> Iterator[Problem]:
    """Say why a model can be no expert."""
    body, embedding, head = model.base_model, model.get_input_embeddings(), model.get_output_embeddings()
    if body is model or not isinstance(embedding, nn.Embedding) or not isinstance(head, nn.Linear):
        yield Problem("", "is not an embedding, a decoder and a linear head")
        return
    known = inspect.signature(body.forward).parameters
    yield from (Problem("", f"does not take `{name}`") for name in _NEEDED if name not in known)
    if embedding.embedding_dim != head.in_features:
        yield Problem("", f"has embeddings of width {embedding.embedding_dim} and states of {head.in_features}")
    if _embedding_factor(embedding) is None:
        yield Problem("", f"has embeddings that are more than rows ({type(embedding).__name__})")
    if other := _other_embeddings(body, embedding):
        yield Problem("", f"reads token ids past its embedding ({other})")
    inside = {id(parameter) for part in (body, head) for parameter in part.parameters()}
    beside = [name for name, parameter in model.named_parameters() if id(parameter) not in inside]
    if beside:
        yield Problem("", f"has parameters beside its decoder and head, such as {beside[0]}")
    yield from _head_faults(model.config.to_dict())


def _other_embeddings(body: nn.Module, embedding: nn.Embedding) -> str:
    """Name a table with a row per token beside the embedding; positions are no tokens."""
    for path, module in body.named_modules():
        is_of_tokens = isinstance(module, nn.Embedding) and module.num_embeddings >= embedding.num_embeddings
        if is_of_tokens and module is not embedding and not re.search("pos|wpe", path):
            return str(path)
    return ""


def _embedding_factor(embedding: nn.Module) -> float | None:
    """Find the factor on looked-up rows; None where more is done to them than that."""
    if type(embedding).forward is nn.Embedding.forward:
        return 1.0
    found = getattr(embedding, "scalar_embed_scale", getattr(embedding, "embed_scale", None))
    return float(found) if isinstance(found, int | float) and not isinstance(found, bool) else None


def _head_faults(config: Mapping[str, Any]) -> Iterator[Problem]:
    """Tell what a model does to its logits that a linear head cannot."""
    for name, value in config.items():
        if _ON_LOGITS.match(name) and name not in _FACTORS and not isinstance(value, str) and value not in _NEUTRAL:
            yield Problem("", f"does more than a linear head to its logits (`{name}: {value}`)")


def _head_factor(config: Mapping[str, Any]) -> float:
    factor = 1.0
    for name, power in _FACTORS.items():
        value = config.get(name)
        factor *= float(value) ** power if value is not None else 1.0
    return factor


def _body_tensors(model: PreTrainedModel, loaded: Loaded, names: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Name the stored tensors of the body as in the model without head."""
    prefix = f"{model.base_model_prefix}."
    # Numbers that are kept beside the parameters, such as those that balance a router.
    buffers = set(model.base_model.state_dict())
    for name in names:
        if name in loaded.owners:
            yield _key(loaded.owners[name][0]).removeprefix(prefix), name
        elif name in loaded.made or name.removeprefix(prefix) in buffers:
            yield name.removeprefix(prefix), name


def _key(owner: Owner) -> str:
    return f"{owner.path}.{owner.name}"
