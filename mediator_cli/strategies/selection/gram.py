"""Inner products of experts' changes, as whole matrices, from their factors: exact, and no change is ever built."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from mediator_cli.strategies.library import Change

    Floats = NDArray[np.float64]


def gram(changes: Sequence[Change]) -> Floats:
    """Give Σ over tensors of ⟨ΔWᵢ, ΔWⱼ⟩ [experts, experts], whatever ranks and tensors each expert has.

    ⟨b₁a₁, b₂a₂⟩ = Σ (b₁ᵀb₂) ∘ (a₁a₂ᵀ): all experts' factors of a tensor are put beside each other once. In float64.
    """
    total = torch.zeros(len(changes), len(changes), dtype=torch.float64)
    for name in dict.fromkeys(name for change in changes for name in change):
        own = [at for at, change in enumerate(changes) if name in change]
        deltas = [changes[at][name] for at in own]
        a, b = torch.cat([delta.a for delta in deltas]).double(), torch.cat([delta.b for delta in deltas], 1).double()
        members = torch.tensor([at for at, delta in zip(own, deltas, strict=True) for _ in range(len(delta.a))])
        if not len(members):
            continue
        products = (b.t() @ b) * (a @ a.t())
        by_row = torch.zeros(len(changes), len(members), dtype=torch.float64).index_add_(0, members, products)
        total.index_add_(1, members, by_row)
    found: Floats = total.numpy()
    return (found + found.T) / 2


def cosines(products: Floats) -> Floats:
    """Turn a Gram matrix into cosines; of what is zero they are zero, and 1 with itself for the others."""
    lengths = np.sqrt(np.maximum(np.diag(products), 0.0))
    found: Floats = products / np.where(lengths > 0, lengths, 1.0)[:, None] / np.where(lengths > 0, lengths, 1.0)
    return np.clip(found, -1.0, 1.0)


def leading(products: Floats, most: int) -> Floats:
    """Keep the directions of the `most` largest eigenvalues of a Gram matrix, as a truncated SVD of the rows does."""
    if len(products) <= most:
        return products
    values, vectors = np.linalg.eigh(products)
    kept: Floats = (vectors[:, -most:] * np.maximum(values[-most:], 0.0)) @ vectors[:, -most:].T
    return kept
