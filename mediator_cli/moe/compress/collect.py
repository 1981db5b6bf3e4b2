"""The calibration passes: layer by layer through a model, so that memory holds one layer and the tokens' states."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from mediator_cli.moe.compress.align import by_activations
from mediator_cli.moe.compress.decide import decide, new_gates
from mediator_cli.moe.compress.matrices import Matrices, weighted_mean
from mediator_cli.moe.compress.statistics import Experts, measure_layer
from mediator_cli.moe.layerwise import experts_of, router_of, router_states, start, walk

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from mediator_cli.kernels.arrays import Counts, Doubles, Floats
    from mediator_cli.moe.compress.groups import Group
    from mediator_cli.moe.compress.job import Job
    from mediator_cli.moe.compress.statistics import LayerStatistics
    from mediator_cli.moe.layerwise import Batch, LayerwiseModel

    Advance = Callable[[int], None]
    Prompts = Sequence[Sequence[int]]

_ALIGNED_TOKENS = 32768
"""Tokens whose activations tell which inner neurons belong together, at most, as published."""


@dataclass(frozen=True)
class Found:
    """What a pass came to: statistics by layer, and, where it was sequential, the groups that it went on with."""

    statistics: dict[int, LayerStatistics]
    groups: dict[int, tuple[Group, ...]]


def collect(model: LayerwiseModel, prompts: Prompts, advanced: Advance, *, every_token: bool) -> Found:
    """Measure all layers on the model as it is; `advanced` is told of each layer that is done."""
    statistics = {}
    for number, layer, batches in _layers(model, prompts, advanced):
        experts = read_experts(model, layer)
        if experts is not None:
            states = _states(layer, number, batches)
            statistics[number] = measure_layer(_place(model, number), experts, states, every_token=every_token)
    return Found(statistics, {})


def collect_in_sequence(model: LayerwiseModel, prompts: Prompts, advanced: Advance, job: Job) -> Found:
    """Measure each layer on what the layers before it give after they were compressed, and group its experts."""
    statistics, groups = {}, {}
    for number, layer, batches in _layers(model, prompts, advanced):
        experts = read_experts(model, layer)
        if experts is None:
            continue
        states = list(_states(layer, number, batches))
        statistics[number] = measure_layer(_place(model, number), experts, states, every_token=job.every_token)
        decided = decide(job, statistics[number])
        if job.align:
            decided = tuple(_aligned(experts, group, states, job.seed) for group in decided)
        groups[number] = decided
        _compress(layer, experts, decided, job, _stored_dtypes(model, number))
    return Found(statistics, groups)


def read_experts(model: LayerwiseModel, layer: torch.nn.Module) -> Experts | None:
    """Give the routed experts of a layer that was read; None where it is dense."""
    router, module = router_of(layer), experts_of(layer)
    if router is None or module is None or model.layout is None:
        return None
    renormalised = True if model.layout.format.name == "mixtral" else bool(cast("Any", router).norm_topk_prob)
    inner, gates = cast("Any", module), cast("torch.Tensor", router.weight)
    return Experts(gates, inner.gate_up_proj, inner.down_proj, inner.act_fn, model.layout.top_k, renormalised)


def _layers(
    model: LayerwiseModel, prompts: Prompts, advanced: Advance
) -> Iterator[tuple[int, torch.nn.Module, list[Batch]]]:
    """Read one layer after the other; behind each the batches go through it as it is then."""
    batches = start(model, prompts)
    for number, layer in walk(model, batches):
        yield number, layer, batches
        advanced(1)


def _states(layer: torch.nn.Module, number: int, batches: Sequence[Batch]) -> Iterator[torch.Tensor]:
    return (router_states(layer, number, batch) for batch in batches)


def _place(model: LayerwiseModel, number: int) -> str:
    return f"{model.folder}: layer {number}"


@torch.no_grad()
def _aligned(experts: Experts, group: Group, states: Sequence[torch.Tensor], seed: int) -> Group:
    """Find the order of each member's inner neurons by what they say on the first tokens."""
    reference = matrices_of(experts, group.centre)
    chosen = torch.cat(list(states))[:_ALIGNED_TOKENS]
    orders: list[Counts | None] = [None]
    for member in group.members[1:]:
        cosines = _activation_cosines(experts, group.centre, member, chosen)
        orders.append(by_activations(cosines, reference, matrices_of(experts, member), seed))
    return replace(group, orders=tuple(orders))


