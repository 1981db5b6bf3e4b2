"""Decide which units of a plan are routed, with the sizes that the rule may ask for."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from mediator_cli.bundle.sparse import (
    ALIGNMENT,
    aligned,
    gated_bytes,
    index_codec,
    most_bytes,
    most_override_bytes,
    shared_bytes,
)
from mediator_cli.bundle.sparse_file import HEADER_BYTES, entry_bytes
from mediator_cli.checkpoint.adapter.open import Adapter
from mediator_cli.checkpoint.header import DTYPE_BYTES
from mediator_cli.engine.extract.item import may_override
from mediator_cli.stages.assign import SparseSizes, assign_units
from mediator_cli.stages.extract import kept_count, most_random

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mediator_cli.checkpoint.adapter.changes import Change
    from mediator_cli.plan.model import Plan, ResolvedExtract, TensorPlan
    from mediator_cli.stages.assign import Decision


def assign_plan(plan: Plan, scores: Mapping[str, float]) -> dict[str, Decision]:
    """Decide for each unit of a plan by the recipe's rule; `scores` are the conflict of units, if it was measured."""
    spec = plan.loaded.recipe.assign
    sizes = sparse_sizes(plan, overrides=True) if spec.rule == "byte_budget" else None
    return assign_units(spec, plan.units, plan.candidates, plan.listed, scores, sizes)


def sparse_sizes(plan: Plan, *, overrides: bool = False) -> SparseSizes:
    """Bound the bytes of all sparse experts by unit.

    Overrides, rare entries of lossless experts, count only if asked for: their bound is far above what they ever take.
    """
    units = dict.fromkeys(plan.units, 0)
    for tensor in plan.tensors:
        if tensor.can_be_routed:
            units[tensor.unit] += _own_bytes(plan, tensor, overrides) + _shared_bytes_of(tensor)
    shares = any(tensor.extract.n_shared for tensor in plan.tensors if tensor.can_be_routed)
    return SparseSizes(units, (HEADER_BYTES + ALIGNMENT) * (len(plan.experts) + shares))


def _own_bytes(plan: Plan, tensor: TensorPlan, overrides: bool) -> int:
    """Bound what all experts keep of a tensor for themselves."""
    if tensor.extract.mode != "factors":
        return _bytes_of(tensor, overrides) * len(plan.experts)
    changes = (e.source.changes.get(tensor.name) for e in plan.experts if isinstance(e.source, Adapter))
    return sum(_factor_bytes(change) + entry_bytes(tensor.name) for change in changes if change is not None)


def _factor_bytes(change: Change) -> int:
    """Bound the two matrices of a change: those of several products are joined, and then in float32."""
    rank = sum(product.left.shape[1] for product in change.products)
    dtypes = {window.info.dtype for product in change.products for window in (product.left, product.right)}
    width = DTYPE_BYTES["BF16" if dtypes == {"BF16"} and len(change.products) == 1 else "F32"]
    return sum(aligned(side * rank * width) for side in change.shape)


def _shared_bytes_of(tensor: TensorPlan) -> int:
    extract = tensor.extract
    if not extract.n_shared or not tensor.size:
        return 0
    return shared_bytes(tensor.size, extract.n_shared, extract.values) + entry_bytes(tensor.name)


def _bytes_of(tensor: TensorPlan, overrides: bool) -> int:
    extract = tensor.extract
    if extract.mode != "sparse":
        return gated_bytes(tensor.size, extract.n_shared, extract.has_bits) + entry_bytes(tensor.name)
    index = None if extract.over == "model" else index_codec(extract.density)
    arrays = most_bytes(tensor.size, _most_kept(extract, tensor.size), extract.values, index) if tensor.size else 0
    if overrides and may_override(extract):
        arrays += most_override_bytes(tensor.size, DTYPE_BYTES[tensor.dtype])
    return arrays + entry_bytes(tensor.name)


def _most_kept(extract: ResolvedExtract, size: int) -> int:
    """Bound the entries of a tensor that are kept; over the model, its part of what all tensors keep together."""
    if extract.select == "random":
        return most_random(extract.density, size)
    return math.ceil(extract.density * size) if extract.over == "model" else kept_count(extract.density, size)
