"""The sparse experts of one tensor on disk, decoded when they are used: opening a bundle costs little memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from mediator_cli.bundle.deltas import SparseDelta, mix_deltas
from mediator_cli.bundle.factors import FactorDelta
from mediator_cli.bundle.sparse_file import STORED_AS
from mediator_cli.checkpoint.header import DTYPE_BYTES
from mediator_cli.runtime.gated import stack_gates, turned
from mediator_cli.runtime.low_rank import stack_factors
from mediator_cli.runtime.stack import stack_deltas, transpose

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mediator_cli.bundle.deltas import Delta
    from mediator_cli.bundle.read import Bundle
    from mediator_cli.runtime.gated import GatedStack
    from mediator_cli.runtime.low_rank import LowRankStack
    from mediator_cli.runtime.stack import Stack

_STACKED_BYTES = 8
"""Of a kept entry: its column and its value in four bytes each."""
_FLOAT_BYTES = 4


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
    def changers(self) -> tuple[bool, ...]:
        """Tell which experts change the tensor at all: one may be listed and keep no entry of it."""
        specs = (None if name is None else self.bundle.experts[name].tensors[self.name] for name in self.keepers)
        return tuple(spec is not None and bool(spec.is_gated or spec.n_kept or spec.n_overrides) for spec in specs)

    @property
    def is_gated(self) -> bool:
        """Whether experts keep all entries of the tensor and not a list of them.

        Raises BundleError where some do and others do not.
        """
        kept = [self.bundle.experts[expert] for expert in self.keepers if expert]
        specs = [each.tensors[self.name] for each in kept]
        ways = {(spec.is_gated or spec.is_low_rank, spec.values, spec.index) for spec in specs}
        if len(ways) > 1 and any(is_special for is_special, *_ in ways):
            raise kept[-1].file_of(self.name).fault(self.name, "is stored in another way than by other experts")
        return any(spec.is_gated for spec in specs)

    @property
    def is_low_rank(self) -> bool:
        """Whether experts keep the tensor as two small matrices."""
        kept = (self.bundle.experts[expert].tensors[self.name] for expert in self.keepers if expert)
        return any(spec.is_low_rank for spec in kept)

    @property
    def stack_bytes(self) -> int:
        """Count about how many bytes the stack of a matrix takes."""
        if self.is_gated:
            return self._gated_bytes()
        kept = [self.bundle.experts[expert].tensors[self.name] for expert in self.keepers if expert]
        if self.is_low_rank:
            return sum(spec.rank * sum(spec.shape) for spec in kept) * _FLOAT_BYTES
        return sum(spec.n_kept for spec in kept) * _STACKED_BYTES

    def _gated_bytes(self) -> int:
        first = next(self.bundle.experts[expert] for expert in self.keepers if expert)
        spec = first.tensors[self.name]
        has_bits = spec.values == "sign" or spec.index == "bitmap"
        stored = None if first.shared is None else first.shared.tensors.get(self.name)
        width = 0 if spec.values != "shared" or stored is None else DTYPE_BYTES[STORED_AS[stored.values]]
        return spec.size * (has_bits * -(-len(self.keepers) // 8) + spec.n_shared * width)

    def read(self, expert: str) -> Delta:
        """Decode one expert's delta; raise BundleError when it is damaged."""
        return self.bundle.delta(expert, self.name)

    def mix(self, dense: torch.Tensor, weights: Sequence[float]) -> torch.Tensor:
        """Build the mixed tensor as the bundle's reader does."""
        used = [
            (self.read(name), weight) for name, weight in zip(self.keepers, weights, strict=True) if name and weight
        ]
        return mix_deltas(dense, used)

    def stack(self, device: torch.device) -> Stack | GatedStack | LowRankStack:
        """Stack the deltas of a matrix, as [out, in]."""
        n_rows, n_columns = self.bundle.tensors[self.name].shape
        if self.is_low_rank:
            low_rank = stack_factors([self._factors(name) for name in self.keepers], (n_rows, n_columns), device)
            return low_rank.turned() if self.transposed else low_rank
        if self.is_gated:
            gated = self._stack_gates((n_rows, n_columns), device)
            return turned(gated) if self.transposed else gated
        deltas = [self._sparse(name) if name else None for name in self.keepers]
        if not self.transposed:
            return stack_deltas(deltas, (n_rows, n_columns), device)
        others = [None if delta is None else transpose(delta, (n_rows, n_columns)) for delta in deltas]
        return stack_deltas(others, (n_columns, n_rows), device)

    def _factors(self, expert: str | None) -> FactorDelta | None:
        delta = None if expert is None else self.read(expert)
        if delta is not None and not isinstance(delta, FactorDelta):
            raise TypeError(type(delta).__name__)
        return delta

    def _sparse(self, expert: str) -> SparseDelta:
        delta = self.read(expert)
        if not isinstance(delta, SparseDelta):
            raise TypeError(type(delta).__name__)
        return delta

    def _stack_gates(self, shape: tuple[int, int], device: torch.device) -> GatedStack:
        experts = [self.bundle.experts[name] if name else None for name in self.keepers]
        first = next(expert for expert in experts if expert is not None)
        gates = [None if expert is None else expert.gate(self.name) for expert in experts]
        return stack_gates(gates, first.shared_arrays(self.name), shape, device)

    def rows(self) -> torch.Tensor:
        """Decode the deltas of a vector into float32 [experts, n]."""
        rows = torch.zeros(len(self.keepers), *self.bundle.tensors[self.name].shape)
        for row, name in zip(rows, self.keepers, strict=True):
            if name:
                row[:] = self.read(name).flat().view(row.shape)
        return rows
