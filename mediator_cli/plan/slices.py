"""Layers of several models stacked to one: which tensor of the output is made of which tensors of the sources.

A slice is only another naming: each input of a tensor is a virtual checkpoint under the output's names, made of runs of
the sources' tensors. So the engine reads and merges layers from anywhere as it does those of plain experts.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from mediator_cli.checkpoint.adapter.open import Adapter
from mediator_cli.checkpoint.header import FLOAT_DTYPES
from mediator_cli.checkpoint.spans import Part, Span
from mediator_cli.errors import Problem, RecipeError
from mediator_cli.plan.depth import depth_of, find_stem, number_in, renumbered, with_depth
from mediator_cli.plan.keep import find_kept
from mediator_cli.plan.stacked_config import Origin, stacked_config
from mediator_cli.plan.tokens.tensors import token_embeddings
from mediator_cli.recipe.slices import AVERAGE, WITH_SLICES

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from mediator_cli.checkpoint.header import TensorInfo
    from mediator_cli.checkpoint.source import Checkpoint
    from mediator_cli.checkpoint.spans import Layout
    from mediator_cli.plan.keep import Kept
    from mediator_cli.plan.model import ExpertSource, Plan
    from mediator_cli.recipe.load import LoadedRecipe
    from mediator_cli.recipe.text import FieldPath

    Weight = float | tuple[float, ...]
    _Place = tuple[str, str]
    """A source, and the name of a tensor of it as the base would call it."""

BEHIND = -1
"""The group of layers that are stored behind those that count, and stay the base's."""
_INCOMING = re.compile(r"(^|[._])(embed|embeddings?|embed_tokens|word_embeddings\w*|wte|wpe|tok_embeddings)([._]|$)")


@dataclass(frozen=True)
class Made:
    """What an output tensor is made of: its slice, what stands in for the base, and its inputs in their order."""

    group: int
    base: _Place | None
    inputs: tuple[_Place, ...]


@dataclass(frozen=True)
class Stack:
    """The output as if it were stored: tensors and config; what each tensor is made of, and the weights by group.

    A group is a slice, by its number, and after them the tensors outside the layers where they go with none.
    `positions` are those of tensors between the anchors of numbers that change.
    """

    shape: Checkpoint
    made: Mapping[str, Made]
    weights: Mapping[int, tuple[tuple[str, Weight], ...]]
    positions: Mapping[str, float]

    def layouts(self, sizes: Mapping[str, int]) -> dict[str, Layout]:
        """Make the virtual checkpoints: the base, then as many inputs as any tensor has; `sizes` are the output's."""
        most = max(len(made.inputs) for made in self.made.values())
        places: dict[str, dict[str, _Place]] = {"base": {n: m.base for n, m in self.made.items() if m.base}}
        for at in range(most):
            places[f"input {at + 1}"] = {n: m.inputs[at] for n, m in self.made.items() if at < len(m.inputs)}
        return {
            slot: {name: (Span(sizes[name], (Part(source, own, 0),)),) for name, (source, own) in found.items()}
            for slot, found in places.items()
        }


def fitting_base(loaded: LoadedRecipe, base: Checkpoint, expert: Checkpoint) -> Checkpoint:
    """Give the base with as many layers as an expert has, where slices take layers from models of any depth."""
    stem = find_stem(base) if loaded.recipe.slices else None
    return base if stem is None else with_depth(base, stem, _depth(expert, base, stem))


def _depth(expert: Checkpoint, base: Checkpoint, stem: str) -> int:
    # An expert may name its layers otherwise than the base, so its own stem counts.
    own = find_stem(expert)
    return depth_of(expert, own) if own is not None else depth_of(base, stem)


@dataclass(frozen=True)
class _Sources:
    """All sources by name: opened, how many layers each has, and its tensors under the base's names."""

    stem: str
    base: Checkpoint
    experts: Mapping[str, ExpertSource]
    depths: Mapping[str, int]
    shapes: Mapping[str, Checkpoint]

    def config(self, name: str) -> Mapping[str, Any]:
        """Give a source's config; that of the base for an adapter."""
        source = self.base if name == "base" else self.experts[name].source
        return self.base.config if isinstance(source, Adapter) else source.config

    def info(self, name: str, tensor: str) -> TensorInfo:
        """Tell shape and dtype of a tensor; the shape is the base's, as all sources must have the same."""
        like = self.shapes[name].tensors[tensor]
        expert = self.experts.get(name)
        if expert is None or isinstance(expert.source, Adapter):
            return like
        own = expert.layout[tensor][0].parts[0].tensor if tensor in expert.layout else tensor
        return replace(like, dtype=expert.source.tensors[own].dtype) if own in expert.source.tensors else like

    def members(self, name: str, layer: int) -> list[str]:
        """List the tensors of one layer of a source."""
        return [tensor for tensor in self.shapes[name].tensors if number_in(tensor, self.stem) == layer]


