"""Steps that methods on low-rank factors share. Sums run in float64, in recipe order; results are rounded once."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from mediator_cli.errors import Problem
from mediator_cli.kernels.arrays import Doubles, Floats
from mediator_cli.kernels.factors import Factors
from mediator_cli.methods._matrix import Svd, rank_of, svd, triplets
from mediator_cli.methods.statistics import Factor, Params

ActOn = Annotated[
    Literal["factors", "delta"],
    Field(description="factors: A and B by themselves. delta: the product b·a as one matrix, then cut to `rank`."),
]
Rank = Annotated[
    int,
    Field(ge=0, description="Rank of the result, at most; 0 = the largest of the adapters, or what `energy` takes."),
]
Energy = Annotated[
    float,
    Field(gt=0, le=1, description="Keep the fewest directions that hold this share of the squared singular values."),
]
Share = Annotated[float, Field(ge=0, le=1, description="Share of entries that stay.")]
Sign = Annotated[
    Literal["total", "frequency"],
    Field(description="Elect each sign by the sum of the entries, or by how many have it; a tie is plus."),
]
Prune = Callable[[int, Factor, Floats], Doubles]
"""What is left of a factor, or of the dense delta, of one adapter."""
Combine = Callable[[Doubles, Doubles], Doubles]
"""Matrices [n, rows, columns] and a factor on each [n] to one matrix."""


def takes_no_rank(params: Params) -> Problem | None:
    """Refuse a rank where nothing is cut: factors keep the largest rank of the adapters."""
    for name, unset in (("rank", 0), ("energy", 1.0)):
        if params["act_on"] == "factors" and params[name] != unset:
            message = f"{name} is for `act_on: delta`; factors that are merged by themselves keep their rank"
            return Problem(name, message, "add `act_on: delta`, or leave it out")
    return None


def merge_each(
    adapters: Sequence[Factors], weights: Doubles, act_on: str, prune: Prune, combine: Combine, cut: tuple[int, float]
) -> Factors:
    """Prune what each adapter has, then combine it: A and B by themselves, or the dense deltas, cut to `cut`.

    On factors, A and B each carry the root of |weight · scaling|, and A its sign. What has fewer rows than the largest
    rank is filled up with zeros, which changes no adapter. `cut` has rank and energy share.
    """
    if act_on == "delta":
        deltas = np.stack([prune(n, "delta", _delta(adapter)) for n, adapter in enumerate(adapters)])
        rank, energy = cut
        most = rank or largest_rank(adapters, energy)
        # A share of energy is of all directions.
        return shorten(triplets(combine(deltas, weights), (most or None) if energy == 1 else None), most, energy)
    factors = weights * [adapter.scaling for adapter in adapters]
    roots, rank = np.sqrt(abs(factors)), largest_rank(adapters)
    a = np.stack([filled(prune(n, "A", x.a), rank, 0) for n, x in enumerate(adapters)])
    b = np.stack([filled(prune(n, "B", x.b), rank, 1) for n, x in enumerate(adapters)])
    return rounded(combine(a, roots * np.where(factors < 0, -1.0, 1.0)), combine(b, roots))


def _delta(adapter: Factors) -> Floats:
    return (adapter.b.astype(np.float64) @ adapter.a * adapter.scaling).astype(np.float32)


def largest_rank(adapters: Sequence[Factors], energy: float = 1.0) -> int:
    """Give the largest rank of the adapters; 0, which is no limit, where a share of energy chooses the rank."""
    return max(adapter.rank for adapter in adapters) if energy == 1 else 0


def filled(factor: Doubles, rank: int, axis: int) -> Doubles:
    widths = [(0, 0), (0, 0)]
    widths[axis] = (0, rank - factor.shape[axis])
    return np.pad(factor, widths)


def rounded(a: Doubles, b: Doubles) -> Factors:
    """Give factors in float32, with scaling 1."""
    return Factors(a.astype(np.float32), b.astype(np.float32))


def whole(n: int, which: Factor, values: Floats) -> Doubles:
    """Keep all entries."""
    return values.astype(np.float64)


def keep_largest(values: Floats, density: float) -> Doubles:
    """Keep the int(density · size) entries of largest magnitude, of equal ones the first; zero elsewhere."""
    flat = values.astype(np.float64).ravel()
    count = int(density * flat.size)
    if count < flat.size:
        magnitudes = abs(flat)
        limit = np.partition(magnitudes, flat.size - count)[flat.size - count] if count else math.inf
        stays = magnitudes > limit
        stays[np.flatnonzero(magnitudes == limit)[: count - np.count_nonzero(stays)]] = True
        flat[~stays] = 0.0
    return flat.reshape(values.shape)


def keep_at_random(values: Floats, uniforms: Floats, density: float) -> Doubles:
    """Keep entries whose number is below the density, divided by it; zero elsewhere."""
    return np.where(uniforms < np.float32(density), values.astype(np.float64) / density, 0.0)


def add_up(matrices: Doubles, factors: Doubles) -> Doubles:
    """Sum factor · matrix."""
    return np.asarray((matrices * factors[:, None, None]).sum(axis=0))


def agree(sign: str) -> Combine:
    """Give a mean of factor · entry over the entries whose sign is the elected one."""

    def combine(matrices: Doubles, factors: Doubles) -> Doubles:
        signs = np.sign(matrices)
        mass = (matrices if sign == "total" else signs).sum(axis=0)
        agrees = signs == np.where(mass >= 0, 1.0, -1.0)
        total = (matrices * factors[:, None, None] * agrees).sum(axis=0)
        return np.asarray(total / np.maximum(agrees.sum(axis=0), 1))

    return combine


def stack(adapters: Sequence[Factors], weights: Doubles) -> Factors:
    """Put the factors of all adapters side by side, so that b · a is the weighted sum of all deltas: a has the factors.

    In float32 as what comes in: float64 products are rounded once.
    """
    scaled = [x.a.astype(np.float64) * (weight * x.scaling) for x, weight in zip(adapters, weights, strict=True)]
    return rounded(np.concatenate(scaled), np.concatenate([x.b for x in adapters], axis=1).astype(np.float64))


def product_svd(b: Doubles | Floats, a: Doubles | Floats) -> Svd:
    """Take b [out, r] · a [r, in] apart into singular triplets, without the product: at most r of them, in float64."""
    left, core_left = np.linalg.qr(b.astype(np.float64))
    right, core_right = np.linalg.qr(a.T.astype(np.float64))
    u, s, vt = svd(core_left @ core_right.T)
    return Svd(left @ u, s, vt @ right.T)


def shorten(found: Svd, rank: int, energy: float) -> Factors:
    """Keep the largest singular triplets, half of each value in either factor: at most `rank`, no limit if that is 0.

    Of these the fewest that hold a share `energy` of all. Values that rounding leaves are no directions.
    """
    kept = min(rank or len(found.s), rank_of(found.s, (len(found.u), found.vt.shape[1])))
    if energy < 1 and kept:
        held = np.cumsum(np.square(found.s))
        kept = min(kept, int(np.searchsorted(held, energy * held[-1])) + 1)
    roots = np.sqrt(found.s[:kept])
    return rounded(roots[:, None] * found.vt[:kept], found.u[:, :kept] * roots)
