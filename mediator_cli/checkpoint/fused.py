"""Experts of MoE layers: one tensor each, or all of a layer fused into one, as transformers 5 holds them in memory.

`experts.gate_up_proj` [experts, 2·inner, hidden] is, expert by expert, the rows of `gate_proj` (`w1`) and then those of
`up_proj` (`w3`); `experts.down_proj` [experts, hidden, inner] is `down_proj` (`w2`). Either is runs of the other.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

from mediator_cli.checkpoint.layout import place_of
from mediator_cli.checkpoint.spans import Part, Span, joined

if TYPE_CHECKING:
    from collections.abc import Mapping

    Shapes = Mapping[str, tuple[int, ...]]

_SINGLE = re.compile(r"^(?P<module>.+)\.experts\.(?P<expert>\d+)\.(?P<role>[a-z]\w*)\.weight$")
_FUSED = re.compile(r"^(?P<module>.+)\.experts\.(?P<role>gate_up_proj|down_proj)$")
_ROLES = {"gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")), "down_proj": (("down_proj",), ("w2",))}


@dataclass(frozen=True)
class Singles:
    """The single tensors, of as many experts, that make up a fused one, in its order."""

    members: tuple[str, ...]
    n_experts: int


def other_modules(ours: Shapes, theirs: Shapes) -> dict[str, str]:
    """Give, for each module of ours that holds experts, the module of theirs that does so in the same layer."""
    known, found = _modules(ours), _modules(theirs)
    return {module: found[layer] for layer, module in known.items() if layer in found}


def _modules(shapes: Shapes) -> dict[tuple[str, ...], str]:
    # The layer without its prefix, which may differ too.
    modules: dict[tuple[str, ...], str] = {}
    for name in shapes:
        if match := _SINGLE.match(name) or _FUSED.match(name):
            modules[tuple((place_of(name).layer or "").split(".")[-2:])] = match["module"]
    return modules


def is_fused(name: str) -> bool:
    """Whether a tensor holds all experts of a layer.

    >>> is_fused("model.layers.0.mlp.experts.down_proj"), is_fused("model.layers.0.mlp.experts.3.down_proj.weight")
    (True, False)
    """
    return _FUSED.match(name) is not None


def find_singles(fused: str, module: str, shapes: Shapes) -> Singles | None:
    """Find the single tensors below `module` that make up the fused tensor of that name; None where they do not.

    `shapes` are those of that module alone: models have tens of thousands of single tensors.
    """
    match = _FUSED.match(fused)
    if match is None:
        return None
    numbers = sorted({int(m["expert"]) for name in shapes if (m := _SINGLE.match(name)) and m["module"] == module})
    for roles in _ROLES[match["role"]]:
        names = tuple(f"{module}.experts.{number}.{role}.weight" for number in numbers for role in roles)
        if names and numbers == list(range(len(numbers))) and all(name in shapes for name in names):
            return Singles(names, len(numbers))
    return None


def fused_shape(singles: Singles, shapes: Shapes) -> tuple[int, ...] | None:
    """Give the shape that single tensors have when they are fused; None if they do not fit together."""
    found = {shapes[name] for name in singles.members}
    shape = found.pop()
    if found or len(shape) != 2:
        return None
    return (singles.n_experts, len(singles.members) // singles.n_experts * shape[0], shape[1])


def fuse(source: str, singles: Singles, shapes: Shapes) -> tuple[Span, ...]:
    """Make a fused tensor of single ones of a source; `shapes` are those of the single ones."""
    return joined(Span(math.prod(shapes[name]), (Part(source, name, 0),)) for name in singles.members)


def split(source: str, singles: Singles, fused: str, shapes: Shapes) -> dict[str, tuple[Span, ...]]:
    """Make single tensors of the tensor `fused` of a source; `shapes` are those of the single ones."""
    ends = list(accumulate(math.prod(shapes[name]) for name in singles.members))
    starts = [0, *ends[:-1]]
    return {
        name: (Span(end - start, (Part(source, fused, start),)),)
        for name, start, end in zip(singles.members, starts, ends, strict=True)
    }
