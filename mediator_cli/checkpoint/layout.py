"""Layers, blocks and module kinds, found from tensor names and the config, with no list of architectures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

Granularity = Literal["layer", "block", "tensor"]
_COUNT_FIELDS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_ENCODER_FIELDS, _DECODER_FIELDS = ("encoder_layers", "num_layers"), ("decoder_layers", "num_decoder_layers")
_TEXT_CONFIGS = ("text_config", "llm_config", "language_config")
_EXTRA_FIELDS = ("num_nextn_predict_layers", "mtp_num_hidden_layers")
"""Layers that predict further tokens: checkpoints may store them behind the others."""


@dataclass(frozen=True)
class Place:
    """Where a tensor stands: its decoder layer (None outside), the modules inside that layer, its parameter."""

    layer: str | None
    modules: tuple[str, ...]
    parameter: str

    @property
    def kind(self) -> str:
        """The module kind, such as `q_proj`; layers of a model have the same kinds."""
        return self.modules[-1] if self.modules else self.parameter


def place_of(name: str) -> Place:
    """Take a tensor name apart at its first number, which counts the layers; later ones count experts and the like.

    >>> place_of("model.layers.3.mlp.experts.7.up_proj.weight")
    Place(layer='model.layers.3', modules=('mlp', 'experts', '7', 'up_proj'), parameter='weight')
    >>> place_of("model.norm.weight")
    Place(layer=None, modules=('model', 'norm'), parameter='weight')
    """
    parts = name.split(".")
    at = next((n for n, part in enumerate(parts[:-1]) if part.isdigit() and n > 0), None)
    if at is None:
        return Place(None, tuple(parts[:-1]), parts[-1])
    return Place(".".join(parts[: at + 1]), tuple(parts[at + 1 : -1]), parts[-1])


def unit_of(name: str, granularity: Granularity) -> str:
    """Name the unit of assignment that a tensor belongs to.

    >>> unit_of("model.layers.3.self_attn.q_proj.weight", "block")
    'model.layers.3.self_attn'
    >>> unit_of("model.embed_tokens.weight", "layer")
    'model.embed_tokens'
    """
    if granularity == "tensor":
        return name
    place = place_of(name)
    if place.layer is None:
        return ".".join(place.modules) or name
    if granularity == "block":
        return ".".join((place.layer, *place.modules[:1]))
    return place.layer


def layers_of(names: Iterable[str]) -> tuple[str, ...]:
    """List the decoder layers in the order of their numbers, stack by stack."""
    found = dict.fromkeys(layer for name in names if (layer := place_of(name).layer) is not None)
    return tuple(sorted(found, key=_stack_and_number))


def natural_key(name: str) -> tuple[tuple[bool, int, str], ...]:
    """Sort key that puts layer 2 before layer 10, so that order does not depend on how files are sharded.

    >>> sorted(["layers.10.w", "layers.2.w", "embed"], key=natural_key)
    ['embed', 'layers.2.w', 'layers.10.w']
    """
    return tuple((part.isdigit(), int(part) if part.isdigit() else 0, part) for part in name.split("."))


def _stack_and_number(layer: str) -> tuple[str, int]:
    stack, _, number = layer.rpartition(".")
    return stack, int(number)


def stacks_of(names: Iterable[str]) -> dict[str, list[int]]:
    """List the numbers of the layers of each stack, without modules of sequences, which may have gaps.

    >>> stacks_of(["model.layers.0.mlp.w", "model.layers.1.mlp.w", "conv.0.weight"])
    {'model.layers': [0, 1]}
    """
    stacks: dict[str, list[int]] = {}
    for layer in layers_of(name for name in names if not _is_of_sequence(name)):
        stack, number = _stack_and_number(layer)
        stacks.setdefault(stack, []).append(number)
    return stacks


def layer_counts(config: Mapping[str, Any]) -> tuple[int, ...]:
    """Give the number of layers of each stack of a model's text, as its config counts them.

    >>> layer_counts({"text_config": {"n_layer": 2}}), layer_counts({})
    ((2,), ())
    """
    return tuple(counts[0] for counts in _layer_counts(config))


def missing_layers(names: Iterable[str], config: Mapping[str, Any]) -> str | None:
    """Say what is wrong when the layers found are not the layers that the config counts.

    Of a model with several stacks, those of its text are counted: encoder and decoder, or the language part.
    """
    stacks = stacks_of(names)
    for stack, numbers in stacks.items():
        if gaps := sorted(set(range(max(numbers) + 1)) - set(numbers)):
            return f"layer {stack}.{gaps[0]} is missing"
    left = {stack: len(numbers) for stack, numbers in stacks.items()}
    for counts in _layer_counts(config) if stacks else ():
        fitting = next((stack for stack, length in left.items() if length in counts), None)
        if fitting is None:
            longest = max(left or {stack: len(n) for stack, n in stacks.items()}, key=lambda each: len(stacks[each]))
            return f"the config counts {counts[0]} layers, the tensors have {len(stacks[longest])} ({longest})"
        del left[fitting]
    return None


def _is_of_sequence(name: str) -> bool:
    """Whether a number stands right before `weight`: modules of a sequence have gaps where one has no weights."""
    place = place_of(name)
    return not place.modules and place.parameter in ("weight", "bias")


def _layer_counts(config: Mapping[str, Any]) -> list[tuple[int, ...]]:
    """Give the numbers of layers that each stack of a model's text may have.

    >>> _layer_counts({"num_hidden_layers": 4}), _layer_counts({"text_config": {"n_layer": 2}, "depth": 9})
    ([(4,)], [(2,)])
    >>> _layer_counts({"is_encoder_decoder": True, "num_layers": 2, "num_decoder_layers": 3})
    [(2,), (3,)]
    """
    if config.get("is_encoder_decoder"):
        encoder = _first_number(config, (*_ENCODER_FIELDS, *_COUNT_FIELDS))
        decoder = _first_number(config, _DECODER_FIELDS) or encoder
        return [] if encoder is None or decoder is None else [(encoder,), (decoder,)]
    count = _first_number(config, _COUNT_FIELDS)
    if count is not None:
        extra = _first_number(config, _EXTRA_FIELDS)
        return [(count, count + extra) if extra else (count,)]
    nested = next((config[name] for name in _TEXT_CONFIGS if isinstance(config.get(name), dict)), None)
    return _layer_counts(nested) if nested is not None else []


def _first_number(config: Mapping[str, Any], fields: Iterable[str]) -> int | None:
    return next((config[name] for name in fields if isinstance(config.get(name), int)), None)