def _open(stem: str, base: Checkpoint, experts: Sequence[ExpertSource]) -> _Sources:
    depths = {"base": depth_of(base, stem)}
    for expert in experts:
        source = expert.source
        depths[expert.name] = depths["base"] if isinstance(source, Adapter) else _depth(source, base, stem)
    shapes = {name: with_depth(base, stem, depth) for name, depth in depths.items()}
    return _Sources(stem, base, {expert.name: expert for expert in experts}, depths, shapes)


def stack_layers(
    loaded: LoadedRecipe, base: Checkpoint, experts: Sequence[ExpertSource], problems: Sequence[Problem]
) -> Stack | None:
    """Stack the layers that a recipe's slices name; None without slices.

    Raises RecipeError with the problems known before and all that is wrong with the slices.
    """
    if not loaded.recipe.slices:
        return None
    found = _stacked(loaded, base, experts) if not problems else []
    if not isinstance(found, Stack):
        raise RecipeError(loaded.ordered([*problems, *found]))
    return found


def _stacked(loaded: LoadedRecipe, base: Checkpoint, experts: Sequence[ExpertSource]) -> Stack | list[Problem]:
    stem = find_stem(base)
    if stem is None:
        message = "it is not clear which layers are stacked: the base has several stacks, or none"
        return [Problem(loaded.place("slices"), message, "slices are for models with one stack of decoder layers")]
    sources = _open(stem, base, experts)
    problems = [*_check_ranges(loaded, sources)]
    if problems:
        return problems
    made = {**_layers(loaded, sources), **_outside(loaded, sources)}
    problems = [*_check_kinds(loaded, sources, made)]
    origins = [
        Origin(sources.config(spec.sources[0].source), number)
        for spec in loaded.recipe.slices
        for number in spec.sources[0].layers
    ]
    config = stacked_config(base.config, origins)
    hint = "choose ranges that keep each layer's kind"
    problems += [Problem(loaded.place("slices"), fault, hint) for fault in config.faults]
    if problems:
        return problems
    tensors = {name: replace(sources.info(*(each.inputs[0])), name=name) for name, each in made.items()}
    shape = replace(base, tensors=tensors, config=config.config)
    return Stack(shape, made, _weights(loaded), _positions(loaded, sources, made))


def kept_in(stack: Stack, loaded: LoadedRecipe) -> Kept:
    """Find the tensors of a stack that stay the base's, with the layers behind those that are stacked."""
    kept = find_kept(loaded, stack.shape)
    return replace(kept, names=kept.names | {name for name, made in stack.made.items() if made.group == BEHIND})


def with_stack(plan: Plan, base: Checkpoint, stack: Stack | None) -> Plan:
    """Give the plan of stacked layers the base as it is stored, and the virtual checkpoints that are read instead."""
    if stack is None:
        return plan
    return replace(plan, base=base, inputs=stack.layouts({tensor.name: tensor.size for tensor in plan.tensors}))


def _check_ranges(loaded: LoadedRecipe, sources: _Sources) -> Iterator[Problem]:
    for at, spec in enumerate(loaded.recipe.slices):
        named: list[tuple[str, tuple[int, ...], FieldPath]] = [
            (each.source, each.layers, ("sources", n, "layers")) for n, each in enumerate(spec.sources)
        ]
        named += [("base", spec.base, ("base",))] if spec.base else []
        for name, layers, rest in named:
            depth = sources.depths[name]
            if beyond := [number for number in layers if number >= depth]:
                who = "the base" if name == "base" else f"expert {name}"
                message = f"{who} has no layer {beyond[0]}"
                yield Problem(loaded.place("slices", at, *rest), message, f"its layers are 0 to {depth - 1}")


