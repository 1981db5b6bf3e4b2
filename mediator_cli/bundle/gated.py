"""What an expert adds to a tensor that is not stored sparsely: shared arrays behind a gate, or signs; see README.md."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from mediator_cli.bundle.tensors import as_tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mediator_cli.bundle.sparse_file import SparseFile


@dataclass(frozen=True)
class Gate:
    """An expert's own part: packed bits [⌈size / 8⌉] or none, and coefficients float32 [k].

    A `signed` bit 0 stands for -1 and not for 0; then there is one coefficient, and no shared array.
    """

    size: int
    bits: torch.Tensor | None
    coefficients: torch.Tensor
    signed: bool

    def flags(self) -> torch.Tensor | None:
        """Unpack the bits into bools [size]; None without."""
        return None if self.bits is None else unpack(self.bits, self.size)


@dataclass(frozen=True)
class GatedDelta:
    """What an expert adds to every entry of a tensor: float32 [size]."""

    shape: tuple[int, ...]
    values: torch.Tensor

    def add_to(self, dense: torch.Tensor, weight: float = 1.0) -> torch.Tensor:
        """Add weight · delta to a dense tensor in float32 and round once to its dtype."""
        mixed = dense.flatten().to(torch.float32, copy=True)
        self.add_into(mixed, weight)
        return mixed.to(dense.dtype).view(dense.shape)

    def add_into(self, mixed: torch.Tensor, weight: float) -> None:
        """Add weight · delta to a flat float32 tensor in place."""
        mixed += self.values.to(mixed.device) * weight

    def flat(self) -> torch.Tensor:
        """Give all entries as float32 [size]."""
        return self.values


def unpack(bits: torch.Tensor, size: int) -> torch.Tensor:
    """Unpack bytes [⌈size / 8⌉] into bools [size], the first in the lowest bit."""
    places = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return ((bits[:, None] >> places) & 1).bool().flatten()[:size]


def read_gate(sparse: SparseFile, name: str) -> Gate:
    """Read an expert's own part of a tensor; raise BundleError when its arrays do not fit."""
    spec, packed = sparse.tensors[name], sparse.bits(name)
    if spec.index == "gaps":
        raise sparse.fault(name, "has a gate that is no bitmap")
    bits = None if packed is None else torch.from_numpy(packed)
    if spec.values == "sign":
        return Gate(spec.size, bits, torch.tensor([spec.scale], dtype=torch.float32), signed=True)
    if spec.values != "shared" or not spec.n_shared:
        raise sparse.fault(name, f"keeps all entries as {spec.values} of {spec.n_shared} shared arrays")
    return Gate(spec.size, bits, torch.from_numpy(sparse.coefficients(name)).float(), signed=False)


def read_shared(sparse: SparseFile, name: str) -> torch.Tensor:
    """Read the arrays that experts share of a tensor, in their own dtype: [k, …]."""
    values, dtype = sparse.stored_values(name)
    return as_tensor(values, dtype).view(sparse.tensors[name].shape)


def gated_delta(gate: Gate, shared: torch.Tensor | None, shape: Sequence[int]) -> GatedDelta:
    """Compute what an expert adds, from its gate and the shared arrays [k, …]; in float32, in the order of arrays."""
    flags = gate.flags()
    if shared is None:
        scale = gate.coefficients[0]
        values = torch.where(torch.ones(gate.size, dtype=torch.bool) if flags is None else flags, scale, -scale)
    else:
        values = shared[0].flatten().float() * gate.coefficients[0]
        for array, coefficient in zip(shared[1:], gate.coefficients[1:], strict=True):
            values += array.flatten().float() * coefficient
        if flags is not None:
            values = torch.where(flags, values, torch.zeros(()))
    return GatedDelta(tuple(shape), values)
