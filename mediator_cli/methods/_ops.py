"""Steps that several methods share. Sums run in recipe order, in float32, without fused multiply-add."""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from mediator_cli.kernels.arrays import Doubles, Flags, Floats
from mediator_cli.methods import _kernels
from mediator_cli.methods.statistics import Over, Params, Slab

Lambda = Annotated[float, Field(allow_inf_nan=False, description="Factor on the merged delta.")]
Normalize = Annotated[bool, Field(description="Divide by the sum of the weights.")]
KeepChance = Annotated[float, Field(gt=0, le=1, description="Chance of each entry to stay.")]
TrimDensity = Annotated[float, Field(gt=0, le=1, description="Share of entries that trimming keeps.")]
TrimOver = Annotated[
    Over,
    Field(
        description="Rank magnitudes per tensor, or over the model: all tensors that this method merges with the same "
        "choices; numbers and weights may differ."
    ),
]
Keep = Annotated[
    Literal["paper", "exact", "dropped"],
    Field(description="Entries kept of n: int(n·d)+1, max(1, int(n·d)), or n-int(n·(1-d))+1."),
]
Merge = Annotated[Literal["mean", "sum", "max"], Field(description="How agreeing entries are merged.")]
ZeroSign = Annotated[
    Literal["majority", "positive"], Field(description="Sign of an exact tie: the majority's, or plus.")
]
Rescale = Annotated[
    Literal["expected", "l1", "none"],
    Field(description="expected: divide by density. l1: restore the L1 norm (mergekit). none."),
]
TrimRescale = Annotated[
    Literal["l1", "none"], Field(description="l1: restore each tensor's L1 norm after trimming (mergekit). none.")
]
_MERGES = {"mean": _kernels.MEAN, "sum": _kernels.SUM, "max": _kernels.MAX}


def floats(values: NDArray[np.generic] | list[float]) -> Floats:
    """Give values as float32 that lie one after the other, without a copy where they are."""
    return np.ascontiguousarray(values, np.float32)


def weighted_sum(tensors: Floats, weights: Doubles | list[float], divisor: float = 1.0, factor: float = 1.0) -> Floats:
    """Sum weights [n] · tensors [n, m] in recipe order, divide, multiply by a factor; float32 [m]."""
    merged = np.empty(tensors.shape[1], np.float32)
    _kernels.weighted_sum(floats(tensors), floats(weights), np.float32(divisor), np.float32(factor), merged)
    return merged


def total_weight(weights: Doubles) -> float:
    """Sum the weights [n] in float64 in recipe order."""
    return float(sum(weights.tolist()))


def kth_magnitudes(tensors: Floats, k: int, smallest: bool = False) -> Floats:
    """Find the k-th largest magnitude in each row [n, m]; inf for k = 0, 0 when k reaches the row's length.

    If `smallest`, a k that reaches it gives the smallest magnitude, and only one beyond 0.
    """
    n, size = tensors.shape
    if k <= 0 or k >= size + smallest:
        return np.full(n, np.inf if k <= 0 else 0, np.float32)
    return np.partition(np.abs(tensors), size - k, axis=1)[:, size - k]


def trim_count(params: Params, n: int) -> int:
    """Count the entries that trimming keeps of n.

    Official TIES keeps int(n·density) + 1 (`paper`), mergekit max(1, int(n·density)) (`exact`), MergeLM and MergeLLM
    round the number of dropped entries instead (`dropped`).
    """
    density = float(params.get("trim_density", params["density"]))
    if density >= 1:
        return n
    kept = {
        "paper": int(n * density) + 1,
        "exact": max(1, int(n * density)),
        "dropped": n - int(n * (1 - density)) + 1,
    }
    return min(n, kept[params["keep"]])


def trims_over(params: Params) -> Over:
    """Say over what the magnitudes are ranked."""
    over: Over = params["trim"]
    return over


def breaks_ties_by_majority(params: Params) -> bool:
    """Whether an exact tie of signs takes the majority's sign."""
    return bool(params["zero_sign"] == "majority")


def elect(
    deltas: Floats,
    thresholds: Floats | None,
    votes: Doubles | Floats,
    weights: Doubles | Floats,
    *,
    tie: float = 1.0,
    merge: Merge = "mean",
    floor: float = -np.inf,
    factor: float = 1.0,
) -> Floats:
    """Merge only the entries of deltas [n, m] whose sign is the elected one (TIES, "disjoint merge"); float32 [m].

    Entries below their row's threshold [n] count as zero; those equal to it all stay. The sign of an entry is that of
    Σ votes [n] · delta, `tie` where that is zero. Entries weigh `weights` [n]: mean divides by the weights of those
    who agree, by `floor` at least; sum does not; max takes the largest magnitude.
    """
    merged = np.empty(deltas.shape[1], np.float32)
    limits = np.zeros(len(deltas), np.float32) if thresholds is None else floats(thresholds)
    numbers = np.float32(tie), _MERGES[merge], np.float32(floor), np.float32(factor)
    _kernels.elect(floats(deltas), limits, floats(votes), floats(weights), *numbers, merged)
    return merged


