"""Experts of one matrix that are not stored sparsely, as they are kept for products: bits of all experts in one code.

x · (dense + Σ weight · delta)ᵀ = x · denseᵀ + x · (Σ weight · delta)ᵀ: the second sum is one matrix for each different
mixture, whatever the number of experts. It is made a few rows at a time and not kept: an entry's bits over all experts
are one number, which looks its factor up in a table of the mixture, and the factor multiplies what experts share.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from mediator_cli.bundle.gated import unpack

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mediator_cli.bundle.gated import Gate
    from mediator_cli.runtime.mixing import Part

_BITS = 8
_CHUNK = 1 << 20
"""Entries of a mixture that are made at a time."""


@dataclass(frozen=True)
class GatedStack:
    """The experts of one matrix [rows, columns].

    `codes` [⌈experts / 8⌉, rows, columns] hold a bit of each expert an entry, `shared` [k, rows, columns] what they
    share, `coefficients` [experts, k] float32 what each has of it. A `signed` bit 0 stands for -1.
    """

    shape: tuple[int, int]
    codes: torch.Tensor | None
    shared: torch.Tensor | None
    coefficients: torch.Tensor
    signed: bool

    @property
    def n_bytes(self) -> int:
        """Count the bytes held."""
        return sum(tensor.nbytes for tensor in (self.codes, self.shared, self.coefficients) if tensor is not None)

    def rows(self, mixture: torch.Tensor, at: slice | torch.Tensor) -> torch.Tensor:
        """Mix some rows with weights [experts]; float32 [rows chosen, columns]."""
        factors = self.coefficients * mixture[:, None]
        each = [self._gated(own, at) for own in factors.unbind(1)]
        if self.shared is None:
            return each[0]
        total = self.shared[0, at].float() * each[0]
        for array, factor in zip(self.shared[1:], each[1:], strict=True):
            total += array[at].float() * factor
        return total

    def _gated(self, factors: torch.Tensor, at: slice | torch.Tensor) -> torch.Tensor:
        """Sum the factors [experts] of one shared array where gates are open."""
        return factors.sum() if self.codes is None else _look_up(self.codes[:, at], factors, self.signed)


def _look_up(codes: torch.Tensor, factors: torch.Tensor, signed: bool) -> torch.Tensor:
    """Sum the factors [experts] of the bits that are set in codes [groups, …]; float32 […]."""
    total = torch.zeros((), device=codes.device)
    for group, own in zip(codes, factors.split(_BITS), strict=True):
        numbers = torch.arange(1 << len(own), dtype=torch.uint8, device=codes.device)
        bits = ((numbers[:, None] >> torch.arange(len(own), dtype=torch.uint8, device=codes.device)) & 1).float()
        table = (2 * bits - 1 if signed else bits) @ own
        total = total + table.index_select(0, group.flatten().int()).view(group.shape)
    return total


def stack_gates(
    gates: Sequence[Gate | None], shared: torch.Tensor | None, shape: tuple[int, int], device: torch.device
) -> GatedStack:
    """Stack one matrix's experts in their order; None where an expert keeps nothing of it."""
    kept = [gate for gate in gates if gate is not None]
    n_shared = len(kept[0].coefficients)
    none = torch.zeros(n_shared)
    coefficients = torch.stack([none if gate is None else gate.coefficients for gate in gates])
    codes = None
    if kept[0].bits is not None:
        codes = torch.zeros(-(-len(gates) // _BITS), shape[0] * shape[1], dtype=torch.uint8)
        for at, gate in enumerate(gates):
            if gate is not None and gate.bits is not None:
                codes[at // _BITS] |= unpack(gate.bits, gate.size).to(torch.uint8) << (at % _BITS)
        codes = codes.view(-1, *shape).to(device)
    stored = None if shared is None else shared.to(device)
    return GatedStack(shape, codes, stored, coefficients.to(device), kept[0].signed)


def turned(stack: GatedStack) -> GatedStack:
    """Turn the experts of a matrix into those of its transpose."""
    codes, shared = (None if x is None else x.transpose(1, 2).contiguous() for x in (stack.codes, stack.shared))
    return GatedStack((stack.shape[1], stack.shape[0]), codes, shared, stack.coefficients, stack.signed)


def gated_product(stack: GatedStack, x: torch.Tensor, part: Part) -> torch.Tensor:
    """Compute Σ weight · delta · x for the mixtures of a part: x [columns, tokens] → float32 [rows, tokens]."""
    total = torch.zeros(stack.shape[0], x.shape[1], device=x.device)
    step = max(1, _CHUNK // max(1, stack.shape[1]))
    per_row = x.shape[1] // len(part.weights)
    for mixture, rows in part.mixtures:
        tokens = (rows[:, None] * per_row + torch.arange(per_row, device=x.device)).flatten()
        own = x if len(rows) == len(part.weights) else x[:, tokens]
        for start in range(0, stack.shape[0], step):
            at = slice(start, start + step)
            total[at, tokens] = stack.rows(mixture, at) @ own
    return total


def gated_rows(stack: GatedStack, indices: torch.Tensor, part: Part) -> torch.Tensor:
    """Mix single rows of a matrix: indices [tokens], as many for each row of a part → float32 [tokens, columns]."""
    total = torch.zeros(len(indices), stack.shape[1], device=indices.device)
    per_row = len(indices) // len(part.weights)
    for mixture, rows in part.mixtures:
        tokens = (rows[:, None] * per_row + torch.arange(per_row, device=indices.device)).flatten()
        total[tokens] = stack.rows(mixture, indices[tokens])
    return total
