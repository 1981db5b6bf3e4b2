"""What the compressed folder will hold, and how large it is, from headers alone."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from mediator_cli.checkpoint.layout import natural_key
from mediator_cli.checkpoint.moe_layout import PROJECTIONS
from mediator_cli.checkpoint.write import NewTensor, plan_shards, shard_name

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from mediator_cli.checkpoint.header import TensorInfo
    from mediator_cli.checkpoint.moe_layout import MoeLayout
    from mediator_cli.checkpoint.source import Checkpoint


@dataclass(frozen=True)
class Size:
    """Experts of a layer and how many of them a token gets; bytes of all tensors; parameters, and those of a token."""

    n_experts: int
    top_k: int
    n_bytes: int
    n_parameters: int
    n_active: int


def size_of(source: Checkpoint, layout: MoeLayout, n_experts: int) -> Size:
    """Say how large a model is with so many experts in each layer of the first experts' shapes."""
    top_k = min(layout.top_k, n_experts)
    counts, n_bytes = {"all": 0, "active": 0}, 0
    experts = set(all_experts(layout))
    for tensor in new_tensors(source.tensors, layout, n_experts):
        size = prod(tensor.shape)
        n_bytes += tensor.n_bytes
        counts["all"] += size
        counts["active"] += 0 if tensor.name in experts else size
    one = sum(source.tensors[name].size for layer in layout.layers for name in layout.experts_of(layer)[0].values())
    return Size(n_experts, top_k, n_bytes, counts["all"], counts["active"] + top_k * one)


def all_experts(layout: MoeLayout) -> Iterable[str]:
    """Name the matrices of all routed experts."""
    return (name for layer in layout.layers for names in layout.experts_of(layer) for name in names.values())


def new_tensors(tensors: Mapping[str, TensorInfo], layout: MoeLayout, n_experts: int) -> list[NewTensor]:
    """List the tensors of the model with `n_experts` a layer: all others as they are, in the order of their names."""
    form, old = layout.format, set(all_experts(layout))
    found = {info.name: NewTensor(info.name, info.dtype, info.shape) for info in tensors.values()}
    found = {name: tensor for name, tensor in found.items() if name not in old}
    for layer in layout.layers:
        gates = tensors[form.router_of(layer)]
        found[gates.name] = NewTensor(gates.name, gates.dtype, (n_experts, gates.shape[1]))
        for projection in PROJECTIONS:
            first = tensors[form.expert_of(layer, 0, projection)]
            names = (form.expert_of(layer, expert, projection) for expert in range(n_experts))
            found |= {name: NewTensor(name, first.dtype, first.shape) for name in names}
    return sorted(found.values(), key=lambda tensor: natural_key(tensor.name))


def new_shards(
    tensors: Mapping[str, TensorInfo], layout: MoeLayout, n_experts: int, shard_size: int
) -> dict[str, tuple[NewTensor, ...]]:
    """Share the tensors among files; the last one holds the gates alone, so that they can be changed cheaply."""
    gates = set(layout.routers)
    new = new_tensors(tensors, layout, n_experts)
    shards = plan_shards([tensor for tensor in new if tensor.name not in gates], shard_size, n_more=1)
    last = tuple(tensor for tensor in new if tensor.name in gates)
    return {**shards, shard_name(len(shards) + 1, len(shards) + 1): last}