def elect_by_majority(
    deltas: Floats,
    thresholds: Floats,
    weights: Doubles,
    majority: Doubles | None,
    merge: Merge,
    zero_sign: ZeroSign,
    factor: float,
) -> Floats:
    """Trim deltas [n, m], elect signs and merge as TIES does; `majority` [1] is counted here where it is not given."""
    if majority is None and zero_sign == "majority":
        majority = majority_block(deltas, thresholds, weights)
    tie = 1.0 if majority is None else float(np.sign(majority[0]))
    return elect(deltas, thresholds, weights, weights, tie=tie, merge=merge, factor=factor)


def majority_block(deltas: Floats, thresholds: Floats, weights: Doubles) -> Doubles:
    """Count elected signs, plus minus minus, of deltas [n, m] trimmed at thresholds [n]; float64 [1]."""
    return np.array([_kernels.count_signs(floats(deltas), floats(thresholds), floats(weights))], np.float64)


def drop(deltas: Floats, uniforms: Floats, chances: float | Floats) -> Floats:
    """Keep each entry of deltas [n, m] by its chance, one for all or [n, m]: where its uniform number lies below it."""
    return _drop(deltas, uniforms, chances, np.ones(len(deltas), np.float32), False)


def _drop(deltas: Floats, uniforms: Floats, chances: float | Floats, factors: Floats, by_chance: bool) -> Floats:
    kept = np.empty(deltas.shape, np.float32)
    deltas, uniforms = floats(deltas), floats(uniforms)
    if isinstance(chances, np.ndarray):
        _kernels.drop_each(deltas, uniforms, floats(chances), factors, by_chance, kept)
    else:
        factors = factors / np.float32(chances) if by_chance else factors
        _kernels.drop(deltas, uniforms, np.float32(chances), factors, kept)
    return kept


def drop_and_rescale(
    deltas: Floats, uniforms: Floats, chances: float | Floats, rescale: Rescale, l1: Doubles | None
) -> Floats:
    """Drop at random, then restore the scale: by 1/chance (DARE), by the ratio of L1 norms (mergekit), or not."""
    factors = np.ones(len(deltas), np.float32)
    if rescale == "l1":
        factors = _ratios(norms_of(deltas, drop(deltas, uniforms, chances)) if l1 is None else l1)
    return _drop(deltas, uniforms, chances, factors, rescale == "expected")


def _ratios(norms: Doubles) -> Floats:
    before, after = norms
    return floats(np.divide(before, after, out=np.ones_like(before), where=after > 0))


def restored(deltas: Floats, kept: Floats, rescale: str, l1: Doubles | None) -> Floats:
    """Scale what trimming kept of deltas [n, m] to their L1 norms [2, n], before and after, if asked for."""
    if rescale != "l1":
        return kept
    scaled: Floats = kept * _ratios(norms_of(deltas, kept) if l1 is None else l1)[:, None]
    return scaled


def trimmed(deltas: Floats, thresholds: Floats) -> Floats:
    """Set entries of deltas [n, m] below their row's threshold [n] to zero."""
    return keep_marked(deltas, np.abs(deltas) >= thresholds[:, None])


def norms_of(deltas: Floats, kept: Floats) -> Doubles:
    """Sum magnitudes of deltas [n, m] and of what is kept of them; float64 [2, n]."""
    norms = np.empty((2, len(deltas)), np.float64)
    _kernels.magnitude_sums(floats(deltas), norms[0])
    _kernels.magnitude_sums(floats(kept), norms[1])
    return norms


def keep_marked(deltas: Floats, marks: Flags) -> Floats:
    """Set entries of deltas [n, m] that are not marked to zero; marks [n, m], or [1, m] for all."""
    kept = np.empty(deltas.shape, np.float32)
    _kernels.keep_marked(floats(deltas), np.ascontiguousarray(marks), kept)
    return kept


def uniforms_of(slab: Slab) -> Floats:
    """Give the uniform numbers of a random method's slab [n, m]."""
    if slab.uniforms is None:
        raise ValueError("random methods need uniforms")
    return slab.uniforms


def chances_of(slab: Slab) -> float | Floats:
    """Give the chances to stay, of each entry [n, m] where rows decide them, else one for all."""
    chances: float | Floats = slab.statistics.get("chances", slab.params["density"])
    return chances


def l1_block(slab: Slab) -> Doubles:
    """Sum |delta| and |kept delta| of one block; float64 [2, n]."""
    return norms_of(slab.inputs, drop(slab.inputs, uniforms_of(slab), chances_of(slab)))


def two_norms(n: int) -> tuple[int, ...]:
    """Give the shape of the norms of n deltas before and after dropping."""
    return 2, n


def constant_chances(rows: Floats, params: Params) -> Floats:
    """Give all entries of rows [n, rows, length] the same chance to stay, where experts differ in it."""
    return np.full(rows.shape, params["density"], np.float32)


def only_where_own(params: Params) -> bool:
    """Say that something is needed only where experts differ in a parameter."""
    return False


def needs_l1(params: Params) -> bool:
    """Whether dropped deltas are rescaled by their L1 norm, which is as before where none is dropped."""
    return bool(params["rescale"] == "l1" and params["density"] < 1)


def dropped(slab: Slab) -> Floats:
    """Give the deltas of a slab as DARE leaves them."""
    l1 = slab.statistics.get("l1")
    return drop_and_rescale(slab.inputs, uniforms_of(slab), chances_of(slab), slab.params["rescale"], l1)
