"""Sparse experts as the run time computes with them: decoded tensors, and mixtures of them."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from mediator_cli.bundle.factors import FactorDelta, as_delta
from mediator_cli.bundle.gated import GatedDelta, gated_delta, read_gate, read_shared
from mediator_cli.bundle.sparse import FLOAT_CODECS
from mediator_cli.bundle.sparse_file import SparseFile, SparseTensor, open_sparse_file
from mediator_cli.bundle.tensors import as_tensor
from mediator_cli.errors import BundleError, Problem

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from mediator_cli.bundle.gated import Gate

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

    def add_into(self, mixed: torch.Tensor, weight: float) -> None:
        """Add weight · delta to a flat float32 tensor in place, without overrides."""
        mixed.index_add_(0, self.positions.to(mixed.device), self.values.to(mixed.device) * weight)

    def flat(self) -> torch.Tensor:
        """Give all entries as float32 [size]."""
        entries = torch.zeros(math.prod(self.shape))
        entries[self.positions] = self.values
        return entries


Delta = SparseDelta | GatedDelta | FactorDelta


def mix_deltas(dense: torch.Tensor, deltas: Sequence[tuple[Delta, float]]) -> torch.Tensor:
    """Build dense + Σ weight · delta: summed in float32 in this order, rounded once to the dtype of `dense`."""
    if len(deltas) == 1:
        delta, weight = deltas[0]
        return delta.add_to(dense, weight)
    mixed = dense.flatten().to(torch.float32, copy=True)
    for delta, weight in deltas:
        delta.add_into(mixed, weight)
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
    """A sparse expert in all its files, opened; `shared` are the arrays that it shares with others, if any."""

    name: str
    files: tuple[SparseFile, ...]
    shared: SparseExpert | None = None

    @cached_property
    def tensors(self) -> Mapping[str, SparseTensor]:
        """The specification of each tensor."""
        return {name: spec for file in self.files for name, spec in file.tensors.items()}

    def file_of(self, name: str) -> SparseFile:
        """Find the file that holds a tensor."""
        return next(file for file in self.files if name in file.tensors)

    def read(self, name: str) -> Delta:
        """Decode one tensor; raise BundleError when it is damaged."""
        if self.tensors[name].is_low_rank:
            return as_delta(self.file_of(name).factors(name))
        if not self.tensors[name].is_gated:
            return read_delta(self.file_of(name), name)
        return gated_delta(self.gate(name), self.shared_arrays(name), self.tensors[name].shape)

    def gate(self, name: str) -> Gate:
        """Read the own part of a tensor that is not stored sparsely."""
        return read_gate(self.file_of(name), name)

    def shared_arrays(self, name: str) -> torch.Tensor | None:
        """Read the arrays [k, …] that a tensor's values are gathered from; None where it has its own.

        Raises BundleError when they are missing or do not fit.
        """
        spec = self.tensors[name]
        if spec.values != "shared":
            return None
        if self.shared is None or name not in self.shared.tensors:
            raise self.file_of(name).fault(name, "its shared arrays are missing")
        found = self.shared.tensors[name]
        is_whole = found.values in FLOAT_CODECS and found.index == "all" and found.n_kept == found.size
        if found.shape != (spec.n_shared, *spec.shape) or not is_whole:
            raise self.file_of(name).fault(name, f"its shared arrays are {found.values} {list(found.shape)}")
        return read_shared(self.shared.file_of(name), name)


def open_sparse_expert(expert: str, files: Sequence[Path], shared: SparseExpert | None = None) -> SparseExpert:
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
    return SparseExpert(expert, opened, shared)
