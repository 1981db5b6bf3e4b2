"""A Mixture of Experts in numbers, before it is made: layers, parameters, bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

from mediator_cli.pipeline.cost import conflict_share, source_bytes
from mediator_cli.pipeline.moe import parameters
from mediator_cli.pipeline.settings import dense_bytes
from mediator_cli.plan.moe.check import block_unit
from mediator_cli.plan.moe.make import as_moe

if TYPE_CHECKING:
    from mediator_cli.plan.model import Plan
    from mediator_cli.plan.moe_plan import MoePlan

Ends = tuple[int, int]
"""From the least to the most that the rule can choose."""


class MoeReport(BaseModel):
    """What will be written: pairs from the least to the most that the rule can choose; `active` are a token's.

    `conflict_bytes` are read to choose the layers.
    """

    model_config = ConfigDict(frozen=True)

    format: str
    experts: tuple[str, ...]
    experts_per_token: int
    inner: int
    shared_from: str
    gates: str
    rule: str
    layers: Ends
    parameters: Ends
    active: Ends
    bytes: Ends
    conflict_bytes: int


def widest_moe(plan: Plan) -> Plan:
    """Give the MoE with experts in all layers that the rule can choose."""
    layers = _moe_of(plan).layers
    return as_moe(plan, range(_layer_range(plan)[1]) if layers is None else layers)


def describe_moe(plan: Plan) -> MoeReport:
    """Put a plan of kind moe, whose layers may still depend on conflict, in numbers."""
    moe = _moe_of(plan)
    ends = (as_moe(plan, range(max(1, _layer_range(plan)[0]))), widest_moe(plan))
    ends = ends if moe.layers is None else (ends[1], ends[1])
    (least, least_active), (most, most_active) = (parameters(each) for each in ends)
    is_measured = moe.layers is None
    return MoeReport(
        format=moe.format.name,
        experts=moe.experts,
        experts_per_token=moe.top_k,
        inner=moe.inner,
        shared_from=moe.spec.shared_from,
        gates=moe.gates.method,
        rule=plan.loaded.recipe.assign.rule,
        layers=(max(1, _layer_range(plan)[0]), _layer_range(plan)[1]),
        parameters=(least, most),
        active=(least_active, most_active),
        bytes=(dense_bytes(ends[0]), dense_bytes(ends[1])),
        conflict_bytes=round(conflict_share(plan) * sum(source_bytes(plan).values())) if is_measured else 0,
    )


def _moe_of(plan: Plan) -> MoePlan:
    if plan.moe is None:
        raise RuntimeError("the plan makes no MoE")
    return plan.moe


def _layer_range(plan: Plan) -> Ends:
    """Bound the layers that get experts."""
    moe, spec = _moe_of(plan), plan.loaded.recipe.assign
    if moe.layers is not None:
        return len(moe.layers), len(moe.layers)
    able = sum(block_unit(layer, plan.loaded.recipe) in plan.candidates for layer in range(len(plan.layers)))
    # With blocks as units, some of the k may be attention.
    if spec.rule == "top_k" and plan.loaded.recipe.conflict.unit == "layer":
        return min(spec.k or 0, able), min(spec.k or 0, able)
    return 0, min(spec.k or able, able) if spec.rule == "top_k" else able
