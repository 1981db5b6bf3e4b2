"""Sparse experts as the run time computes with them: decoded tensors, and mixtures of them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from mediator_cli.bundle.sparse_file import SparseFile, SparseTensor, open_sparse_file
from mediator_cli.bundle.tensors import as_tensor
from mediator_cli.errors import BundleError, Problem

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

_DAMAGED = "the bundle is damaged; fetch it or merge again"


@dataclass(frozen=True)
class SparseDelta:
    """One sparse expert's tensor, decoded: values [k] at flat positions [k], exact tensors at overrides."""

    shape: tuple[int, ...]
    positions: torch.Tensor
    values: torch.Tensor
    override_positions: torch.Tensor
    override_values: torch.Tensor | None

    def add_to(self, dense: torch.Tensor, weight: float = 1.0) -> torch.Tensor:
        """Add weight · delta to a dense tensor in float32 and round once to its dtype.

        At weight 1, the mixture of this expert alone, overrides replace what rounding would have changed.
        """
        # Entries that the expert does not touch keep their bits, so only the others pass through float32.
        mixed = dense.flatten().clone()
        positions, values = self.positions.to(dense.device), self.values.to(dense.device)
        mixed[positions] = (mixed[positions].float() + values * weight).to(dense.dtype)
        if weight == 1.0 and self.override_values is not None:
            mixed[self.override_positions.to(dense.device)] = self.override_values.to(dense.device, dense.dtype)
        return mixed.view(dense.shape)


def mix_deltas(dense: torch.Tensor, deltas: Sequence[tuple[SparseDelta, float]]) -> torch.Tensor:
    """Build dense + Σ weight · delta: summed in float32 in this order, rounded once to the dtype of `dense`."""
    if len(deltas) == 1:
        delta, weight = deltas[0]
        return delta.add_to(dense, weight)
    mixed = dense.flatten().to(torch.float32, copy=True)
    for delta, weight in deltas:
        mixed.index_add_(0, delta.positions.to(dense.device), delta.values.to(dense.device) * weight)
    return mixed.to(dense.dtype).view(dense.shape)


def read_delta(sparse: SparseFile, name: str) -> SparseDelta:
    """Decode one tensor of a sparse expert's file; raise BundleError when it is damaged."""
    entries = sparse.decode(name)
    exact = as_tensor(entries.override_values, entries.override_dtype) if entries.override_dtype else None
    return SparseDelta(
        sparse.tensors[name].shape,
        torch.from_numpy(entries.positions),
        torch.from_numpy(entries.values),
        torch.from_numpy(entries.override_positions),
        exact,
    )


@dataclass(frozen=True)
class SparseExpert:
    """A sparse expert in all its files, opened."""

    name: str
    files: tuple[SparseFile, ...]

    @cached_property
    def tensors(self) -> Mapping[str, SparseTensor]:
        """The specification of each tensor."""
        return {name: spec for file in self.files for name, spec in file.tensors.items()}

    def file_of(self, name: str) -> SparseFile:
        """Find the file that holds a tensor."""
        return next(file for file in self.files if name in file.tensors)

    def read(self, name: str) -> SparseDelta:
        """Decode one tensor; raise BundleError when it is damaged."""
        return read_delta(self.file_of(name), name)


def open_sparse_expert(expert: str, files: Sequence[Path]) -> SparseExpert:
    """Open the files of a sparse expert: headers only.

    Raises CheckpointError when a header is broken, BundleError when a file is not this expert's or two hold a tensor.
    """
    opened = tuple(map(open_sparse_file, files))
    for file in opened:
        if file.expert != expert:
            raise BundleError(Problem(str(file.file), f"is of expert '{file.expert}', not '{expert}'", _DAMAGED))
    counts = Counter(name for file in opened for name in file.tensors)
    if twice := [name for name, count in counts.items() if count > 1]:
        raise BundleError(Problem(str(files[-1]), f"{twice[0]} stands in another file too", _DAMAGED))
    return SparseExpert(expert, opened)
