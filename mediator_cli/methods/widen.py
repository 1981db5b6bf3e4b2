"""Let the columns that an expert changed most pass in full, share the others."""

from __future__ import annotations

from typing import Annotated

import numpy as np
from pydantic import Field

from mediator_cli.kernels.arrays import Doubles, Floats
from mediator_cli.methods._kernels import magnitude_sums
from mediator_cli.methods._ops import floats, weighted_sum
from mediator_cli.methods.registry import merge_method
from mediator_cli.methods.statistics import Params, Role, Slab, Sum, View, always, over_tensor

_ROWS = 64
"""Rows of a matrix that are looked at in float64 at a time."""


def _token_columns(role: Role, params: Params) -> View:
    """See all matrices whole, embeddings turned so that a column is a token."""
    return "transposed" if role == "embedding" else "matrix"


def _magnitudes(slab: Slab) -> Doubles:
    return _magnitudes_of(slab.inputs)


def _magnitudes_of(deltas: Floats) -> Doubles:
    """Sum |delta| of each of vectors [n, m], and count entries; float64 [n + 1]. Of matrices nothing is needed."""
    sums = np.zeros(len(deltas) + 1)
    if deltas.ndim == 2:
        magnitude_sums(floats(deltas), sums[:-1])
        sums[-1] = deltas.shape[1]
    return sums


def _column_sums(delta: Floats, base: Floats) -> Doubles:
    """Sum base², base · delta and delta² over each column of [rows, columns], in float64; [3, columns]."""
    sums = np.zeros((3, delta.shape[1]))
    for start in range(0, len(delta), _ROWS):
        was = np.asarray(base[start : start + _ROWS], np.float64)
        change = np.asarray(delta[start : start + _ROWS], np.float64)
        sums += [(was * was).sum(axis=0), (was * change).sum(axis=0), (change * change).sum(axis=0)]
    return sums


def _changes(delta: Floats, base: Floats) -> Doubles:
    """Tell how much the magnitude and the direction of each column changed; float64 [2, columns].

    They are | ‖b + d‖ - ‖b‖ | and 1 - cos(b + d, b), from sums with d in them: differences of sums without would drown
    small changes in rounding. Where one of both columns is zero there is no direction: 1, or 0 where both are.
    """
    was, cross, change = _column_sums(delta, base)
    now = np.maximum(was + 2 * cross + change, 0)
    norms, product = np.sqrt(now) + np.sqrt(was), np.sqrt(now * was)
    larger = np.divide(abs(2 * cross + change), norms, out=np.zeros_like(was), where=norms > 0)
    cosine = np.divide(was + cross, product, out=np.zeros_like(was), where=product > 0)
    sine = np.divide(np.maximum(was * change - cross**2, 0), now * was, out=np.ones_like(was), where=product > 0)
    turned = np.where(cosine > 0, sine / (1 + np.maximum(cosine, 0)), 1 - cosine)
    return np.stack([larger, np.where(change > 0, turned, 0)])


def _ranks(values: Doubles) -> Doubles:
    """Give each of values [n, m] its rank among its row from 0, over m; equal ones rank by position."""
    ranks = np.empty(values.shape)
    np.put_along_axis(ranks, np.argsort(values, axis=1, kind="stable"), np.arange(values.shape[1])[None] * 1.0, axis=1)
    return np.asarray(ranks / max(1, values.shape[1]), np.float64)


def _scores(significance: Doubles, means: Doubles, ratio: float, calibration: float) -> Doubles:
    """Share each column of significance [n, m] by softmax; give `calibration` to what lies above its row's mean [n]."""
    powers = np.exp(significance - significance.max(axis=0, keepdims=True))
    shares = powers / powers.sum(axis=0, keepdims=True)
    return np.where(significance > means[:, None] * ratio, calibration, shares)


def _column_scores(deltas: Floats, base: Floats, ratio: float, calibration: float) -> Doubles:
    """Average the scores of magnitude and direction of columns of [n, rows, columns]; [n, columns]."""
    changes = np.stack([_changes(delta, base) for delta in deltas])
    ranks = [_ranks(changes[:, kind]) for kind in range(2)]
    # All rows have the same ranks in another order; their mean is exact.
    mean = np.full(len(deltas), (deltas.shape[2] - 1) / (2 * deltas.shape[2]))
    magnitude, direction = (_scores(rank, mean, ratio, calibration) for rank in ranks)
    return (magnitude + direction) / 2


def _bytes(n: int, rows: int, columns: int) -> int:
    """The result, a scaled delta, some rows in float64, and what is found of columns."""
    return 12 * rows * columns + 8 * columns * (6 * _ROWS + 12 * n + 12)


@merge_method(
    space="delta",
    reference="https://arxiv.org/abs/2408.03092",
    view=_token_columns,
    working_bytes=_bytes,
    statistics=(Sum("magnitudes", _magnitudes, over_tensor, always, lambda n: (n + 1,)),),
    needs_base=True,
)
def widen(
    deltas: Floats,
    weights: Doubles,
    *,
    ratio: Annotated[
        float, Field(ge=0, allow_inf_nan=False, description="Columns rank high above so many times the mean rank.")
    ] = 1.0,
    calibration: Annotated[
        float, Field(ge=0, allow_inf_nan=False, description="Weight of columns that rank high.")
    ] = 1.0,
    base: Floats | None = None,
    magnitudes: Doubles | None = None,
) -> Floats:
    """Weigh each column of a delta by how much its length and direction changed, in this and all experts.

    For each matrix and expert the columns are ranked by | ‖column‖ - ‖base column‖ | and by 1 - cosine of both, from
    0 to 1. A column's score is the softmax over the experts of its rank, but `calibration` where the rank exceeds the
    mean rank times `ratio`. The result is Σ wₜ·τₜ times the mean of both scores. Of an embedding the columns are the
    tokens. For vectors the score of each entry comes in the same way from |τₜ| and its mean. Scores do not sum to 1:
    about half of the columns of each expert pass in full. A column that is zero in the base has turned by 1.

    Apt when an expert with large changes, such as continued pre-training, is merged with small fine-tunes.

    Not apt when many experts changed the same columns: the sum overshoots.

    Elsewhere: the authors' code divides by zero where a column is zero, and with an odd number of columns rounding
    decides about the middle rank at ratio 1, which here is not above the mean.

    Cost: some passes over the matrix; nothing is decomposed.

    >>> base = np.array([[1, 1], [1, 1]], np.float32)
    >>> widen(np.array([[[0, 2], [0, 2]]], np.float32), np.ones(1), base=base, calibration=0.5).tolist()
    [[0.0, 1.0], [0.0, 1.0]]
    """
    if deltas.ndim == 2:
        sums = _magnitudes_of(deltas) if magnitudes is None else magnitudes
        means = sums[:-1] / max(1.0, sums[-1])
        scores = _scores(abs(np.asarray(deltas, np.float64)), means, ratio, calibration)
        return weighted_sum(floats(deltas * scores), weights)
    known = np.zeros(deltas.shape[1:], np.float32) if base is None else base
    scores = _column_scores(deltas, known, ratio, calibration) * weights[:, None]
    merged = np.zeros(deltas.shape[1:], np.float32)
    for delta, score in zip(deltas, floats(scores), strict=True):
        merged += delta * score
    return merged
