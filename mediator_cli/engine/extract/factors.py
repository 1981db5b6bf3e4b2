"""Adapters that are kept as they are: their two small matrices go from file to file, one tensor after the other."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from mediator_cli.bundle.factor_writer import add_factors
from mediator_cli.checkpoint.adapter.factors import read_change
from mediator_cli.checkpoint.read import open_files
from mediator_cli.engine.extract.encode import Kept
from mediator_cli.errors import CheckpointError, Problem

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from mediator_cli.bundle.sparse_writer import SparseFileWriter
    from mediator_cli.checkpoint.adapter.open import Adapter
    from mediator_cli.kernels.factors import Factors
    from mediator_cli.plan.model import TensorPlan


def extract_factors(
    adapters: Mapping[str, Adapter], tensors: Sequence[TensorPlan], writers: Mapping[str, SparseFileWriter]
) -> dict[str, dict[str, dict[str, Any]]]:
    """Append the factors of tensors to the files of the experts that change them.

    Gives what stands there, for the journal, by expert and tensor. Raises CheckpointError for NaN and infinite values.
    """
    names = [tensor.name for tensor in tensors if tensor.size]
    return {expert: dict(_append(adapters[expert], names, writers[expert])) for expert in adapters if expert in writers}


def _append(adapter: Adapter, names: Sequence[str], writer: SparseFileWriter) -> Iterator[tuple[str, dict[str, Any]]]:
    with open_files([adapter.file]) as handles:
        for name in names:
            if name not in adapter.changes:
                continue
            factors = read_change(handles, adapter.changes[name])
            _check_finite(adapter, name, factors)
            spec, dtype = add_factors(writer, name, factors)
            kept = Kept(spec.n_kept, 0, energy_of(factors), 0.0)
            facts = {"spec": spec.model_dump(mode="json"), "n_index": 0, "dtype": dtype, "kept": asdict(kept)}
            yield name, facts


def _check_finite(adapter: Adapter, name: str, factors: Factors) -> None:
    if not (np.isfinite(factors.a).all() and np.isfinite(factors.b).all()):
        hint = "train or fetch the adapter again, or leave it out"
        raise CheckpointError(Problem(f"{adapter.file}: {name}", "holds NaN or infinite values", hint))


def energy_of(factors: Factors) -> float:
    """Square the norm of scaling · b · a without making it: the sum over (bᵀb) ∘ (a aᵀ)."""
    a, b = factors.a.astype(np.float64), factors.b.astype(np.float64)
    return float(factors.scaling**2 * ((b.T @ b) * (a @ a.T)).sum())
