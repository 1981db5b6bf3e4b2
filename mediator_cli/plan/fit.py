"""Fit an expert's tensors to the base's: the same tensors under other names, fused or split, or not at all.

Nothing is left out silently: what does not fit is a problem, what was changed or passed over is a notice.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from mediator_cli.checkpoint.fused import find_singles, fuse, fused_shape, is_fused, other_modules, split
from mediator_cli.checkpoint.header import FLOAT_DTYPES
from mediator_cli.checkpoint.layout import place_of
from mediator_cli.checkpoint.matching import match_names
from mediator_cli.checkpoint.spans import Part, Span
from mediator_cli.errors import Problem, some_names
from mediator_cli.plan.tokens.tensors import token_embeddings, vocabulary_tensors

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from mediator_cli.checkpoint.source import Checkpoint
    from mediator_cli.checkpoint.spans import Layout

_HEAD = "lm_head.weight"
_BUFFERS = ("*.rotary_emb.inv_freq", "*.attn.masked_bias", "*.attention.masked_bias", "*.position_ids")
"""What old versions of transformers stored though it is no parameter."""
_FINE_TUNE = "all experts must be fine-tunes of the base"


@dataclass(frozen=True)
class Fit:
    """How an expert's tensors become the base's: `layout` for those stored otherwise, and what there is to say."""

    layout: Layout = field(default_factory=dict)
    notices: tuple[str, ...] = ()
    problems: tuple[Problem, ...] = ()


def own_tensors(checkpoint: Checkpoint) -> Checkpoint:
    """Leave out what is stored but is no parameter of its own: the copy of a tied head, buffers of old versions."""
    heads = [name for name in checkpoint.tensors if name.endswith(_HEAD)] if checkpoint.is_tied else []
    if len(checkpoint.tensors) == len(heads):
        return checkpoint
    kept = {
        name: info
        for name, info in checkpoint.tensors.items()
        if name not in heads and not any(fnmatchcase(f".{name}", pattern) for pattern in _BUFFERS)
    }
    return replace(checkpoint, tensors=kept)


def fit_expert(
    place: str, name: str, base: Checkpoint, expert: Checkpoint, copied: frozenset[str], patterns: Sequence[str]
) -> Fit:
    """Find each tensor of the base in an expert; those in `copied` may be missing and are never read from it.

    Tensors of the expert that the base lacks are problems, unless one of the globs `patterns` names them.
    """
    where = f"{place}: {expert.path}"
    if fault := _other_type(base, expert):
        return Fit(problems=(Problem(where, fault, _FINE_TUNE),))
    made = _find_all(name, base, expert)
    extra = [key for key in expert.tensors if key not in made.used and not _matches(key, patterns)]
    missing = [key for key in base.tensors if key not in made.found and key not in made.layout and key not in copied]
    compared = {key: own for key, own in made.found.items() if key not in copied}
    problems = (*_unmatched(where, missing, extra), *_misfits(where, base, expert, compared))
    layout = {key: spans for key, spans in made.layout.items() if key not in copied}
    return Fit(layout, tuple(_notices(name, base, expert, compared, layout)), problems)


@dataclass(frozen=True)
class _Found:
    """Names of the base found under one name of the expert, the layout of all that is stored otherwise, names used."""

    found: Mapping[str, str]
    layout: Mapping[str, tuple[Span, ...]]
    used: frozenset[str]


def _find_all(name: str, base: Checkpoint, expert: Checkpoint) -> _Found:
    ours = {key: info.shape for key, info in base.tensors.items()}
    theirs = {key: info.shape for key, info in expert.tensors.items()}
    found = match_names(ours, theirs)
    ours = {key: shape for key, shape in ours.items() if key not in found}
    matched = set(found.values())
    theirs = {key: shape for key, shape in theirs.items() if key not in matched}
    layout: dict[str, tuple[Span, ...]] = {}
    used: set[str] = set()
    our_modules, their_modules = _by_layer(ours), _by_layer(theirs)
    for module, other in other_modules(ours, theirs).items():
        mine, own = our_modules[place_of(f"{module}.weight").layer], their_modules[place_of(f"{other}.weight").layer]
        for made, members in _refit_experts(name, (module, mine), (other, own)):
            layout |= made
            used.update(members)
        # The gate has moved with its experts.
        moved = {key: other + key.removeprefix(module) for key in mine if key.startswith(f"{module}.")}
        found |= {key: name for key, name in moved.items() if name in own and name not in used}
    layout |= {key: _whole(name, own, expert) for key, own in found.items() if own != key}
    layout |= _tied_head(name, base, expert, {*found, *layout})
    return _Found(found, layout, frozenset({*used, *found.values()}))


_Shapes = dict[str, tuple[int, ...]]


def _by_layer(shapes: _Shapes) -> dict[str | None, _Shapes]:
    layers: dict[str | None, _Shapes] = {}
    for name, shape in shapes.items():
        layers.setdefault(place_of(name).layer, {})[name] = shape
    return layers


def _refit_experts(
    name: str, ours: tuple[str, _Shapes], theirs: tuple[str, _Shapes]
) -> Iterator[tuple[dict[str, tuple[Span, ...]], tuple[str, ...]]]:
    """Fuse or split the experts of one MoE layer; give the layout and the expert's tensors that it uses."""
    (module, our_shapes), (other, their_shapes) = ours, theirs
    for fused, shape in our_shapes.items():
        singles = find_singles(fused, other, their_shapes) if fused.startswith(f"{module}.") else None
        if singles and fused_shape(singles, their_shapes) == shape:
            yield {fused: fuse(name, singles, their_shapes)}, singles.members
    for fused, shape in their_shapes.items():
        singles = find_singles(fused, module, our_shapes) if fused.startswith(f"{other}.") else None
        if singles and fused_shape(singles, our_shapes) == shape:
            yield split(name, singles, fused, our_shapes), (fused,)


