"""Methods of the catalogue on a library: each matrix's factors to merged factors, as a recipe that merges them does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from threadpoolctl import threadpool_limits

from mediator_cli.bundle.factors import FactorDelta, as_delta
from mediator_cli.errors import RecipeError
from mediator_cli.kernels.arrays import Doubles, Floats
from mediator_cli.kernels.factors import Factors
from mediator_cli.methods._matrix import rank_of, svd
from mediator_cli.methods.registry import resolve_method
from mediator_cli.pipeline.adapters import drawing
from mediator_cli.strategies._fitting import fit_scale, names_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mediator_cli.methods.method import ResolvedMethod
    from mediator_cli.strategies.bench import Bench
    from mediator_cli.strategies.library import Change, Library
    from mediator_cli.strategies.strategy import Fitted

ActOn = Annotated[
    Literal["factors", "delta"],
    Field(description="delta: each product b·a as one matrix. factors: A and B by themselves, at far less cost."),
]
Density = Annotated[float, Field(gt=0, le=1, description="Share of entries that stay.")]
Sign = Annotated[
    Literal["total", "frequency"], Field(description="Elect each sign by the sum of entries, or by how many have it.")
]
Rank = Annotated[int, Field(ge=0, description="Rank that merged deltas are cut to; 0: the sum of the adapters' ranks.")]
Weights = dict[str, float]
Merge = Callable[[str, Sequence[Factors], Doubles], Factors]
"""What makes one matrix's factors of its name, those of all experts, and weights."""


@dataclass(frozen=True, eq=False)
class Merged:
    """What a method made: the change, and the share of its energy (squared singular values) that a cut has left."""

    change: Change
    energy: float = 1.0


def fit_merge(
    bench: Bench,
    merged: Callable[[Weights], Merged],
    weight: float,
    scale: float | None,
    tuning_rows: int,
) -> Fitted:
    """Merge with one weight for all experts, and find the factor on the result."""
    started = perf_counter()
    weights = dict.fromkeys(names_of(bench), weight)
    found = merged(weights)
    facts = {"weights": weights, "energy": found.energy}
    return fit_scale(bench, found.change, scale, tuning_rows, facts, started)


def merge_factors(bench: Bench, method: str, parameters: Mapping[str, Any], weights: Weights) -> Merged:
    """Merge matrix by matrix with a method of space `adapter`, as a recipe with this seed does."""
    resolved = _resolve(method, parameters)

    def one(tensor: str, adapters: Sequence[Factors], factors: Doubles) -> Factors:
        uniforms = drawing(bench.seed, list(weights), tensor.removesuffix(".weight"))
        return resolved.merge_factors(adapters, factors, uniforms)

    return Merged(_each(bench, weights, one))


def merge_where(bench: Bench, method: str, parameters: Mapping[str, Any], rank: int, weights: Weights) -> Merged:
    """Merge factors, or deltas which are then cut, as `act_on` says; raise RecipeError for a rank where nothing is."""
    if parameters["act_on"] == "delta":
        return merge_and_cut(bench, method, parameters, lambda ranks: rank or sum(ranks), weights)
    return merge_factors(bench, method, {**parameters, "rank": rank}, weights)


def merge_and_cut(
    bench: Bench, method: str, parameters: Mapping[str, Any], rank: Callable[[list[int]], int], weights: Weights
) -> Merged:
    """Merge with a method of space `adapter` that cuts to a rank, which is found from the adapters' ranks.

    The result is that of a recipe with this rank; here the energy that is cut off is counted too.
    """
    shares: list[tuple[float, float]] = []

    def cut(tensor: str, adapters: Sequence[Factors], factors: Doubles) -> Factors:
        resolved = _resolve(method, {**parameters, "rank": min(adapters[0].shape)})
        uniforms = drawing(bench.seed, list(weights), tensor.removesuffix(".weight"))
        full, kept = resolved.merge_factors(adapters, factors, uniforms), rank([x.rank for x in adapters])
        # The factors are singular vectors, each with the root of its value.
        squares = np.square(np.square(full.b.astype(np.float64)).sum(axis=0))
        shares.append((float(squares[:kept].sum()), float(squares.sum())))
        return Factors(full.a[:kept], full.b[:, :kept])

    change = _each(bench, weights, cut)
    left, total = (sum(values) for values in zip(*shares, strict=True)) if shares else (0.0, 0.0)
    return Merged(change, left / total if total else 1.0)


