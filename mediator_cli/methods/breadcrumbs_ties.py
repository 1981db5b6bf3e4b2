"""Drop the largest and the smallest changes, elect sign, merge."""

from __future__ import annotations

from mediator_cli.kernels.arrays import Doubles, Flags, Floats
from mediator_cli.methods._ops import Lambda, Merge, TrimRescale, elect, needs_l1, restored, two_norms
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
    presets={"mergekit": {"density": 1.0}},
)
def breadcrumbs_ties(
    deltas: Floats,
    weights: Doubles,
    *,
    density: MiddleDensity = 0.9,
    gamma: Gamma = 0.01,
    lambda_: Lambda = 1.0,
    merge: Merge = "sum",
    over: MiddleOver = "tensor",
    keep: MiddleKeep = "exact",
    rescale: TrimRescale = "none",
    lower: Floats | None = None,
    upper: Floats | None = None,
    middle: Flags | None = None,
    l1: Doubles | None = None,
) -> Floats:
    """Drop each expert's largest and smallest changes, elect signs, sum what agrees with them.

    `breadcrumbs` with the last two steps of `ties`, as mergekit has it; a tie of signs counts as plus.

    Apt when experts have extreme changes and also disagree in sign.

    Not apt when there is one expert: there are no signs to elect then.

    Elsewhere: there is no paper of the combination; defaults are mergekit's but for the density, of which it keeps all.

    >>> import numpy as np
    >>> deltas = np.array([[9, 3, -2, 1], [1, -2, -3, 9]], np.float32)
    >>> breadcrumbs_ties(deltas, np.ones(2), density=0.5, gamma=0.25).tolist()
    [0.0, 3.0, -5.0, 0.0]
    """
    choices = {"density": density, "gamma": gamma, "over": over, "keep": keep}
    kept = restored(deltas, keep_middle(deltas, choices, lower, upper, middle), rescale, l1)
    return elect(kept, None, weights, weights, merge=merge, factor=lambda_)
