"""Align the experts' changes of a layer by one decomposition of all, merge what is left of each."""

from __future__ import annotations

from typing import Annotated, Literal, NamedTuple

import numpy as np
from pydantic import Field

from mediator_cli.kernels.arrays import Doubles, Floats
from mediator_cli.methods._matrix import Embeddings, doubles, eigh
from mediator_cli.methods._ops import (
    Lambda,
    Merge,
    TrimDensity,
    TrimOver,
    ZeroSign,
    breaks_ties_by_majority,
    elect_by_majority,
    floats,
    keep_marked,
    kth_magnitudes,
    majority_block,
    trim_count,
    weighted_sum,
)
from mediator_cli.methods._others import Others, merge_others
from mediator_cli.methods.registry import merge_method
from mediator_cli.methods.statistics import Over, Params, Select, Slab, Sum, linear_maps


class _Aligned(NamedTuple):
    """basis [rows, r], factors [n, r, columns], s [r]: delta = basis · factors, or basis · diag(s) · factors."""

    basis: Doubles
    factors: Floats
    s: Doubles


def _turned(deltas: Floats, concat: str) -> Floats:
    return deltas if concat == "output" else deltas.swapaxes(1, 2)


def _directions(deltas: Floats, floor: float) -> tuple[Doubles, Doubles]:
    """Give the left singular vectors [rows, r] and values [r] of deltas [n, rows, columns] side by side, falling.

    They come from the Gram matrix of the rows, which tells singular values from rounding down to 1e-6 of the largest.
    """
    gram = np.zeros((deltas.shape[1], deltas.shape[1]))
    for delta in deltas:
        wide = doubles(delta)
        gram += wide @ wide.T
    squares, vectors = eigh(gram)
    s = np.sqrt(squares)
    used = s > max(floor, s[0] * np.sqrt(np.finfo(np.float64).eps * len(s)))
    return vectors[:, used], s[used]


def _align(deltas: Floats, params: Params) -> _Aligned:
    turned = _turned(deltas, params["concat"])
    basis, s = _directions(turned, params["floor"])
    divisor = s[:, None] if params["factors"] == "directions" else np.ones((len(s), 1))
    factors = np.empty((len(turned), len(s), turned.shape[2]), np.float32)
    for delta, factor in zip(turned, factors, strict=True):
        factor[:] = basis.T @ doubles(delta) / divisor
    return _Aligned(basis, factors, s)


def _flat(slab: Slab) -> Floats:
    """Give the factors of a matrix in rows [n, m]; none of what is no matrix."""
    inputs = slab.inputs
    return _align(inputs, slab.params).factors.reshape(len(inputs), -1) if inputs.ndim == 3 else inputs[:, :0]


def _size(slab: Slab) -> Doubles:
    if slab.inputs.ndim == 2:
        return np.zeros(1)
    turned = _turned(slab.inputs, slab.params["concat"])
    return np.array([len(_directions(turned, slab.params["floor"])[1]) * turned.shape[2]], np.float64)


def _majority(slab: Slab) -> Doubles:
    flat = _flat(slab)
    thresholds = slab.statistics.get("thresholds", np.zeros(len(flat), np.float32))
    return majority_block(flat, thresholds, slab.weights)


def _count(params: Params, n: int) -> int:
    return trim_count({**params, "keep": "paper"}, n)


def _trims_model(params: Params) -> bool:
    return bool(params["trim"] == "model" and params["density"] < 1)


def _asks_model(params: Params) -> bool:
    return bool(params["trim"] == "model" and params["combine"] == "ties" and breaks_ties_by_majority(params))


def _over_model(params: Params) -> Over:
    return "model"


def _bytes(n: int, rows: int, columns: int) -> int:
    """The Gram matrix with its vectors, a delta in float64, aligned factors as they are found, ranked and merged."""
    return 8 * 8 * max(rows, columns) ** 2 + (13 * n + 40) * rows * columns


