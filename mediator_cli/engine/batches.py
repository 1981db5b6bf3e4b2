"""How the work is cut: shards, one output file each, and batches, so small that their sources stay in memory.

All passes over a batch follow each other, so that what the disk gave for the first is there for the others.
Batches depend on the plan alone: whoever carries out the same plan cuts the same ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from mediator_cli.checkpoint.write import NewTensor
    from mediator_cli.plan.model import TensorPlan

_ROW_ELEMENTS = 1 << 27
"""Entries of a batch over all experts, unless a single tensor has more."""


@dataclass(frozen=True)
class Batch:
    """Some tensors of one shard, in the order in which they lie."""

    shard: int
    number: int
    tensors: tuple[TensorPlan, ...]

    @property
    def step(self) -> str:
        """Its name in the journal."""
        return f"{self.shard}.{self.number}"

    @property
    def size(self) -> int:
        """Elements of all tensors."""
        return sum(tensor.size for tensor in self.tensors)


@dataclass(frozen=True)
class Shard:
    """One dense output file, and its tensors in batches."""

    number: int
    name: str
    members: tuple[NewTensor, ...]
    batches: tuple[Batch, ...]

    @property
    def tensors(self) -> tuple[TensorPlan, ...]:
        """All tensors, in the order in which they lie."""
        return tuple(tensor for batch in self.batches for tensor in batch.tensors)


def cut_shards(
    files: Mapping[str, Sequence[NewTensor]], tensors: Mapping[str, TensorPlan], n_experts: int
) -> tuple[Shard, ...]:
    """Cut each planned file into batches."""
    shards = []
    for number, (name, members) in enumerate(files.items()):
        groups = _grouped([tensors[member.name] for member in members], _ROW_ELEMENTS // max(1, n_experts))
        batches = tuple(Batch(number, at, tuple(group)) for at, group in enumerate(groups))
        shards.append(Shard(number, name, tuple(members), batches))
    return tuple(shards)


def _grouped(tensors: Sequence[TensorPlan], most: int) -> Iterator[list[TensorPlan]]:
    group: list[TensorPlan] = []
    for tensor in tensors:
        if group and sum(member.size for member in group) + tensor.size > most:
            yield group
            group = []
        group.append(tensor)
    if group:
        yield group
