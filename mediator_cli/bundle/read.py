"""Open a bundle: its manifest, its dense tensors, its sparse experts, and any mixture of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mediator_cli.bundle.deltas import SparseExpert, mix_deltas, open_sparse_expert
from mediator_cli.bundle.manifest import Manifest, bundle_file, read_manifest
from mediator_cli.bundle.sparse_file import SHARED
from mediator_cli.bundle.tensors import read_tensor
from mediator_cli.checkpoint.header import TensorInfo, read_tensors
from mediator_cli.errors import BundleError, Problem, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import torch

    from mediator_cli.bundle.deltas import Delta


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk: headers read, tensors not."""

    path: Path
    manifest: Manifest
    tensors: Mapping[str, TensorInfo]
    experts: Mapping[str, SparseExpert]

    def dense(self, name: str) -> torch.Tensor:
        """Read one tensor of the dense expert in its own dtype and shape."""
        if name not in self.tensors:
            raise BundleError(Problem(f"{self.path}: {name}", "no such tensor", did_you_mean(name, self.tensors)))
        return read_tensor(self.tensors[name])

    def expert(self, expert: str, name: str) -> torch.Tensor:
        """Read one tensor as that expert alone has it: dense plus sparse delta, or dense where units are averaged."""
        return self.mixture({expert: 1.0}, name)

    def mixture(self, weights: Mapping[str, float], name: str) -> torch.Tensor:
        """Mix one tensor: dense + Σ weight · sparse delta, summed in float32 in this order, rounded once."""
        dense = self.dense(name)
        deltas = [(self._sparse(expert), weight) for expert, weight in weights.items()]
        deltas = [(sparse, weight) for sparse, weight in deltas if name in sparse.tensors]
        if not deltas:
            return dense
        return mix_deltas(dense, [(self.delta(sparse.name, name), weight) for sparse, weight in deltas])

    def delta(self, expert: str, name: str) -> Delta:
        """Read what an expert adds to a tensor that it keeps something of; raise BundleError when it does not fit."""
        sparse = self._sparse(expert)
        shape, dense = sparse.tensors[name].shape, self.tensors[name].shape
        if shape != dense:
            message = f"shape {list(shape)}, the dense tensor has {list(dense)}"
            raise sparse.file_of(name).fault(name, message)
        return sparse.read(name)

    def _sparse(self, expert: str) -> SparseExpert:
        known = [source.name for source in self.manifest.experts]
        if expert not in known:
            raise BundleError(Problem(str(self.path), f"no expert '{expert}'", did_you_mean(expert, known)))
        return self.experts.get(expert) or SparseExpert(expert, ())


def read_bundle(folder: Path) -> Bundle:
    """Open a bundle for reading tensors; raise BundleError or CheckpointError when it is damaged."""
    manifest = read_manifest(folder)
    shared = None
    if manifest.shared is not None:
        shared = open_sparse_expert(SHARED, [bundle_file(folder, file.name) for file in manifest.shared.files])
    experts = {
        record.expert: open_sparse_expert(
            record.expert, [bundle_file(folder, file.name) for file in record.files], shared
        )
        for record in manifest.sparse
    }
    return Bundle(folder, manifest, read_tensors(folder), experts)
