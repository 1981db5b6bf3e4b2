"""One output slab: the method's answer, with the base added back."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from numpy.typing import NDArray

    from mediator_cli.kernels.arrays import Doubles, Floats
    from mediator_cli.methods.registry import ResolvedMethod


def average_slab(
    method: ResolvedMethod,
    inputs: Floats,
    base: Floats | None,
    weights: Doubles,
    statistics: Mapping[str, NDArray[Any]],
    uniforms: Floats | None,
) -> Floats:
    """Merge one slab of inputs [n, m] to float32 [m]; `base` [m] is given to delta methods."""
    merged = method(inputs, weights, statistics, uniforms)
    return merged if base is None else base + merged
