"""Drop and rescale, then trim, elect sign, merge."""

from __future__ import annotations

import torch

from mediator_cli.methods._ops import (
    Keep,
    KeepChance,
    Lambda,
    Merge,
    Rescale,
    TrimDensity,
    TrimOver,
    ZeroSign,
    breaks_ties_by_majority,
    drop_and_rescale,
    dropped,
    elect_and_merge,
    kth_magnitudes,
    l1_block,
    majority_block,
    needs_l1,
    trim_count,
    trim_entries,
    trims_over,
)
from mediator_cli.methods.registry import Select, Slab, Sum, always, merge_method, over_tensor


def _majority(slab: Slab) -> torch.Tensor:
    return majority_block(trim_entries(dropped(slab), slab.statistics["thresholds"]), slab.weights)


@merge_method(
    space="delta",
    reference="https://arxiv.org/abs/2311.03099",
    statistics=(
        Sum("l1", l1_block, over_tensor, needs_l1),
        Select("thresholds", trim_count, trims_over, always, of=dropped),
        Sum("majority", _majority, trims_over, breaks_ties_by_majority),
    ),
    presets={
        "mergekit": {
            "density": 1.0, "rescale": "l1", "trim_density": 1.0, "trim": "tensor", "merge": "sum",
            "zero_sign": "positive",
        },
    },
    random=True,
)  # fmt: skip
def dare_ties(
    deltas: torch.Tensor,
    weights: torch.Tensor,
    *,
    density: KeepChance = 0.8,
    rescale: Rescale = "expected",
    trim_density: TrimDensity = 0.2,
    lambda_: Lambda = 1.0,
    merge: Merge = "mean",
    trim: TrimOver = "model",
    keep: Keep = "paper",
    zero_sign: ZeroSign = "majority",
    uniforms: torch.Tensor,
    l1: torch.Tensor | None = None,
    thresholds: torch.Tensor | None = None,
    majority: torch.Tensor | None = None,
) -> torch.Tensor:
    """Drop entries at random and rescale, then merge by TIES.

    The authors drop at random and then trim by magnitude; mergekit does not trim (preset `mergekit`). Apt for the
    same cases as `ties`, when deltas are redundant enough to lose entries.

    >>> keep_all = torch.zeros(2, 3)
    >>> deltas = torch.tensor([[4.0, 1.0, -2.0], [2.0, -3.0, 1.0]])
    >>> dare_ties(deltas, torch.ones(2), density=1.0, trim_density=0.4, uniforms=keep_all)
    tensor([ 3., -3., -2.])
    """
    kept = drop_and_rescale(deltas, uniforms, density, rescale, l1)
    if thresholds is None:
        thresholds = kth_magnitudes(kept, trim_count({"density": trim_density, "keep": keep}, deltas.shape[1]))
    trimmed = trim_entries(kept, thresholds)
    return elect_and_merge(trimmed, weights, majority, merge, zero_sign) * lambda_
