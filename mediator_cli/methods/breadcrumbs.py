"""Drop the largest and the smallest changes, add the rest."""

from __future__ import annotations

from mediator_cli.kernels.arrays import Doubles, Flags, Floats
from mediator_cli.methods._ops import (
    Lambda,
    Normalize,
    TrimRescale,
    needs_l1,
    restored,
    total_weight,
    two_norms,
    weighted_sum,
)
from mediator_cli.methods._ranks import (
    Gamma,
    MiddleDensity,
    MiddleKeep,
    MiddleOver,
    is_over_rows,
    is_over_tensor,
    keep_middle,
    lower_rank,
    middle_l1,
    middle_of_rows,
    upper_rank,
)
from mediator_cli.methods.registry import merge_method
from mediator_cli.methods.statistics import PerRow, Select, Sum, over_tensor


@merge_method(
    space="delta",
    reference="https://arxiv.org/abs/2312.06795",
    statistics=(
        Select("lower", lower_rank, over_tensor, is_over_tensor),
        Select("upper", upper_rank, over_tensor, is_over_tensor),
        Sum("l1", middle_l1, over_tensor, needs_l1, two_norms),
    ),
    rows=(PerRow("middle", middle_of_rows, is_over_rows),),
    per_expert=("density", "gamma"),
    presets={
        "mergekit": {"density": 1.0, "gamma": 0.01, "lambda": 1.0, "over": "tensor", "keep": "exact"},
        "mergellm": {"density": 0.9, "gamma": 0.05, "lambda": 0.5, "over": "tensor", "keep": "dropped"},
    },
    normalizes=lambda params: bool(params["normalize"]),
)
def breadcrumbs(
    deltas: Floats,
    weights: Doubles,
    *,
    density: MiddleDensity = 0.2,
    gamma: Gamma = 0.1,
    lambda_: Lambda = 0.4,
    over: MiddleOver = "row",
    keep: MiddleKeep = "paper",
    normalize: Normalize = False,
    rescale: TrimRescale = "none",
    lower: Floats | None = None,
    upper: Floats | None = None,
    middle: Flags | None = None,
    l1: Doubles | None = None,
) -> Floats:
    """Drop each expert's largest changes as outliers and its smallest as noise: W₀ + λ · Σ wₜ·τ̂ₜ.

    τ̂ₜ = τₜ without the share `gamma` of largest entries, and of those left the largest share `density`. Entries that
    share a limit's magnitude all stay.

    Apt when many experts are added, whose few extreme changes would drown the others.

    Not apt when the largest changes are the skill, as after a short fine-tune that moved few entries far.

    Elsewhere: defaults follow the authors' code, which ranks within rows; mergekit and MergeLLM rank within tensors and
    count what stays otherwise (presets).

    >>> import numpy as np
    >>> breadcrumbs(np.array([[9, 3, -2, 1]], np.float32), np.ones(1), density=0.5, gamma=0.25, lambda_=2.0).tolist()
    [0.0, 6.0, -4.0, 0.0]
    """
    choices = {"density": density, "gamma": gamma, "over": over, "keep": keep}
    kept = restored(deltas, keep_middle(deltas, choices, lower, upper, middle), rescale, l1)
    return weighted_sum(kept, weights, total_weight(weights) if normalize else 1.0, lambda_)