def merge_in_outputs(bench: Bench, method: str, parameters: Mapping[str, Any], weights: Weights) -> Merged:
    """Merge with a method on deltas in the smallest basis of their outputs, without making the deltas, and go back.

    With an orthonormal basis Q of all bₜ side by side the method gets Qᵀ·bₜ·aₜ, and Q goes before what it makes. That
    is what it makes of the deltas where turning all of them from the left turns the result alike.
    """
    return _merge_turned(bench, method, parameters, weights, is_core=False)


def merge_in_core(bench: Bench, method: str, parameters: Mapping[str, Any], weights: Weights) -> Merged:
    """Merge with a method on deltas in the smallest bases of their outputs and inputs, and go back.

    That is what it makes of the deltas where turning all of them from either side turns the result alike.
    """
    return _merge_turned(bench, method, parameters, weights, is_core=True)


def _merge_turned(
    bench: Bench, method: str, parameters: Mapping[str, Any], weights: Weights, *, is_core: bool
) -> Merged:
    resolved = _resolve(method, parameters)

    def one(_: str, adapters: Sequence[Factors], factors: Doubles) -> Factors:
        left = _basis(np.concatenate([x.b for x in adapters], axis=1))
        right = _basis(np.concatenate([x.a for x in adapters]).T) if is_core else None
        each = [x.a.astype(np.float64) if right is None else x.a @ right for x in adapters]
        cores = np.stack([(left.T @ x.b * x.scaling) @ a for x, a in zip(adapters, each, strict=True)])
        merged = resolved(cores.astype(np.float32), factors) if cores.size else np.zeros((0, cores.shape[2]))
        a = merged if right is None else merged @ right.T
        return Factors(a.astype(np.float32), left[:, : len(a)].astype(np.float32))

    return Merged(_each(bench, weights, one))


def _basis(columns: Floats) -> Doubles:
    """Give an orthonormal basis of the columns, without those that rounding leaves; [rows, rank]."""
    u, s, _ = svd(columns)
    return u[:, : rank_of(s, columns.shape)]


def factors_of(library: Library, names: Sequence[str], tensor: str) -> list[Factors]:
    """Give what experts add to one matrix, in their order; of rank 0 where one leaves it as it is."""
    found = [library.experts[name].get(tensor) for name in names]
    rows, columns = next(delta.shape for delta in found if delta is not None)
    none = FactorDelta(torch.zeros(0, columns), torch.zeros(rows, 0))
    return [
        _as_factors(delta or none, library.scalings.get(name, {}).get(tensor, 1.0))
        for name, delta in zip(names, found, strict=True)
    ]


def _as_factors(delta: FactorDelta, scaling: float) -> Factors:
    return Factors(delta.a.numpy(), (delta.b / scaling).numpy() if scaling else delta.b.numpy(), scaling or 1.0)


def _each(bench: Bench, weights: Weights, one: Merge) -> Change:
    """Merge every matrix that some expert changes; what comes out with rank 0 is left as it is."""
    names, library = list(weights), bench.library
    tensors = list(dict.fromkeys(tensor for name in names for tensor in library.experts[name]))
    factors = np.array(list(weights.values()), np.float64)
    found: Change = {}
    # Sums of several threads may differ in the last bit.
    with threadpool_limits(1, user_api="blas"):
        for at, tensor in enumerate(tensors, 1):
            merged = one(tensor, factors_of(library, names, tensor), factors)
            if merged.rank:
                found[tensor] = as_delta(merged)
            bench.progress("merge adapters", at, len(tensors))
    return found


def _resolve(method: str, parameters: Mapping[str, Any]) -> ResolvedMethod:
    found = resolve_method(method, None, parameters, lambda field: field)
    if isinstance(found, list):
        raise RecipeError(found)
    return found