def _whole(name: str, own: str, expert: Checkpoint) -> tuple[Span, ...]:
    return (Span(expert.tensors[own].size, (Part(name, own, 0),)),)


def _tied_head(name: str, base: Checkpoint, expert: Checkpoint, known: set[str]) -> dict[str, tuple[Span, ...]]:
    """Read the head of an expert that ties it to its embeddings, where the base has a head of its own."""
    heads = [key for key in base.tensors if key.endswith(_HEAD) and key not in known] if expert.is_tied else []
    embeddings = token_embeddings(expert.tensors, expert.config)
    return {key: _whole(name, embeddings[0], expert) for key in heads if len(embeddings) == 1}


def _other_type(base: Checkpoint, expert: Checkpoint) -> str:
    ours, theirs = base.config.get("model_type"), expert.config.get("model_type")
    inside = base.config.get("text_config")
    if ours == theirs:
        return ""
    if isinstance(inside, dict):
        # The language part has a type of its own, or that of the family: gemma3_text, llama, qwen2_vl_text.
        own = str(inside.get("model_type"))
        if theirs in (own, own.removesuffix("_text")) or str(ours).startswith(str(theirs)):
            return ""
    return f"other architecture: model_type {theirs}, the base is {ours}"


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _unmatched(where: str, missing: list[str], extra: list[str]) -> Iterator[Problem]:
    if missing:
        hint = "is the checkpoint complete? `keep_base: [GLOB]` takes tensors from the base alone"
        yield Problem(where, f"lacks tensor {some_names(missing)}", hint)
    if extra:
        hint = f"{_FINE_TUNE}; `keep_base: [GLOB]` passes tensors over"
        if all(key.endswith(_HEAD) for key in extra):
            hint = "is the head untied? tie_word_embeddings must be as in the base"
        yield Problem(where, f"has tensor {some_names(extra)}, which the base lacks", hint)


def _misfits(where: str, base: Checkpoint, expert: Checkpoint, found: Mapping[str, str]) -> Iterator[Problem]:
    rows = vocabulary_tensors(base.tensors, base.config)
    for key, own in found.items():
        mine, info = base.tensors[key], expert.tensors[own]
        has_other_rows = key in rows and mine.shape[1:] == info.shape[1:]
        if mine.shape != info.shape and not has_other_rows:
            message = f"shape {list(info.shape)}, the base has {list(mine.shape)}"
            yield Problem(f"{where} {own}", message, _FINE_TUNE)
        if (mine.dtype in FLOAT_DTYPES) != (info.dtype in FLOAT_DTYPES):
            yield Problem(f"{where} {own}", f"dtype {info.dtype}, the base has {mine.dtype}", _FINE_TUNE)


def _notices(
    name: str, base: Checkpoint, expert: Checkpoint, found: Mapping[str, str], layout: Mapping[str, object]
) -> Iterator[str]:
    if renamed := [(own, key) for key, own in found.items() if own != key]:
        own, key = renamed[0]
        yield f"expert {name} names {len(renamed)} tensors otherwise: {own} is the base's {key}"
    if experts := [key for key in layout if key not in found and not key.endswith(_HEAD)]:
        form = "one tensor each" if is_fused(experts[0]) else "fused"
        yield f"expert {name} stores the experts of MoE layers {form}; read in the base's form ({experts[0]})"
    if heads := [key for key in layout if key not in found and key.endswith(_HEAD)]:
        yield f"expert {name} ties its head to its embeddings, the base does not; they are read as its {heads[0]}"
    if base.config.get("model_type") != expert.config.get("model_type"):
        kinds = f"{expert.config.get('model_type')}, the base is {base.config.get('model_type')}"
        yield f"expert {name} is a language model alone ({kinds}); it is merged into the base's language part"
