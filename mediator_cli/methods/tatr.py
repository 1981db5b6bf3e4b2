"""Drop the entries in which the experts conflict most, add the rest."""

from __future__ import annotations

from typing import Annotated

import numpy as np
from pydantic import Field

from mediator_cli.kernels.arrays import Doubles, Floats
from mediator_cli.methods._kernels_scores import conflicts
from mediator_cli.methods._ops import Lambda, floats, kth_magnitudes, weighted_sum
from mediator_cli.methods.registry import merge_method
from mediator_cli.methods.statistics import Over, Params, Select, Slab


def _conflict(deltas: Floats, weights: Doubles) -> Floats:
    """Score the conflict of each entry, Ω; float32 [1, m]."""
    found = np.empty((1, deltas.shape[1]), np.float32)
    conflicts(floats(deltas), floats(weights), found[0])
    return found


def _conflict_of(slab: Slab) -> Floats:
    return _conflict(slab.inputs, slab.weights)


def _limit_rank(params: Params, n: int) -> int:
    """Give the rank of the entry from which on conflict is too large: at index int(n·density) of the ascending ones."""
    return n - min(int(n * params["density"]), n - 1) if n else 0


def _drops_some(params: Params) -> bool:
    return bool(params["density"] < 1)


def _over_model(params: Params) -> Over:
    return "model"


@merge_method(
    space="delta",
    reference="https://openreview.net/forum?id=q3ztjJRQuJ",
    statistics=(Select("limit", _limit_rank, _over_model, _drops_some, of=_conflict_of, joint=True, smallest=True),),
    presets={"fusion_bench": {"density": 0.99, "lambda": 0.3}},
    n_inputs=(2, None),
)
def tatr(
    deltas: Floats,
    weights: Doubles,
    *,
    density: Annotated[
        float, Field(gt=0, le=1, description="Share of the model's entries that is kept, those of least conflict.")
    ] = 0.99,
    lambda_: Lambda = 0.3,
    limit: Floats | None = None,
) -> Floats:
    """Drop the entries where the experts conflict most, add the rest: W₀ + λ · Σ wₜ·τₜ · [Ω < limit].

    Ω = Σ over ordered pairs i ≠ j of |wᵢ·τᵢ|·|wⱼ·τⱼ|: large where several experts moved far, whatever the signs. The
    limit is Ω at index int(d·density) of all d entries of the model in rising order; what reaches it is dropped. An
    entry that at most one expert changed has no conflict and always stays.

    Apt when task_arithmetic of several experts needs a guard: the few entries that all of them need are the base's.
    This is the zero-shot form, in which deltas stand for gradients.

    Not apt when experts agree in what they move most: agreement counts as conflict here.

    Elsewhere: fusion_bench drops everything where the limit is zero; here entries without conflict stay.

    >>> tatr(np.array([[1, 2, 4], [0, 1, -3]], np.float32), np.ones(2), density=0.7, lambda_=1.0).tolist()
    [1.0, 3.0, 0.0]
    """
    total = weighted_sum(deltas, weights, factor=lambda_)
    if density >= 1:
        return total
    conflict = _conflict(deltas, weights)
    if limit is None:
        rank = _limit_rank({"density": density}, deltas.shape[1])
        limit = kth_magnitudes(conflict, rank)
    stays = (conflict[0] < limit[0]) | (conflict[0] == 0)
    return np.where(stays, total, np.float32(0))
