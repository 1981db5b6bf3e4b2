"""The low-rank experts of one matrix, as they are kept for products: all factors below and beside each other.

x · (dense + Σ weight · b · a)ᵀ = x · denseᵀ + Σ weight · (x · aᵀ) · bᵀ: the second sum needs no matrix of the dense
one's size, whatever the number of experts or of different mixtures in a batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mediator_cli.bundle.factors import FactorDelta

_WORTH_GROUPING = 0.5
"""Share of all products below which experts are computed one by one, each for the tokens that use it."""


@dataclass(frozen=True, eq=False)
class LowRankStack:
    """The experts of one matrix [rows, columns], float32.

    `a` [ranks, columns] has the experts' factors below each other, `b` [rows, ranks] beside each other; `starts`
    [experts + 1] say where each begins. What an expert leaves as it is has no ranks.
    """

    a: torch.Tensor
    b: torch.Tensor
    starts: tuple[int, ...]

    @property
    def n_bytes(self) -> int:
        """Count the bytes held."""
        return self.a.nbytes + self.b.nbytes

    @cached_property
    def ranks(self) -> torch.Tensor:
        """Rank of each expert [experts]."""
        return torch.tensor(self.starts).diff().to(self.a.device)

    def product(self, x: torch.Tensor, weights: torch.Tensor, *, is_chosen: bool = False) -> torch.Tensor:
        """Compute Σ weight · b · a · x: x [columns, tokens], weights [tokens, experts] → float32 [rows, tokens].

        `is_chosen` tells that zeros are experts left out, whose weights nobody wants gradients of.
        """
        if torch.is_grad_enabled() and weights.requires_grad and not is_chosen:
            return self._together(x, weights)
        used = weights != 0
        asked = (used.sum(0) * self.ranks).sum()
        if asked > _WORTH_GROUPING * self.a.shape[0] * x.shape[1]:
            return self._together(x, weights)
        return self._grouped(x, weights, used)

    def _together(self, x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        scales = weights.t().repeat_interleave(self.ranks, dim=0)
        return self.b @ ((self.a @ x) * scales)

    def _grouped(self, x: torch.Tensor, weights: torch.Tensor, used: torch.Tensor) -> torch.Tensor:
        total = torch.zeros(self.b.shape[0], x.shape[1], device=x.device)
        for expert in torch.nonzero(used.any(0)).flatten().tolist():
            own = slice(self.starts[expert], self.starts[expert + 1])
            if own.start == own.stop:
                continue
            tokens = torch.nonzero(used[:, expert]).flatten()
            is_all = len(tokens) == x.shape[1]
            part, scale = (x, weights[:, expert]) if is_all else (x[:, tokens], weights[tokens, expert])
            share = self.b[:, own] @ ((self.a[own] @ part) * scale)
            if is_all:
                total += share
            else:
                total.index_add_(1, tokens, share)
        return total

    def rows(self, indices: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Mix single rows: indices [tokens], weights [tokens, experts] → float32 [tokens, columns]."""
        return (self.b[indices] * weights.repeat_interleave(self.ranks, dim=1)) @ self.a

    def turned(self) -> LowRankStack:
        """Give the experts of the transpose of the matrix."""
        return LowRankStack(self.b.t().contiguous(), self.a.t().contiguous(), self.starts)


def stack_factors(
    deltas: Sequence[FactorDelta | None], shape: tuple[int, int], device: torch.device | str = "cpu"
) -> LowRankStack:
    """Stack one matrix's experts in their order; None where an expert leaves the matrix as it is."""
    kept = [delta for delta in deltas if delta is not None]
    a = torch.cat([torch.empty(0, shape[1]), *(delta.a.float() for delta in kept)])
    b = torch.cat([torch.empty(shape[0], 0), *(delta.b.float() for delta in kept)], dim=1)
    ends = [0]
    for delta in deltas:
        ends.append(ends[-1] + (0 if delta is None else len(delta.a)))
    return LowRankStack(a.to(device), b.contiguous().to(device), tuple(ends))
