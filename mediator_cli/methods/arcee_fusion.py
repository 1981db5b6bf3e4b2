"""Keep the changes that matter most, by size and by how far their rows' distributions moved."""

from __future__ import annotations

import numpy as np

from mediator_cli.kernels.arrays import Doubles, Floats
from mediator_cli.methods._kernels_averages import divergences
from mediator_cli.methods._ops import floats, keep_marked, kth_magnitudes
from mediator_cli.methods.registry import merge_method
from mediator_cli.methods.statistics import Params, PerRow, Select, Slab, always, over_tensor

_EPSILON = 1e-8
"""Added to probabilities before their logarithms."""


def _importances(rows: Floats, params: Params, base: Floats | None = None) -> Floats:
    """Multiply the sizes of changes [1, rows, length] by the divergence of their rows from the base's."""
    near = np.zeros(rows.shape[1:], np.float32) if base is None else floats(base)
    found = np.empty(rows.shape[1], np.float64)
    divergences(floats(near + rows[0]), near, _EPSILON, found)
    importances: Floats = (np.abs(rows.astype(np.float64)) * found[:, None]).astype(np.float32)
    return importances


def _importances_of(slab: Slab) -> Floats:
    found: Floats = slab.statistics["importances"]
    return found


def _rank(share: float, n: int) -> int:
    """Give the rank, 1 for the largest of n, of the entry that stands at a share of the way from the smallest."""
    return n - int(share * (n - 1))


def _rank_of_median(params: Params, n: int) -> int:
    return _rank(0.5, n)


def _rank_of_first(params: Params, n: int) -> int:
    return _rank(0.25, n)


def _rank_of_third(params: Params, n: int) -> int:
    return _rank(0.75, n)


_RANKS = {"median": _rank_of_median, "first_quartile": _rank_of_first, "third_quartile": _rank_of_third}


@merge_method(
    space="delta",
    reference="https://github.com/arcee-ai/mergekit/blob/main/docs/merge_methods.md",
    rows=(PerRow("importances", _importances, always),),
    statistics=tuple(
        Select(name, rank, over_tensor, always, of=_importances_of, smallest=True) for name, rank in _RANKS.items()
    ),
    n_inputs=(1, 1),
    needs_base=True,
    uses_weights=False,
)
def arcee_fusion(
    deltas: Floats,
    weights: Doubles,
    *,
    base: Floats | None = None,
    importances: Floats | None = None,
    median: Floats | None = None,
    first_quartile: Floats | None = None,
    third_quartile: Floats | None = None,
) -> Floats:
    """Keep the expert's changes whose importance stands out in its tensor, and drop the others.

    The importance of an entry is |τ| · KL(softmax(row of W₁) ‖ softmax(row of W₀)), a row along the last axis, with
    1e-8 added to probabilities. Entries stay whose importance reaches median + 1.5 · (third - first quartile) of their
    tensor; quartiles are entries themselves, at int(share·(n - 1)) of n in rising order. Where three
    entries in four did not change, the threshold is 0 and all changes stay; so they do in rows of one entry. Called
    without a base, that is all zeros.

    Apt when an expert shall be fused into a base that must stay what it is: about one entry in ten changes.

    Not apt when the skill lies in many small changes.

    Elsewhere: mergekit ranks a random million of larger tensors, so that its thresholds vary; here they are exact.

    >>> arcee_fusion(np.array([[0, 1, 1, 1, 1, 1, 9, 0]], np.float32), np.ones(1)).tolist()
    [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 9.0, 0.0]
    """
    if importances is None:
        beside = None if base is None else base[None]
        importances = _importances(deltas[:, None], {}, beside)[:, 0]
    given = (median, first_quartile, third_quartile)
    middle, first, third = (
        float(kth_magnitudes(importances, rank({}, deltas.shape[1]), smallest=True)[0] if limit is None else limit[0])
        for rank, limit in zip(_RANKS.values(), given, strict=True)
    )
    kept: Floats = keep_marked(deltas, importances >= np.float32(middle + 1.5 * (third - first)))[0]
    return kept
