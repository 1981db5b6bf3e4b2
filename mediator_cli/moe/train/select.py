"""Which tensors of a Mixture of Experts are trained, by its format and what the user asks for. Pure; no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from mediator_cli.checkpoint.heterogeneous import ROUTER, ROUTER_BIAS, is_heterogeneous
from mediator_cli.checkpoint.moe_layout import moe_layout
from mediator_cli.errors import CheckpointError, Problem

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

What = Literal["gates", "attention", "projectors", "all"]
_SAME = ("gates", "attention", "all")
_DIFFERENT = ("gates", "projectors", "all")


def choices(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Say what can be trained of a model, by its config.json."""
    return _DIFFERENT if is_heterogeneous(config) else _SAME


def trainable(place: str, config: Mapping[str, Any], names: Sequence[str], what: str) -> tuple[str, ...]:
    """Choose among a checkpoint's tensors, by their stored names, those that are trained; `place` is for errors.

    `gates`: router matrices. `attention`: these, and all that attention has but the norms before it. `projectors`
    (experts of different architectures): router and projectors. `all`: every tensor.
    Raises CheckpointError where the model is no Mixture of Experts, or has no such part.
    """
    if is_heterogeneous(config):
        routers: Sequence[str] = [name for name in (ROUTER, ROUTER_BIAS) if name in names]
        parts = {"gates": (), "projectors": (".proj_in.", ".proj_out."), "all": ("",)}
    else:
        routers = moe_layout(place, config, names).routers
        parts = {"gates": (), "attention": (".self_attn.",), "all": ("",)}
    if what not in parts:
        message = f"has no part '{what}' to train"
        raise CheckpointError(Problem(place, message, f"choose one of {', '.join(parts)}"))
    return tuple(name for name in names if name in routers or any(part in name for part in parts[what]))
