"""Merge adapters as small matrices in a basis that all of them share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from mediator_cli.kernels.arrays import Doubles
from mediator_cli.kernels.factors import Factors
from mediator_cli.methods._factors import Energy, shorten
from mediator_cli.methods._matrix import Svd, rank_of, shared_rank, superpose, svd, triplets
from mediator_cli.methods._ops import Lambda
from mediator_cli.methods.registry import merge_method
from mediator_cli.methods.statistics import Params

_Merge = Annotated[
    Literal["sum", "mean", "ties", "tsv", "cart"], Field(description="How the small matrices are merged.")
]
_Iso = Annotated[bool, Field(description="Give all directions of the merged matrix their mean singular value.")]
_Density = Annotated[float, Field(gt=0, le=1, description="ties: share of entries that trimming keeps.")]
_CartRank = Annotated[float, Field(gt=0, le=1, description="cart: share of the directions that a deviation keeps.")]
_CartScale = Annotated[float, Field(allow_inf_nan=False, description="cart: factor on the sum of deviations.")]
_Rank = Annotated[int, Field(ge=0, description="Rank of the result, at most; 0 = all directions that there are.")]


@merge_method(
    space="adapter",
    reference="https://github.com/apanariello4/core-space-merging",
    presets={"official": {"merge": "tsv", "lambda": 0.2}},
)
def core_space(
    adapters: Sequence[Factors],
    weights: Doubles,
    *,
    merge: _Merge = "tsv",
    lambda_: Lambda = 1.0,
    isotropize: _Iso = False,
    density: _Density = 0.1,
    cart_rank: _CartRank = 0.04,
    cart_scale: _CartScale = 0.1,
    rank: _Rank = 0,
    energy: Energy = 1.0,
) -> Factors:
    """Merge adapters in the smallest basis that holds them all, and map the result back: λ·U·M·V.

    U are the left singular vectors of all Bₜ side by side, V the right ones of all Aₜ one above the other. Each adapter
    is the small matrix Mₜ = wₜsₜ·Uᵀ·Bₜ·Aₜ·Vᵀ in it, nothing lost, with sₜ its scaling. Merged are these: `sum`; `mean`
    over all adapters; `ties` with the paper's rules per matrix; `tsv`, the top singular directions of each, as many as
    its share of the basis, made orthogonal; `cart`, the mean and a part of each deviation from it. `isotropize` then
    levels the singular values. Directions that are no more than rounding are left out.

    Apt when adapters were trained apart from each other: `tsv` and `isotropize` would mix arbitrary directions into the
    dense delta of an adapter, which is mostly zero, and cannot here.

    Not apt when the sum alone is wanted, which `lora_cat` gives exactly.

    Elsewhere: the authors apply no scaling of adapters and search λ from 0.1 to 10 on validation data; their file for
    tsv says 0.2, preset `official`.

    Cost: with R the sum of all ranks, (out + in)·R² for the bases and T·R³ for the small matrices.

    >>> import numpy as np
    >>> one = Factors(np.array([[1, 0]], np.float32), np.array([[3], [0]], np.float32))
    >>> two = Factors(np.array([[0, 1]], np.float32), np.array([[0], [1]], np.float32))
    >>> merged = core_space([one, two], np.ones(2), merge="mean")
    >>> np.round(merged.b @ merged.a, 4).tolist()
    [[1.5, 0.0], [0.0, 0.5]]
    """
    left = _basis(np.concatenate([x.b for x in adapters], axis=1))
    right = _basis(np.concatenate([x.a for x in adapters]).T)
    cores = np.stack([_core(x, w, left, right) for x, w in zip(adapters, weights, strict=True)])
    if not cores.size:
        return Factors(np.zeros((0, len(right)), np.float32), np.zeros((len(left), 0), np.float32))
    params = {"density": density, "cart_rank": cart_rank, "cart_scale": cart_scale}
    u, s, vt = svd(_merged(cores, merge, params))
    if isotropize:
        s = _levelled(s)
    return shorten(Svd(left @ u, *_signed(s * lambda_, vt @ right.T)), rank, energy)


def _basis(columns: Doubles) -> Doubles:
    """Give an orthonormal basis of the columns; [rows, rank]."""
    u, s, _ = svd(columns)
    return u[:, : rank_of(s, columns.shape)]


def _core(adapter: Factors, weight: float, left: Doubles, right: Doubles) -> Doubles:
    scaled = adapter.b.astype(np.float64) * (weight * adapter.scaling)
    return np.asarray((left.T @ scaled) @ (adapter.a.astype(np.float64) @ right))


def _signed(s: Doubles, vt: Doubles) -> tuple[Doubles, Doubles]:
    """Let singular values be positive: a negative λ turns the directions."""
    return abs(s), np.where(s < 0, -1.0, 1.0)[:, None] * vt


def _levelled(s: Doubles) -> Doubles:
    n = rank_of(s, (len(s), len(s)))
    return np.where(np.arange(len(s)) < n, s.sum() / max(n, 1), 0.0)


def _merged(cores: Doubles, merge: str, params: Params) -> Doubles:
    if merge == "ties":
        return _ties(cores, params["density"])
    if merge == "tsv":
        return _tsv(cores)
    if merge == "cart":
        mean = cores.mean(axis=0)
        kept = math.ceil(params["cart_rank"] * min(mean.shape))
        parts = (svd(core - mean) for core in cores)
        tops = np.sum([(u[:, :kept] * s[:kept]) @ vt[:kept] for u, s, vt in parts], axis=0)
        return np.asarray(mean + params["cart_scale"] * tops)
    return np.asarray(cores.sum(axis=0) if merge == "sum" else cores.mean(axis=0))


def _ties(cores: Doubles, density: float) -> Doubles:
    """Keep int(n·density) + 1 entries of each, elect signs by the sum, average the entries that agree and are not 0."""
    kept = np.stack([_trimmed(core, density) for core in cores])
    elected = np.sign(kept.sum(axis=0))
    elected[elected == 0] = np.sign(elected.sum())
    agrees = (np.sign(kept) == elected) & (kept != 0)
    return np.asarray((kept * agrees).sum(axis=0) / np.maximum(agrees.sum(axis=0), 1))


def _trimmed(core: Doubles, density: float) -> Doubles:
    out = core.size - int(core.size * density)
    if not out or density == 1:
        return core
    limit = np.partition(abs(core).ravel(), out - 1)[out - 1]
    return np.where(abs(core) >= limit, core, 0.0)


def _tsv(cores: Doubles) -> Doubles:
    """Take the top directions of each core, as many as its share, make them orthogonal, put them together again."""
    own = [core for core in cores if core.any()]
    share = shared_rank(cores.shape[1:], max(len(own), 1))
    return superpose([triplets(core, share) for core in own], decorrelate=True) if own else np.zeros(cores.shape[1:])
