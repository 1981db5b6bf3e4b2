"""Steps that several methods share. Sums run in recipe order, in float32, without fused multiply-add."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch.nn.functional import hardshrink

from mediator_cli.methods.registry import Over, Params, Slab

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


def weighted_sum(tensors: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Sum weights [n] · tensors [n, m] in recipe order; float32 [m]."""
    total = tensors[0] * weights[0].float()
    for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
        total += tensor * weight.float()
    return total


def ordered_sum(tensors: torch.Tensor) -> torch.Tensor:
    """Sum tensors [n, m] in recipe order."""
    total = tensors[0].clone()
    for tensor in tensors[1:]:
        total += tensor
    return total


def total_weight(weights: torch.Tensor) -> torch.Tensor:
    """Sum the weights [n] in float64 in recipe order; one float32 number."""
    return torch.tensor(sum(weights.tolist()), dtype=torch.float32)


def kth_magnitudes(tensors: torch.Tensor, k: int) -> torch.Tensor:
    """Find the k-th largest magnitude in each row [n, m]; 0 when k reaches the row's length."""
    if k >= tensors.shape[1]:
        return torch.zeros(tensors.shape[0])
    return tensors.abs().kthvalue(tensors.shape[1] - k + 1, dim=1).values


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


def trim_entries(deltas: torch.Tensor, thresholds: torch.Tensor) -> torch.Tensor:
    """Set entries below their row's threshold to zero; entries equal to it all stay.

    hardshrink keeps what lies strictly above, so it gets the float just below; it has no branch on data as where has.
    """
    just_below = torch.nextafter(thresholds, torch.tensor(-torch.inf)).tolist()
    rows = [row if limit < 0 else hardshrink(row, limit) for row, limit in zip(deltas, just_below, strict=True)]
    return torch.stack(rows)


def elect_signs(weighted: torch.Tensor, zero_sign: torch.Tensor | float) -> torch.Tensor:
    """Elect one sign for each entry by total mass; a tie takes `zero_sign`."""
    signs = ordered_sum(weighted).sign()
    return torch.where(signs == 0, torch.as_tensor(zero_sign, dtype=signs.dtype), signs)


def agreeing_merge(weighted: torch.Tensor, weights: torch.Tensor, signs: torch.Tensor, merge: Merge) -> torch.Tensor:
    """Merge only the entries whose sign is the elected one (TIES, "disjoint merge").

    mean divides by the weights of the agreeing models, sum does not, max takes the largest magnitude.
    """
    direction = torch.where(signs > 0, 1.0, -1.0)
    # Magnitudes of the entries whose sign is the elected one; sums of magnitudes round like sums of signed values.
    agreeing = (weighted * direction).clamp(0.0, torch.inf)
    if merge == "max":
        return agreeing.amax(dim=0) * signs
    total = ordered_sum(agreeing) * direction
    if merge == "sum":
        return total
    mass = weighted_sum(agreeing.sign(), weights)
    return total / torch.where(mass == 0, 1.0, mass)


def elect_and_merge(
    trimmed: torch.Tensor, weights: torch.Tensor, majority: torch.Tensor | None, merge: Merge, zero_sign: ZeroSign
) -> torch.Tensor:
    """Elect one sign for each entry of trimmed deltas [n, m] and merge what agrees with it (TIES after trimming)."""
    if majority is None and zero_sign == "majority":
        majority = majority_block(trimmed, weights)
    weighted = scaled(trimmed, weights)
    signs = elect_signs(weighted, 1.0 if majority is None else majority.sign())
    return agreeing_merge(weighted, weights, signs, merge)


def drop(deltas: torch.Tensor, uniforms: torch.Tensor, density: float) -> torch.Tensor:
    """Keep each entry with probability `density`: where its uniform number lies below it."""
    return deltas * (uniforms < density).float()


def l1_block(slab: Slab) -> torch.Tensor:
    """Sum |delta| and |kept delta| of one block; float64 [2, n]."""
    if slab.uniforms is None:
        raise ValueError("random methods need uniforms")
    kept = drop(slab.inputs, slab.uniforms, slab.params["density"])
    return torch.stack([slab.inputs.double().abs().sum(dim=1), kept.double().abs().sum(dim=1)])


def needs_l1(params: Params) -> bool:
    """Whether dropped deltas are rescaled by their L1 norm."""
    return bool(params["rescale"] == "l1")


def drop_and_rescale(
    deltas: torch.Tensor, uniforms: torch.Tensor, density: float, rescale: Rescale, l1: torch.Tensor | None
) -> torch.Tensor:
    """Drop at random, then restore the scale: by 1/density (DARE), by the ratio of L1 norms (mergekit), or not."""
    kept = drop(deltas, uniforms, density)
    if rescale == "expected":
        return kept / density
    if rescale == "none":
        return kept
    norms = _l1(deltas, kept) if l1 is None else l1
    ratio = torch.where(norms[1] > 0, norms[0] / norms[1].clamp_min(torch.finfo(torch.float64).tiny), 1.0)
    return kept * ratio.float()[:, None]


def _l1(deltas: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    return torch.stack([deltas.double().abs().sum(dim=1), kept.double().abs().sum(dim=1)])


def dropped(slab: Slab) -> torch.Tensor:
    """Give the deltas of a slab as DARE leaves them."""
    if slab.uniforms is None:
        raise ValueError("random methods need uniforms")
    params: dict[str, Any] = dict(slab.params)
    return drop_and_rescale(slab.inputs, slab.uniforms, params["density"], params["rescale"], slab.statistics.get("l1"))


def majority_block(trimmed: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Count elected signs, plus minus minus, of trimmed deltas [n, m]; float64 [1]."""
    signs = ordered_sum(scaled(trimmed, weights)).sign()
    return signs.sum(dtype=torch.float64)[None]


def scaled(deltas: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Multiply deltas [n, m] by weights [n] in float32."""
    return deltas * weights.float()[:, None]