def _activation_cosines(experts: Experts, left: int, right: int, states: torch.Tensor) -> Doubles:
    """Take the cosines of the inner neurons' activations over tokens [inner, inner]; 0 for a neuron that is silent."""
    inner = experts.down.shape[2]
    products = torch.zeros(inner, inner, dtype=torch.float64)
    squares = torch.zeros(2, inner, dtype=torch.float64)
    for part in states.split(1024):
        said = [experts.inner(expert, part).float() for expert in (left, right)]
        products += (said[0].T @ said[1]).double()
        squares += torch.stack([each.square().sum(dim=0, dtype=torch.float64) for each in said])
    lengths = squares.sqrt()
    lengths[lengths == 0] = 1.0
    found: Doubles = (products / lengths[0][:, None] / lengths[1][None, :]).clamp(-1, 1).numpy()
    return found


def matrices_of(experts: Experts, expert: int) -> Matrices:
    """Give the matrices of one expert in float32."""
    gate, up = experts.gate_up[expert].float().chunk(2)
    return Matrices(gate.numpy(), up.numpy(), experts.down[expert].float().T.numpy())


@torch.no_grad()
def _compress(
    layer: torch.nn.Module, experts: Experts, groups: Sequence[Group], job: Job, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    """Put the compressed experts, rounded as they will be stored, in the place of the old ones."""
    router, module = cast("Any", router_of(layer)), cast("Any", experts_of(layer))
    merged = [_merged(experts, group) for group in groups]
    gates = torch.from_numpy(new_gates(job, tuple(groups), experts.gates.float().numpy())).to(dtypes[0])
    router.weight = _frozen(gates, experts.gates)
    module.gate_up_proj = _frozen(torch.stack([each[0] for each in merged]).to(dtypes[1]), experts.gates)
    module.down_proj = _frozen(torch.stack([each[1] for each in merged]).to(dtypes[1]), experts.gates)
    router.num_experts = module.num_experts = len(groups)
    router.top_k = min(router.top_k, len(groups))


def _frozen(values: torch.Tensor, like: torch.Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(values.to(like.dtype), requires_grad=False)


def _merged(experts: Experts, group: Group) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge the members of a group; gate and up [2 × inner, hidden], down [hidden, inner]."""
    members = [matrices_of(experts, member) for member in group.members]
    orders = group.orders or (None,) * len(members)
    gate = weighted_mean([each.gate for each in members], group.weights, orders, "gate_proj")
    up = weighted_mean([each.up for each in members], group.weights, orders, "up_proj")
    down = weighted_mean([_down(each) for each in members], group.weights, orders, "down_proj")
    return torch.from_numpy(np.concatenate([gate, up]).astype(np.float32)), torch.from_numpy(down.astype(np.float32))


def _down(matrices: Matrices) -> Floats:
    down: Floats = matrices.down_t.T
    return down


def _stored_dtypes(model: LayerwiseModel, number: int) -> tuple[torch.dtype, torch.dtype]:
    """Give the dtypes that gates and experts of a layer are stored in."""
    layout = cast("Any", model.layout)
    names = (layout.format.router_of(number), layout.format.expert_of(number, 0, "gate_proj"))
    known = {"BF16": torch.bfloat16, "F16": torch.float16}
    gates, experts = (known.get(model.tensors[name].dtype, torch.float32) for name in names)
    return gates, experts