def _layers(loaded: LoadedRecipe, sources: _Sources) -> dict[str, Made]:
    """Name the origins of all tensors in layers, slice by slice; what is stored behind the layers stays the base's."""
    made: dict[str, Made] = {}
    count = 0
    for group, spec in enumerate(loaded.recipe.slices):
        below = spec.base or spec.sources[0].layers
        for row in range(spec.length):
            first = spec.sources[0]
            for name in sources.members(first.source, first.layers[row]):
                inputs = tuple((s.source, renumbered(name, sources.stem, s.layers[row])) for s in spec.sources)
                base = renumbered(name, sources.stem, below[row])
                has_base = below[row] < sources.depths["base"]
                made[renumbered(name, sources.stem, count)] = Made(group, ("base", base) if has_base else None, inputs)
            count += 1
    return made


def _outside(loaded: LoadedRecipe, sources: _Sources) -> dict[str, Made]:
    recipe, depth = loaded.recipe, sources.depths["base"]
    inside = range(depth)
    names = [name for name in sources.base.tensors if number_in(name, sources.stem) not in inside]
    total = sum(spec.length for spec in recipe.slices)
    made: dict[str, Made] = {}
    for name in names:
        group, inputs = len(recipe.slices), [recipe.outside]
        if recipe.outside == AVERAGE:
            inputs = [expert.name for expert in recipe.experts]
        if recipe.outside == WITH_SLICES:
            group = 0 if _comes_in(name, sources.base) else len(recipe.slices) - 1
            inputs = [each.source for each in recipe.slices[group].sources]
        number = number_in(name, sources.stem)
        if number is not None:
            # Layers behind those that count, which predict further tokens, are the base's and move behind the new ones.
            own = ("base", name)
            made[renumbered(name, sources.stem, number - depth + total)] = Made(BEHIND, own, (own,))
            continue
        made[name] = Made(group, ("base", name), tuple((source, name) for source in inputs))
    return made


def _comes_in(name: str, base: Checkpoint) -> bool:
    """Whether a tensor outside the layers is used before them: embeddings of tokens and positions, and their norms."""
    return name in token_embeddings(base.tensors, base.config) or _INCOMING.search(name) is not None


def _check_kinds(loaded: LoadedRecipe, sources: _Sources, made: Mapping[str, Made]) -> Iterator[Problem]:
    """Refuse layers of different kinds in one, and tensors that cannot be read through another name."""
    told: set[int] = set()
    for name, each in made.items():
        if each.group in told or number_in(name, sources.stem) is None or each.group < 0:
            continue
        place = loaded.place("slices", each.group, "sources")
        missing = [(source, own) for source, own in each.inputs if own not in sources.shapes[source].tensors]
        there = [place for place in each.inputs if place not in missing]
        shapes = {sources.shapes[source].tensors[own].shape for source, own in there}
        if missing or len(shapes) > 1:
            told.add(each.group)
            source, own = (missing or list(each.inputs))[-1]
            message = f"layers of different kinds are merged: {own} of {source} is not like {each.inputs[0][1]}"
            yield Problem(place, message, "merge layers of one kind, or copy them")
        elif sources.info(*each.inputs[0]).dtype not in FLOAT_DTYPES:
            told.add(each.group)
            message = f"{each.inputs[0][1]} is {sources.info(*each.inputs[0]).dtype}, and only floats are stacked"
            yield Problem(place, message, "")


def _weights(loaded: LoadedRecipe) -> dict[int, tuple[tuple[str, Weight], ...]]:
    own: dict[str, Weight] = {expert.name: expert.weight for expert in loaded.recipe.experts}
    found: dict[int, tuple[tuple[str, Weight], ...]] = {BEHIND: (("base", 1.0),)}
    for group, spec in enumerate(loaded.recipe.slices):
        found[group] = tuple(
            (each.source, own.get(each.source, 1.0) if each.weight is None else each.weight) for each in spec.sources
        )
    outside = loaded.recipe.outside
    found[len(loaded.recipe.slices)] = tuple(own.items()) if outside == AVERAGE else ((outside, 1.0),)
    return found


def _positions(loaded: LoadedRecipe, sources: _Sources, made: Mapping[str, Made]) -> dict[str, float]:
    """Place layers between 0 and 1 by their row in the slice, a single one at 1; others as without slices."""
    rows: dict[int, float] = {}
    for spec in loaded.recipe.slices:
        first = len(rows)
        rows |= {first + row: row / (spec.length - 1) if spec.length > 1 else 1.0 for row in range(spec.length)}
    last = 1.0 if loaded.recipe.anchors == "near" else 0.0
    found: dict[str, float] = {}
    for name in made:
        number = number_in(name, sources.stem)
        outside = 0.0 if _comes_in(name, sources.base) else last
        found[name] = outside if number is None else rows.get(number, last)
    return found
