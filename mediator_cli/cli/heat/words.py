"""Short names of layers and modules, and a rule of assignment in words, as heat maps show them."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING

from mediator_cli.checkpoint.layout import layers_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mediator_cli.recipe.schema import AssignSpec


def escaped(text: str) -> str:
    """Make any text safe inside HTML, in attributes too; what UTF-8 can't hold becomes a question mark."""
    return html.escape(text.encode("utf-8", "replace").decode(), quote=True)


def short_kind(kind: str) -> str:
    """Shorten the usual names of modules, so that a row fits in a terminal.

    >>> short_kind("post_attention_layernorm"), short_kind("q_proj")
    ('post_norm', 'q')
    """
    for word, shorter in (("_proj", ""), ("layernorm", "norm"), ("post_attention", "post"), ("input", "in")):
        kind = kind.replace(word, shorter)
    return kind


def row_label(row: str, rows: Sequence[str]) -> str:
    """Name a layer by its number where all layers stand in one stack.

    >>> rows = ("model.layers.0", "model.layers.1", "model.embed_tokens")
    >>> [row_label(row, rows) for row in rows]
    ['0', '1', 'embed_tokens']
    """
    # A layer's own name has no part behind its number, so ask as if for tensors of it.
    stacks = {layer.rpartition(".")[0] for layer in layers_of(f"{name}.weight" for name in rows)}
    stack, _, number = row.rpartition(".")
    if stack in stacks:
        return number if len(stacks) == 1 else f"{stack.rpartition('.')[2]} {number}"
    return number


def denoise_words(denoise: str) -> str:
    """Say how a report's deltas were denoised."""
    return "All changes count." if denoise == "none" else f"Small changes are left out: {denoise}."


def rule_words(spec: AssignSpec) -> str:
    """Write a rule with its parameters: `rule mean_std, std 0.5`; long lists are counted."""
    fields = spec.model_dump(exclude_none=True, exclude={"rule", "candidates"})
    told = [f"{len(value)} {name}" if isinstance(value, tuple) else f"{name} {value}" for name, value in fields.items()]
    return ", ".join([f"rule {spec.rule}", *told])
