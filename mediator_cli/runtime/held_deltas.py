"""What low-rank experts that are held in memory add to one matrix."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mediator_cli.bundle.deltas import mix_deltas
from mediator_cli.runtime.low_rank import stack_factors

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from mediator_cli.bundle.factors import FactorDelta
    from mediator_cli.runtime.low_rank import LowRankStack


@dataclass
class HeldDeltas:
    """What all experts add to one matrix [rows, columns], in their order; None where one leaves it as it is."""

    name: str
    shape: tuple[int, int]
    transposed: bool
    experts: Sequence[FactorDelta | None] = field(default=())

    is_gated = False
    is_low_rank = True

    @property
    def stack_bytes(self) -> int:
        """Count the bytes of the stack."""
        return sum(delta.a.nbytes + delta.b.nbytes for delta in self.experts if delta is not None)

    @property
    def changers(self) -> tuple[bool, ...]:
        """Tell which experts change the tensor at all."""
        return tuple(delta is not None for delta in self.experts)

    def mix(self, dense: torch.Tensor, weights: Sequence[float]) -> torch.Tensor:
        """Build the mixed tensor."""
        pairs = zip(self.experts, weights, strict=True)
        return mix_deltas(dense, [(delta, weight) for delta, weight in pairs if delta is not None and weight])

    def stack(self, device: torch.device) -> LowRankStack:
        """Stack the experts, as [out, in]."""
        stack = stack_factors(self.experts, self.shape, device)
        return stack.turned() if self.transposed else stack
