"""Weigh the experts by the energy of their changes where they differ most, elect sign, merge."""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from mediator_cli.kernels.arrays import Doubles, Floats
from mediator_cli.methods._kernels import dot, variances
from mediator_cli.methods._ops import elect, floats, keep_marked, kth_magnitudes
from mediator_cli.methods.registry import merge_method
from mediator_cli.methods.statistics import Params, Select, Slab, Sum, always, over_tensor


def _spread(deltas: Floats) -> Floats:
    """Variance of the experts' changes at each entry; float32 [1, m]."""
    spread = np.empty((1, deltas.shape[1]), np.float32)
    variances(floats(deltas), spread[0])
    return spread


def _spread_of(slab: Slab) -> Floats:
    return _spread(slab.inputs)


def _varied(slab: Slab) -> Doubles:
    return np.array([_count_varied(_spread(slab.inputs))], np.float64)


def _count_varied(spread: Floats) -> int:
    return int(np.count_nonzero(spread > 0))


def _selected_count(params: Params, n: int) -> int:
    return int(n * params["select_topk"])


def _selects(params: Params) -> bool:
    return bool(params["select_topk"] < 1)


def _selected(deltas: Floats, threshold: Floats | None) -> Floats:
    """Set entries of less variance than the threshold [1] to zero."""
    return deltas if threshold is None else keep_marked(deltas, _spread(deltas) >= threshold[0])


def _energy(slab: Slab) -> Doubles:
    return _energy_of(_selected(slab.inputs, slab.statistics.get("threshold")))


def _energy_of(deltas: Floats) -> Doubles:
    """Sum the squares of each row, and count the entries; float64 [n + 1]."""
    rows = floats(deltas)
    return np.array([*(dot(row, row) for row in rows), rows.shape[1]], np.float64)


def _shares(energy: Doubles, floor: float) -> Doubles:
    """Weigh the experts by their mean energy; equally where it is zero or less than `floor`."""
    total = energy[:-1].sum()
    if total == 0 or total / energy[-1] < floor:
        return np.full(len(energy) - 1, 1 / (len(energy) - 1))
    shares: Doubles = energy[:-1] / total
    return shares


@merge_method(
    space="delta",
    reference="https://arxiv.org/abs/2408.07990",
    statistics=(
        Sum("varied", _varied, over_tensor, _selects),
        Select("threshold", _selected_count, over_tensor, _selects, of=_spread_of, among="varied", joint=True),
        Sum("energy", _energy, over_tensor, always, lambda n: (n + 1,)),
    ),
    presets={"mergekit": {"select_topk": 1.0, "floor": 1e-6}, "fusechat": {"merged": "all"}},
    n_inputs=(2, None),
    uses_weights=False,
)
def sce(
    deltas: Floats,
    weights: Doubles,
    *,
    select_topk: Annotated[
        float, Field(gt=0, le=1, description="Share of the entries in which experts differ that is selected.")
    ] = 0.1,
    merged: Annotated[
        Literal["selected", "all"],
        Field(description="Merge the selected entries only, or all: then they decide on weights alone (FuseChat)."),
    ] = "selected",
    floor: Annotated[
        float,
        Field(
            ge=0,
            allow_inf_nan=False,
            description="Least energy of all experts with which they weigh unequally; least weight to divide by.",
        ),
    ] = 0.0,
    varied: Doubles | None = None,
    threshold: Floats | None = None,
    energy: Doubles | None = None,
) -> Floats:
    """Select entries, calculate weights from their energy, erase what disagrees, average the rest.

    Selected are the entries of each tensor in which the experts' changes have the largest variance; ηₜ = the mean
    of τₜ² over them, divided by the sum over experts; γ = sign(Σ τₜ), plus for zero. The result is the mean of those
    τₜ whose sign is γ, weighed by ηₜ; weights of the recipe have no say.

    Apt when experts differ much in how far they moved, and those that moved far should lead.

    Not apt when an expert with small changes must be kept: it weighs next to nothing.

    Elsewhere: the default share is that of FuseChat, whose own code merges unselected entries too (preset `fusechat`).
    mergekit selects all by default and weighs equally where energies are below 1e-6 (preset `mergekit`).

    >>> sce(np.array([[3, 2, -1], [1, -2, -3]], np.float32), np.ones(2), select_topk=1.0).tolist()
    [2.0, 2.0, -2.0]
    """
    if threshold is None and select_topk < 1:
        spread = _spread(deltas)
        k = _selected_count({"select_topk": select_topk}, _count_varied(spread))
        threshold = kth_magnitudes(spread, k)
    selected = _selected(deltas, threshold)
    shares = _shares(_energy_of(selected) if energy is None else energy, floor)
    chosen = selected if merged == "selected" else deltas
    return elect(chosen, None, np.ones(len(deltas)), shares, floor=floor)
