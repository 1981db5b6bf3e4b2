"""Whether the experts are fine-tunes of this base, judged by a sample of their deltas."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from mediator_cli.checkpoint.blocks import BLOCK
from mediator_cli.engine.streams import Piece

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from mediator_cli.engine.streams import Streams
    from mediator_cli.kernels.arrays import Doubles
    from mediator_cli.plan.model import Plan, TensorPlan

FAR = 0.5
"""Size of a delta, as a share of the base's, from which the base is doubted: unrelated models are at 1.4."""
_SAMPLED = 24


def check_lineage(plan: Plan, streams: Streams) -> Iterator[str]:
    """Say which experts differ from the base by more than half of its size; reads one block of some matrices.

    Stacked layers may come from anywhere, so nothing is said of them.
    """
    if plan.inputs:
        return
    ratios = delta_sizes(streams, [tensor for tensor in plan.tensors if tensor.average is not None])
    for expert, ratio in zip(plan.experts, ratios, strict=True):
        if ratio > FAR:
            yield (
                f"expert {expert.name} differs from the base by {ratio:.0%} of the base's size: "
                f"is {plan.loaded.recipe.base} the model that it was tuned from?"
            )


def tell_doubts(plan: Plan, streams: Streams, notify: Callable[[str], None]) -> tuple[str, ...]:
    """Tell of experts that seem to be no fine-tunes of the base, before the long work begins."""
    doubts = tuple(check_lineage(plan, streams))
    for doubt in doubts:
        notify(doubt)
    return doubts


def delta_sizes(streams: Streams, tensors: Sequence[TensorPlan]) -> list[float]:
    """Estimate |delta| / |base| of each expert over one block in the middle of evenly spread matrices."""
    matrices = [tensor for tensor in tensors if len(tensor.shape) > 1 and tensor.size] or list(tensors)
    chosen = matrices[:: max(1, math.ceil(len(matrices) / _SAMPLED))]
    if not chosen:
        return [0.0] * len(streams.names)
    base, *deltas = np.sum([_squares(streams, tensor) for tensor in chosen], axis=0).tolist()
    return [math.sqrt(delta / base) if base else 0.0 for delta in deltas]


def _squares(streams: Streams, tensor: TensorPlan) -> Doubles:
    """Sum the squares of base and deltas over one block; [n + 1]."""
    start = tensor.size // 2 // BLOCK * BLOCK
    inputs = streams.deltas(Piece(tensor.name, start, min(start + BLOCK, tensor.size)))
    rows = inputs.rows if inputs.base is None else np.concatenate([inputs.base[None], inputs.rows])
    return np.asarray(np.square(rows, dtype=np.float64).sum(axis=1))
