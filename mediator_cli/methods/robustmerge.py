"""Prune factors by magnitude and make up in B for what A lost, rank by rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import numpy as np
from pydantic import Field

from mediator_cli.kernels.arrays import Doubles, Floats
from mediator_cli.kernels.factors import Factors
from mediator_cli.methods._factors import filled, largest_rank, rounded
from mediator_cli.methods.registry import merge_method

_Clamp = Annotated[
    float, Field(ge=0, le=1, description="Share of the ranks, those scaled most, that keep their own scale.")
]
_Fuse = Annotated[float, Field(allow_inf_nan=False, description="Factor on A and on B, so squared on the delta.")]
_Kept = Annotated[float, Field(ge=0, le=1, description="Share of entries of each factor that stay, about.")]


@merge_method(space="adapter", reference="https://arxiv.org/abs/2502.17159")
def robustmerge(
    adapters: Sequence[Factors],
    weights: Doubles,
    *,
    density: _Kept = 0.2,
    att_ratio: _Clamp = 0.2,
    fuse_weight: _Fuse = 2.0,
) -> Factors:
    """Prune factors by magnitude, scale B by what A lost in each rank, and normalise over the adapters.

    Of each factor the entries stay whose magnitude reaches the int((1 - density)·n)-th smallest. The scale of a rank is
    |row of A| before over after, summed magnitudes; scales below the int(r·(1 - att_ratio))-th are raised to it. Then
    A = f·Σ Aₜ and B = f·Σ Sₜwₜsₜ·Bₜ / Σ Sₜ with f = `fuse_weight` and sₜ the scaling of an adapter. A rank that loses
    all of A takes the largest scale.

    Apt when adapters of the same kind were trained on different tasks and shall also answer others.

    Not apt when ranks are small: up to rank 5, all scales become the largest with the default `att_ratio`, and cancel.

    Elsewhere: the authors' code has neither weights nor scalings; with equal scalings it gives the same delta.

    >>> import numpy as np
    >>> one = Factors(np.array([[3, 1]], np.float32), np.array([[2], [1]], np.float32))
    >>> merged = robustmerge([one, one], np.ones(2), density=0.5, fuse_weight=1.0)
    >>> merged.a.tolist(), merged.b.tolist()
    ([[6.0, 2.0]], [[2.0], [1.0]])
    """
    rank = largest_rank(adapters)
    a, b = (np.zeros((rank, adapters[0].a.shape[1])), np.zeros((adapters[0].b.shape[0], rank)))
    scales = np.zeros(rank)
    for adapter, weight in zip(adapters, weights, strict=True):
        kept = _largest(adapter.a, density)
        scale = _scales(adapter.a, kept, att_ratio)
        a += filled(kept, rank, 0)
        b += filled(_largest(adapter.b, density) * (scale * weight * adapter.scaling), rank, 1)
        scales += np.pad(scale, (0, rank - len(scale)))
    shares = np.divide(fuse_weight, scales, out=np.zeros(rank), where=scales > 0)
    return rounded(fuse_weight * a, b * shares)


def _largest(factor: Floats, density: float) -> Doubles:
    """Keep entries that reach the int((1 - density)·n)-th smallest magnitude; all where that is none."""
    values = factor.astype(np.float64)
    count = int((1 - density) * values.size)
    if not count:
        return values
    limit = np.partition(abs(values).ravel(), count - 1)[count - 1]
    return np.where(abs(values) >= limit, values, 0.0)


def _scales(a: Floats, kept: Doubles, att_ratio: float) -> Doubles:
    """Tell what each row of A lost, in magnitude; [rank], at least 1."""
    before: Doubles = abs(a.astype(np.float64)).sum(axis=1)
    after: Doubles = abs(kept).sum(axis=1)
    if not len(before):
        return before
    scales = np.divide(before, after, out=np.zeros(len(before)), where=after > 0)
    scales[after == 0] = max(1.0, scales.max())
    low = np.sort(scales)[min(int(len(scales) * (1 - att_ratio)), len(scales) - 1)]
    return np.asarray(np.maximum(scales, low))
