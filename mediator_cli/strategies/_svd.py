"""The singular values and vectors of what an expert adds to a matrix, from its two factors alone."""

from __future__ import annotations

import torch

from mediator_cli.bundle.factors import FactorDelta

_NOTHING = 1e-6
"""Singular values this small beside the largest are rounding: their vectors point anywhere."""


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
    """Keep the largest singular values: the nearest matrix of that rank."""
    if len(delta.a) <= rank:
        return delta
    u, s, vt = svd(delta)
    return FactorDelta(vt[:rank].contiguous(), (u[:, :rank] * s[:rank]).contiguous())
