"""The sparse experts of one tensor on disk, decoded when they are used: opening a bundle costs little memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from mediator_cli.bundle.deltas import mix_deltas
from mediator_cli.runtime.stack import stack_deltas, transpose

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mediator_cli.bundle.deltas import SparseDelta
    from mediator_cli.bundle.read import Bundle
    from mediator_cli.runtime.stack import Stack

_STACKED_BYTES = 8
"""Of a kept entry: its column and its value in four bytes each."""


@dataclass(frozen=True)
class Deltas:
    """What all experts of a bundle, in its order, add to one tensor; `transposed` if the model computes x · W."""

    bundle: Bundle
    name: str
    transposed: bool = False

    @property
    def keepers(self) -> tuple[str | None, ...]:
        """Name the experts that keep something of the tensor, None in place of the others."""
        experts = (source.name for source in self.bundle.manifest.experts)
        sparse = self.bundle.experts
        return tuple(expert if expert in sparse and self.name in sparse[expert].tensors else None for expert in experts)

    @property
    def stack_bytes(self) -> int:
        """Count about how many bytes the stack of a matrix takes."""
        kept = (self.bundle.experts[expert].tensors[self.name].n_kept for expert in self.keepers if expert)
        return sum(kept) * _STACKED_BYTES

    def read(self, expert: str) -> SparseDelta:
        """Decode one expert's delta; raise BundleError when it is damaged."""
        return self.bundle.delta(expert, self.name)

    def mix(self, dense: torch.Tensor, weights: Sequence[float]) -> torch.Tensor:
        """Build the mixed tensor as the bundle's reader does."""
        used = [
            (self.read(name), weight) for name, weight in zip(self.keepers, weights, strict=True) if name and weight
        ]
        return mix_deltas(dense, used)

    def stack(self, device: torch.device) -> Stack:
        """Stack the deltas of a matrix, as [out, in]."""
        n_rows, n_columns = self.bundle.tensors[self.name].shape
        deltas = [self.read(name) if name else None for name in self.keepers]
        if not self.transposed:
            return stack_deltas(deltas, (n_rows, n_columns), device)
        turned = [None if delta is None else transpose(delta, (n_rows, n_columns)) for delta in deltas]
        return stack_deltas(turned, (n_columns, n_rows), device)

    def rows(self) -> torch.Tensor:
        """Decode the deltas of a vector into float32 [experts, n]."""
        rows = torch.zeros(len(self.keepers), *self.bundle.tensors[self.name].shape)
        for row, name in zip(rows, self.keepers, strict=True):
            if name:
                delta = self.read(name)
                row[delta.positions] = delta.values
        return rows
