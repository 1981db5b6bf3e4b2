"""The sparse experts of one matrix, stacked for products with a few tokens whose mixtures differ.

x · (dense + Σ weight · delta)ᵀ = x · denseᵀ + Σ weight · x · deltaᵀ: the second part costs per kept entry and token,
and no mixed matrix is built.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from mediator_cli.bundle.deltas import SparseDelta

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True)
class Stack:
    """The deltas of all experts of one matrix [rows, columns], below each other in compressed rows.

    `starts` [experts · rows + 1] and `columns` [k] are int32, `values` [k] float32.
    """

    shape: tuple[int, int]
    n_experts: int
    starts: torch.Tensor
    columns: torch.Tensor
    values: torch.Tensor

    @property
    def n_bytes(self) -> int:
        """Count the bytes held."""
        return sum(tensor.nbytes for tensor in (self.starts, self.columns, self.values))


def transpose(delta: SparseDelta, shape: tuple[int, int]) -> SparseDelta:
    """Turn the delta of a matrix [rows, columns] into one of [columns, rows], without overrides: products skip them."""
    n_rows, n_columns = shape
    turned = (delta.positions % n_columns) * n_rows + delta.positions // n_columns
    order = turned.argsort()
    return SparseDelta((n_columns, n_rows), turned[order], delta.values[order], delta.positions[:0], None)


def stack_deltas(deltas: Sequence[SparseDelta | None], shape: tuple[int, int], device: torch.device) -> Stack:
    """Stack one matrix's deltas in the order of experts; None where an expert keeps nothing of it."""
    n_rows, n_columns = shape
    counts = torch.zeros(len(deltas) * n_rows, dtype=torch.int64)
    for expert, delta in enumerate(deltas):
        if delta is not None:
            counts[expert * n_rows : (expert + 1) * n_rows] = torch.bincount(
                delta.positions // n_columns, minlength=n_rows
            )
    kept = [delta for delta in deltas if delta is not None]
    columns = [(delta.positions % n_columns).int() for delta in kept]
    return Stack(
        shape,
        len(deltas),
        torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]).int().to(device),
        torch.cat([torch.empty(0, dtype=torch.int32), *columns]).to(device),
        torch.cat([torch.empty(0), *(delta.values for delta in kept)]).to(device),
    )


def _part(stack: Stack, first: int, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    n_rows = stack.shape[0]
    starts = stack.starts[first * n_rows : (first + count) * n_rows + 1]
    kept = slice(int(starts[0]), int(starts[-1]))
    return starts - starts[0], stack.columns[kept], stack.values[kept]


@dataclass(frozen=True)
class Slice:
    """A run of neighbouring experts of a stack, as a matrix that torch multiplies."""

    first: int
    count: int
    matrix: torch.Tensor


def slice_stack(stack: Stack, used: Sequence[int]) -> Slice:
    """Take the shortest run of experts that holds all used ones; shares the stack's memory."""
    first, count = min(used), max(used) - min(used) + 1
    starts, columns, values = _part(stack, first, count)
    shape = (count * stack.shape[0], stack.shape[1])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        matrix = torch.sparse_csr_tensor(starts, columns, values, shape, check_invariants=False)
    return Slice(first, count, matrix)


def sparse_product(part: Slice, x: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Compute Σ scale · delta · x in float32: x [columns, tokens], scales [count, 1, tokens] → [rows, tokens]."""
    products = torch.sparse.mm(part.matrix, x).view(part.count, -1, x.shape[1])
    total: torch.Tensor = (products * scales).sum(0)
    return total


def sparse_rows(stack: Stack, indices: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Sum weight · delta of single rows: indices [tokens], weights [tokens, experts] → float32 [tokens, columns]."""
    total = torch.zeros(len(indices), stack.shape[1], device=indices.device)
    for expert in range(stack.n_experts):
        at = indices + expert * stack.shape[0]
        first = stack.starts[at].long()
        counts = stack.starts[at + 1].long() - first
        tokens = torch.arange(len(indices), device=indices.device).repeat_interleave(counts)
        within = torch.arange(len(tokens), device=indices.device) - (counts.cumsum(0) - counts)[tokens]
        kept = first[tokens] + within
        values = stack.values[kept] * weights[tokens, expert]
        total.index_put_((tokens, stack.columns[kept].long()), values, accumulate=True)
    return total