@merge_method(
    space="delta",
    reference="https://arxiv.org/abs/2410.19735",
    view=linear_maps,
    working_bytes=_bytes,
    statistics=(
        Sum("size", _size, _over_model, _trims_model, whole=True),
        Select("thresholds", _count, _over_model, _trims_model, of=_flat, among="size", whole=True),
        Sum("majority", _majority, _over_model, _asks_model, whole=True),
    ),
    presets={
        "vision": {"density": 0.2, "lambda": 0.6},
        "core_space": {"density": 0.1, "lambda": 0.2, "factors": "directions", "trim": "tensor"},
    },
)
def knots(
    deltas: Floats,
    weights: Doubles,
    *,
    combine: Annotated[
        Literal["ties", "sum"], Field(description="Elect signs as TIES does, or add up all that trimming keeps.")
    ] = "ties",
    density: TrimDensity = 1.0,
    lambda_: Lambda = 0.5,
    merge: Merge = "mean",
    trim: TrimOver = "model",
    zero_sign: ZeroSign = "majority",
    concat: Annotated[
        Literal["output", "input"], Field(description="Whether the common directions are of a layer's output or input.")
    ] = "output",
    factors: Annotated[
        Literal["scaled", "directions"],
        Field(description="Merge the aligned factors with their singular values, or without, which are put back then."),
    ] = "scaled",
    floor: Annotated[
        float, Field(ge=0, allow_inf_nan=False, description="Singular values up to this count as zero.")
    ] = 1e-5,
    others: Others = "base",
    embeddings: Embeddings = "average",
    size: Doubles | None = None,
    thresholds: Floats | None = None,
    majority: Doubles | None = None,
) -> Floats:
    """Express all changes of a layer in common directions, merge the factors by TIES, go back.

    For each matrix [τ₁ … τₙ] = U·S·[V₁ … Vₙ]ᵀ, side by side. The factors S·Vₜᵀ of all matrices are, for each expert,
    one vector: of it the largest share `density` stays, signs are elected and agreeing entries merged as in `ties`.
    The result is λ·U·(what they come to). `combine: sum` without trimming is exactly `task_arithmetic`. Vectors, and
    by default embeddings, stay the base's (`others`). Defaults are the authors' for language models.

    Apt when experts are adapters of low rank: then entries at one place mean the same thing only once aligned.

    Not apt when experts are full fine-tunes: common directions are then as many as there are rows.

    Elsewhere: the authors' settings for vision models are the preset `vision`. The authors of core_space merge Vₜᵀ
    alone, each matrix by itself, and put S back afterwards (preset `core_space`). An exact tie of signs takes the
    majority's sign, which depends on how the singular vectors happen to point.

    Cost: one decomposition of a square matrix as high as the matrix; over the whole model once more for the majority
    of signs, and twice or more to find what is trimmed. `trim: tensor` or `zero_sign: positive` spare that.

    >>> deltas = np.array([[[3, 0], [0, 0]], [[1, 0], [0, 2]]], np.float32)
    >>> (abs(knots(deltas, np.ones(2), lambda_=1.0)) + 0.0).round(6).tolist()
    [[2.0, 0.0], [0.0, 2.0]]
    """
    if deltas.ndim == 2:
        return merge_others(deltas, weights, others)
    aligned = _align(deltas, {"concat": concat, "floor": floor, "factors": factors})
    flat = aligned.factors.reshape(len(deltas), -1)
    if thresholds is None:
        thresholds = kth_magnitudes(flat, _count({"density": density}, flat.shape[1]))
    if combine == "sum":
        merged = weighted_sum(keep_marked(flat, abs(flat) >= thresholds[:, None]), weights, factor=lambda_)
    else:
        merged = elect_by_majority(flat, thresholds, weights, majority, merge, zero_sign, lambda_)
    basis = aligned.basis * aligned.s if factors == "directions" else aligned.basis
    found = floats(basis @ merged.reshape(aligned.factors.shape[1:]))
    return found if concat == "output" else np.ascontiguousarray(found.T)
