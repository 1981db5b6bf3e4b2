"""The stack of decoder layers of a model, and the same model with another number of them. Names and shapes only."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from mediator_cli.checkpoint.layout import layer_counts, place_of, stacks_of
from mediator_cli.plan.keep import language_part

if TYPE_CHECKING:
    from mediator_cli.checkpoint.source import Checkpoint


def find_stem(model: Checkpoint) -> str | None:
    """Find what the names of all decoder layers begin with, such as `model.layers`; None where it is not clear."""
    language = language_part(model)
    stems = stacks_of(model.tensors if language is None else language)
    counts = layer_counts(model.config)
    if len(counts) == 1 and len(stems) > 1:
        stems = {stem: numbers for stem, numbers in stems.items() if len(numbers) == counts[0]}
    return next(iter(stems)) if len(stems) == 1 and len(counts) < 2 else None


def number_in(name: str, stem: str) -> int | None:
    """Give the number of a tensor's layer in a stack; None outside of it.

    >>> number_in("model.layers.12.mlp.w", "model.layers"), number_in("vision.layers.1.w", "model.layers")
    (12, None)
    """
    layer = place_of(name).layer
    if layer is None or layer.rpartition(".")[0] != stem:
        return None
    return int(layer.rpartition(".")[2])


def renumbered(name: str, stem: str, number: int) -> str:
    """Give the name of the same tensor in another layer.

    >>> renumbered("model.layers.12.mlp.w", "model.layers", 3)
    'model.layers.3.mlp.w'
    """
    rest = name.removeprefix(f"{stem}.").partition(".")[2]
    return f"{stem}.{number}.{rest}"


def depth_of(model: Checkpoint, stem: str) -> int:
    """Count the layers that take part: those that the config counts, without any that are stored behind them."""
    counts = layer_counts(model.config)
    numbers = [number for name in model.tensors if (number := number_in(name, stem)) is not None]
    stored = max(numbers, default=-1) + 1
    return min(counts[0], stored) if counts and stored else counts[0] if counts else stored


def with_depth(model: Checkpoint, stem: str, count: int) -> Checkpoint:
    """Give a model with as many layers: those that it lacks are like its last one, those behind go along."""
    own = depth_of(model, stem)
    tensors = {}
    for name, info in model.tensors.items():
        number = number_in(name, stem)
        if number is None or number < min(own, count):
            tensors[name] = info
        elif number >= own:
            tensors[renumbered(name, stem, number - own + count)] = info
        if number == own - 1:
            tensors |= {renumbered(name, stem, at): info for at in range(own, count)}
    return replace(model, tensors=tensors)
