"""Which tensors are the base's as they are: those the recipe names, and all but the language part of a larger model."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from mediator_cli.checkpoint.layout import place_of
from mediator_cli.errors import Problem, some_names
from mediator_cli.plan.tokens.tensors import token_embeddings, vocabulary_tensors

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mediator_cli.checkpoint.source import Checkpoint
    from mediator_cli.recipe.load import LoadedRecipe

_SENSES = ("vision_config", "audio_config")
_BESIDE_BLOCKS = ("*.self_attn.*", "*norm.weight", "*.embed_tokens.weight", "lm_head.weight")
"""All but the feed-forward blocks of the models that become a Mixture of Experts."""


@dataclass(frozen=True)
class Kept:
    """The tensors that stay the base's, and what to say of them."""

    names: frozenset[str] = frozenset()
    notices: tuple[str, ...] = ()


def find_kept(loaded: LoadedRecipe, base: Checkpoint) -> Kept:
    """Find the tensors that are not merged: by the recipe's globs, else all outside the language part."""
    patterns = kept_patterns(loaded)
    if patterns is not None:
        return Kept(frozenset(name for name in base.tensors if any(fnmatchcase(name, glob) for glob in patterns)))
    language = language_part(base)
    if language is None:
        return Kept()
    names = [name for name in base.tensors if name not in language]
    notice = f"{len(names)} tensors outside the language part are the base's: {some_names(names)}"
    return Kept(frozenset(names), (f"{notice}; `keep_base: []` merges them too",) if names else ())


def kept_patterns(loaded: LoadedRecipe) -> tuple[str, ...] | None:
    """Give the globs of tensors that are the base's; None where the recipe says nothing.

    Where an MoE copies from the base all that is no expert, experts may have it otherwise, or lack it.
    """
    recipe = loaded.recipe
    if recipe.kind == "moe" and recipe.moe_spec.shared_from == "base":
        return (*(recipe.keep_base or ()), *_BESIDE_BLOCKS)
    return recipe.keep_base


def check_kept(loaded: LoadedRecipe, names: set[str]) -> Iterator[Problem]:
    """Check that each glob means a tensor of some source; `names` are those of all sources."""
    for index, glob in enumerate(loaded.recipe.keep_base or ()):
        if not any(fnmatchcase(name, glob) for name in names):
            hint = f"tensor names look like {min(names, default='')}"
            yield Problem(loaded.place("keep_base", index), f"'{glob}' matches no tensor", hint)


def language_part(base: Checkpoint) -> frozenset[str] | None:
    """Find the tensors of the language model inside a model that also sees or hears; None for a plain one.

    It is where the token embedding stands: its layers, the vectors beside them, and all that has a row per token.
    """
    if "text_config" not in base.config or not any(sense in base.config for sense in _SENSES):
        return None
    rows = vocabulary_tensors(base.tensors, base.config)
    stems = [".".join(place_of(name).modules[:-1]) for name in token_embeddings(base.tensors, base.config)]
    if not stems:
        return None
    return frozenset(name for name in base.tensors if name in rows or _parent(name) == stems[0])


def _parent(name: str) -> str:
    """Name the module that holds a tensor's layer, or its own module outside the layers."""
    place = place_of(name)
    return place.layer.rsplit(".", 2)[0] if place.layer else ".".join(place.modules[:-1])
