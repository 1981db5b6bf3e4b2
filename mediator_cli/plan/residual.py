"""The residual stream of a decoder: every axis of every tensor that reads from it or writes to it."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from mediator_cli.checkpoint.layout import place_of
from mediator_cli.errors import some_names
from mediator_cli.plan.units import HEAD_NORMS, Side, Units, UnknownUnitsError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

_ROUTERS = ("gate", "router", "shared_expert_gate")
_TABLES = re.compile(r"(^|\.)(wpe|wte|embed\w*|\w*embeddings?|lm_head|embed_out)\.(weight|bias)$")
_POSITIONS = re.compile(r"(^|\.)(wpe|embed_positions|position_embeddings?)\.weight$")


def residual_units(
    shapes: Mapping[str, tuple[int, ...]],
    config: Mapping[str, Any],
    inside: Iterable[Units],
    passed_over: frozenset[str] = frozenset(),
) -> Units:
    """Find what the residual stream runs through; `inside` are the units of feed-forward blocks and attentions.

    Tensors in `passed_over` may be unknown: they are never read in another order.
    Raises UnknownUnitsError with the tensors whose part in it is not known.
    """
    size = config.get("hidden_size")
    if not isinstance(size, int) or config.get("is_encoder_decoder"):
        raise UnknownUnitsError("the config tells of no single stream with a hidden_size")
    turns = any(name.startswith(("rope", "rotary")) for name in config)
    if not turns and not any(_POSITIONS.search(name) for name in shapes):
        raise UnknownUnitsError("neither config nor tensors tell how positions come in")
    known = dict(_block_sides(shapes, inside))
    known |= {name: side for name in shapes if name not in known and (side := _side(shapes, name, size)) is not None}
    wrong = [name for name, axes in known.items() if any(shapes[name][axis] != size for axis in axes)]
    if strange := [*(name for name in shapes if name not in known and name not in passed_over), *wrong]:
        raise UnknownUnitsError(f"the part of {some_names(strange)} in the stream is not known")
    return Units("residual", "residual", size, tuple(Side(name, axis) for name, axes in known.items() for axis in axes))


def _block_sides(
    shapes: Mapping[str, tuple[int, ...]], inside: Iterable[Units]
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Give the stream's axis of what stands in blocks: the other one of a matrix, and the bias of what writes to it."""
    for units in inside:
        for side in units.sides:
            yield side.tensor, ((1 - side.axis,) if len(shapes[side.tensor]) == 2 else ())
            bias = f"{side.tensor.removesuffix('weight')}bias"
            if side.axis == 1 and bias in shapes:
                yield bias, (0,)
        if units.group == "heads":
            norms = (f"{units.name}.{kind}.{what}" for kind in HEAD_NORMS for what in ("weight", "bias"))
            yield from ((name, ()) for name in norms if name in shapes)


def _side(shapes: Mapping[str, tuple[int, ...]], name: str, size: int) -> tuple[int, ...] | None:
    """Give the stream's axes of a tensor outside the blocks: norms, embeddings, heads, routers; None if not known."""
    shape, place = shapes[name], place_of(name)
    if shape in ((), (1,)):
        return ()
    is_table = place.layer is None and _TABLES.search(name) is not None
    if is_table and name.endswith("bias") and len(shape) == 1:
        # A number for each token.
        return ()
    if shape == (size,):
        return (0,)
    if len(shape) != 2:
        return None
    is_router = place.layer is not None and place.kind in _ROUTERS
    return (1,) if is_router or is_table else None
