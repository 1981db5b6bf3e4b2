"""What ranks of magnitudes decide: which middle part stays (breadcrumbs), and how likely an entry stays (DELLA)."""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from mediator_cli.errors import Problem
from mediator_cli.kernels.arrays import Doubles, Flags, Floats
from mediator_cli.methods import _kernels
from mediator_cli.methods._ops import floats, keep_marked, kth_magnitudes, norms_of
from mediator_cli.methods.statistics import Params, Slab

MiddleDensity = Annotated[float, Field(gt=0, le=1, description="Share of entries that stay.")]
Gamma = Annotated[float, Field(ge=0, lt=1, description="Share of the largest entries to drop.")]
MiddleOver = Annotated[Literal["row", "tensor"], Field(description="Rank magnitudes per row, or per tensor.")]
MiddleKeep = Annotated[
    Literal["paper", "first", "exact", "dropped"],
    Field(
        description="paper: drop int(n·gamma) of n, keep the int(n·density) largest left. first: keep, then drop of "
        "those. exact: as paper, drop fewer where too few would stay. dropped: count the small entries dropped instead."
    ),
]
Epsilon = Annotated[
    float, Field(ge=0, lt=0.5, description="Chances go from density-epsilon, smallest, to density+epsilon, largest.")
]


def middle_ranks(params: Params, n: int) -> tuple[int, int]:
    """Give the ranks, 1 for the largest of n, of the smallest and the largest entry that stay.

    (0, _) when none stays, (_, 0) when none of the largest is dropped; both ends are as `kth_magnitudes` counts.
    """
    density, gamma = float(params["density"]), float(params["gamma"])
    top, kept = int(n * gamma), int(n * density)
    if params["keep"] == "first":
        kept -= top
    elif params["keep"] == "exact":
        top = min(top, n - kept)
    elif params["keep"] == "dropped":
        # Rounded, so that a share such as 1 - 0.75 - 0.15 counts as the 0.1 that it stands for.
        small, all_dropped = int(n * round(1 - density - gamma, 12)), int(n * (1 - density))
        top, kept = all_dropped - small, n - all_dropped + 1
    # A rank of n stands for no limit, so the largest that stays cannot be the smallest of all.
    top = max(0, min(top, n - 2))
    return (top + kept if kept > 0 else 0), (top + 1 if top else 0)


def lower_rank(params: Params, n: int) -> int:
    """Give the rank of the smallest entry that stays."""
    return middle_ranks(params, n)[0]


def upper_rank(params: Params, n: int) -> int:
    """Give the rank of the largest entry that stays, 0 when none is dropped above."""
    return middle_ranks(params, n)[1]


def is_over_rows(params: Params) -> bool:
    """Whether magnitudes are ranked within rows."""
    return bool(params["over"] == "row")


def is_over_tensor(params: Params) -> bool:
    """Whether magnitudes are ranked within tensors."""
    return bool(params["over"] == "tensor")


def middle_l1(slab: Slab) -> Doubles:
    """Sum |delta| and what stays of it, of one block; float64 [2, n]."""
    found = (slab.statistics.get(name) for name in ("lower", "upper", "middle"))
    return norms_of(slab.inputs, keep_middle(slab.inputs, slab.params, *found))


def middle_of_rows(rows: Floats, params: Params) -> Flags:
    """Mark the entries of rows [n, rows, length] that stay; those equal to a limit of their row all do."""
    sizes = np.abs(rows)
    ordered = np.sort(sizes, axis=-1)
    lower, upper = (_limits(ordered, rank) for rank in middle_ranks(params, rows.shape[-1]))
    inside: Flags = (sizes >= lower) & (sizes <= upper)
    return inside


def _limits(ordered: Floats, rank: int) -> Floats | float:
    """Give the magnitude of a rank in each row, ascending; see `kth_magnitudes`."""
    if 0 < rank < ordered.shape[-1]:
        return ordered[..., -rank, None]
    return np.inf if rank <= 0 else 0.0


def keep_middle(
    deltas: Floats, params: Params, lower: Floats | None, upper: Floats | None, middle: Flags | None
) -> Floats:
    """Drop the largest and the smallest entries of deltas [n, m]; those equal to a limit [n] all stay.

    Limits that are not given are found here, as if the deltas were a whole tensor of one row.
    """
    if is_over_rows(params):
        return keep_marked(deltas, middle_of_rows(deltas[:, None], params)[:, 0] if middle is None else middle)
    ranks = middle_ranks(params, deltas.shape[1])
    lower, upper = (
        kth_magnitudes(deltas, rank) if limit is None else limit
        for limit, rank in zip((lower, upper), ranks, strict=True)
    )
    kept = np.empty(deltas.shape, np.float32)
    _kernels.keep_between(floats(deltas), floats(lower), floats(upper), kept)
    return kept


def rank_chances(rows: Floats, params: Params) -> Floats:
    """Give each entry of rows [n, rows, length] its chance to stay, which grows with its magnitude's rank in its row.

    density - ε for the smallest to density + ε for the largest in equal steps; equal magnitudes rank by position. An
    entry alone in its row has the chance `density`.
    """
    density, epsilon, length = params["density"], params["epsilon"], rows.shape[-1]
    if density >= 1:
        return np.ones(rows.shape, np.float32)
    steps = np.linspace(density - epsilon, density + epsilon, length) if length > 1 else np.full(length, density)
    chances = np.empty(rows.shape, np.float32)
    for expert, found in zip(rows, chances, strict=True):
        keys = np.empty(expert.shape, np.uint64)
        _kernels.pack_ranks(floats(expert), keys)
        # Keys are all different, so any way of sorting gives the same.
        keys.sort(axis=-1)
        _kernels.spread_ranks(keys, floats(steps), found)
    return chances


def drops_some(params: Params) -> bool:
    """Whether any entry can be dropped."""
    return bool(params["density"] < 1)


def check_chances(params: Params) -> Problem | None:
    """Refuse chances that are no chances."""
    density, epsilon = params["density"], params["epsilon"]
    if density >= 1 or (density - epsilon > 0 and density + epsilon < 1):
        return None
    message = f"density ± epsilon = {density} ± {epsilon} leaves (0, 1)"
    return Problem("epsilon", message, "choose a smaller epsilon, or density 1 to drop nothing")


def ranked_chances(deltas: Floats, density: float, epsilon: float, chances: Floats | None) -> Floats | float:
    """Give the chances [n, m] of deltas, found here as if each were one row unless given; 1 where none can drop."""
    if density >= 1:
        return 1.0
    return rank_chances(deltas[:, None], {"density": density, "epsilon": epsilon})[:, 0] if chances is None else chances
