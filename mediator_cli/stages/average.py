"""One output slab: the method's answer, the base added back, one rounding to the output dtype."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mediator_cli.methods.registry import ResolvedMethod


def average_slab(
    method: ResolvedMethod,
    inputs: torch.Tensor,
    base: torch.Tensor | None,
    weights: torch.Tensor,
    statistics: Mapping[str, torch.Tensor],
    uniforms: torch.Tensor | None,
) -> torch.Tensor:
    """Merge one slab of inputs [n, m] to float32 [m]; `base` [m] is given to delta methods."""
    merged = method(inputs, weights, statistics, uniforms)
    return merged if base is None else base + merged
