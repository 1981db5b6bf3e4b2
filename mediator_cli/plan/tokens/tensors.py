"""Tensors with a row per token, found without a list of architectures."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from mediator_cli.checkpoint.header import FLOAT_DTYPES
from mediator_cli.checkpoint.layout import place_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mediator_cli.checkpoint.header import TensorInfo
    from mediator_cli.methods.statistics import Role

_HEAD_KINDS = ("head", "embed_out", "output", "decoder")
_EMBEDS = re.compile(r"(^|\.)(wpe|wte|embed\w*|\w*embeddings?)\.weight$")
_NOT_TOKENS = re.compile(r"(^|[._])(wpe|wtt|pos|positions?|positional|token_type|norm|ln)([._]|$)")


def vocabulary_tensors(tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> tuple[str, ...]:
    """Find the tensors outside the layers that have a row per token: embeddings, heads and their biases."""
    rows = vocabulary_size(config)
    return tuple(name for name, info in tensors.items() if rows is not None and _is_per_token(info, rows, tensors))


def token_embeddings(tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> tuple[str, ...]:
    """Find the matrices with a row per token by which tokens come in: those of them that are no heads."""
    rows = vocabulary_tensors(tensors, config)
    return tuple(n for n in rows if not n.endswith("bias") and not place_of(n).kind.endswith(_HEAD_KINDS))


def roles_of(tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> dict[str, Role]:
    """Tell embeddings, of tokens or positions, and heads by name; all other tensors are linear."""
    named: dict[str, Role] = {name: "embedding" for name in tensors if _EMBEDS.search(name)}
    heads: dict[str, Role] = dict.fromkeys(vocabulary_tensors(tensors, config), "head")
    incoming: dict[str, Role] = dict.fromkeys(token_embeddings(tensors, config), "embedding")
    return named | heads | incoming


def vocabulary_size(config: Mapping[str, Any]) -> int | None:
    """Read the number of rows of tokens from a config; of the language part, where it has several."""
    inside = config.get("text_config")
    found = config.get("vocab_size") or (inside.get("vocab_size") if isinstance(inside, dict) else None)
    return found if isinstance(found, int) else None


def with_rows(shape: tuple[int, ...], rows: int) -> tuple[int, ...]:
    """Give the shape of a tensor with another number of rows of tokens.

    >>> with_rows((20, 8), 22), with_rows((1, 20), 22)
    ((22, 8), (1, 22))
    """
    return (1, rows) if len(shape) == 2 and shape[0] == 1 else (rows, *shape[1:])


def _is_per_token(info: TensorInfo, rows: int, tensors: Mapping[str, TensorInfo]) -> bool:
    # Positions and norms of a tiny model may be as many as its tokens.
    if info.dtype not in FLOAT_DTYPES or place_of(info.name).layer is not None or _NOT_TOKENS.search(info.name):
        return False
    if not info.name.endswith("bias"):
        return len(info.shape) == 2 and info.shape[0] == rows
    weight = tensors.get(f"{info.name.removesuffix('bias')}weight")
    return info.shape in ((rows,), (1, rows)) and (weight is None or weight.shape[:1] == (rows,) != weight.shape)
