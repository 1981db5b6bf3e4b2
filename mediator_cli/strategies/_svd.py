"""The singular values and vectors of what an expert adds to a matrix, from its two factors alone."""

from __future__ import annotations

import torch

from mediator_cli.bundle.factors import FactorDelta

_NOTHING = 1e-6
"""Singular values this small beside the largest are rounding: their vectors point anywhere."""
_MANY, _SPARE, _ROUNDS = 3, 8, 4


def svd(delta: FactorDelta) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Decompose b · a into U [out, k], falling S [k] and Vᵀ [k, in], k ≤ rank, by QR of both factors."""
    qb, rb = torch.linalg.qr(delta.b)
    qa, ra = torch.linalg.qr(delta.a.t())
    u, s, vt = torch.linalg.svd(rb @ ra.t(), full_matrices=False)
    return qb @ u, s, vt @ qa.t()


def right_vectors(delta: FactorDelta | None, k: int, size: int) -> torch.Tensor:
    """Give the first k right singular vectors [k, size]; zeros beyond the rank, and for no change at all."""
    found = torch.zeros(k, size)
    if delta is None or not len(delta.a):
        return found
    _, s, vt = svd(delta)
    n = min(k, int((s > _NOTHING * s[0]).sum()))
    found[:n] = vt[:n]
    return found


def cut(delta: FactorDelta, rank: int) -> FactorDelta:
    """Keep the largest singular values: the nearest matrix of that rank.

    Where there are many times more, they are found by subspace iteration from a fixed start, which misses the nearest
    matrix by less than a thousandth where singular values fall at all.
    """
    if len(delta.a) <= rank:
        return delta
    is_long = len(delta.a) > _MANY * (rank + _SPARE)
    u, s, vt = _leading(delta, rank + _SPARE) if is_long else svd(delta)
    return FactorDelta(vt[:rank].contiguous(), (u[:, :rank] * s[:rank]).contiguous())


def _leading(delta: FactorDelta, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Approximate the k largest singular values and their vectors, as `svd` gives them."""
    q = torch.randn(delta.a.shape[1], k, generator=torch.Generator().manual_seed(0))
    for _ in range(_ROUNDS):
        q = torch.linalg.qr(delta.a.t() @ (delta.b.t() @ (delta.b @ (delta.a @ q))))[0]
    u, s, vt = torch.linalg.svd(delta.b @ (delta.a @ q), full_matrices=False)
    return u, s, vt @ q.t()
