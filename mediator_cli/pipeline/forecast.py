"""How long a merge will take, from a plan and what this machine was measured to need for each kind of step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from mediator_cli.checkpoint.write import plan_shards
from mediator_cli.engine.batches import cut_shards
from mediator_cli.pipeline.cost import (
    STAGES,
    extract_passes,
    list_tasks,
    merge_passes,
    passed_over,
    source_bytes,
    survey_passes,
)
from mediator_cli.pipeline.settings import budget_of, dense_bytes, new_tensor
from mediator_cli.recipe.sizes import parse_size

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mediator_cli.pipeline.cost import Stage, Task
    from mediator_cli.pipeline.settings import Settings
    from mediator_cli.plan.model import Plan

Cache = Literal["warm", "cold"]
"""Whether the sources are in the computer's memory already, or have to come from the disk first."""
_NANO = 1e-9


@dataclass(frozen=True)
class Rate:
    """Nanoseconds of one core that a step takes while all cores work: for each element and for each tensor."""

    element: float
    tensor: float = 0.0


@dataclass(frozen=True)
class Constants:
    """What a machine was measured to take: `rates` by the key of a step, `start` seconds before and after all stages.

    `crowding`: how much more processor time the same work takes on all cores than on one. `busy`: the share of the
    time for which workers have something to do. `read` and `write`: bytes a second of the disks of sources and
    output. `room`: bytes of files that stay in memory.
    """

    rates: Mapping[str, Rate]
    start: float
    cores: int
    crowding: float
    busy: float
    read: float
    write: float
    room: float


@dataclass(frozen=True)
class Amounts:
    """What the rule routes: elements of each expert, and the bytes of all sparse experts."""

    routed: float
    sparse_bytes: float


@dataclass(frozen=True)
class Traffic:
    """Bytes that a stage reads, all passes together, and writes."""

    read: float = 0.0
    written: float = 0.0


@dataclass(frozen=True)
class Forecast:
    """Seconds by stage for sources in memory and for sources on the disk, and the bytes that each stage moves."""

    warm: Mapping[Stage, float]
    cold: Mapping[Stage, float]
    traffic: Mapping[Stage, Traffic] = field(default_factory=dict)

    def seconds(self, cache: Cache) -> float:
        """Add the stages up."""
        return sum((self.warm if cache == "warm" else self.cold).values())


def forecast(plan: Plan, run: Settings, constants: Constants, amounts: Amounts) -> Forecast:
    """Foretell a merge that routes so much; a pure function of its arguments."""
    workers = budget_of(plan, run).workers
    tasks, traffic = list_tasks(plan, amounts.routed), traffic_of(plan, amounts)
    # The last batch is still on its way to the disk when there is nothing left to compute.
    ends = {"start": constants.start, "merge": _last_batch_bytes(plan) / constants.write}
    loads = disk_loads(plan, traffic, constants.room)
    warm: dict[Stage, float] = {}
    cold: dict[Stage, float] = {}
    for stage in STAGES:
        busy = compute_seconds(tasks, stage, workers, constants)
        warm[stage] = max(busy, traffic[stage].written / constants.write) + ends.get(stage, 0.0)
        cold[stage] = max(warm[stage], loads[stage] / constants.read)
    return Forecast(warm, cold, traffic)


def compute_seconds(tasks: Sequence[Task], stage: Stage, workers: int, constants: Constants) -> float:
    """Add up what the processors do in a stage, and share it among the workers."""
    rates = constants.rates
    parts = (
        task.elements * rates[task.step.key].element + task.tensors * rates[task.step.key].tensor
        for task in tasks
        if task.stage == stage
    )
    return max(0.0, sum(parts)) * _NANO / speed(workers, constants)


def speed(workers: int, constants: Constants) -> float:
    """Tell how many cores' worth so many workers do, if a core's worth is what one does while all cores work.

    Between one worker and all cores, crowding and idle time grow evenly; no worker makes others slower than it helps.
    """
    return max(_speed(used, constants) for used in range(1, max(1, min(workers, constants.cores)) + 1))


def _speed(used: int, constants: Constants) -> float:
    share = (used - 1) / max(1, constants.cores - 1)
    cost = (1 + (constants.crowding - 1) * share) / constants.crowding
    return used * (1 - (1 - constants.busy) * share) / cost


def traffic_of(plan: Plan, amounts: Amounts) -> dict[Stage, Traffic]:
    """Count the bytes that each stage reads and writes; sparse experts are read once more for their digests."""
    once, written = sum(source_bytes(plan).values()), dense_bytes(plan) + amounts.sparse_bytes
    return {
        "start": Traffic(),
        "survey": Traffic(survey_passes(plan) * once),
        "merge": Traffic(merge_passes(plan) * once + extracted_bytes(plan, amounts), written),
        "digest": Traffic(passed_over(plan)),
        "publish": Traffic(amounts.sparse_bytes),
    }


def extracted_bytes(plan: Plan, amounts: Amounts) -> float:
    """Count the bytes read to extract sparse experts: those of each expert, and of the dense tensors with each."""
    sources, size = source_bytes(plan), max(1, sum(tensor.size for tensor in plan.tensors))
    each = sum(sources.values()) - sources["base"] + len(plan.experts) * dense_bytes(plan)
    return extract_passes(plan) * amounts.routed / size * each


def disk_loads(plan: Plan, traffic: Mapping[Stage, Traffic], room: float) -> dict[Stage, float]:
    """Count the bytes that come from the disk where nothing is in memory at first.

    Sources that fit into `room` bytes come once. Larger ones come in each pass over the model, and once for all passes
    over a batch.
    """
    once, survey = sum(source_bytes(plan).values()), traffic["survey"].read
    fits = once <= room
    loads: dict[Stage, float] = dict.fromkeys(STAGES, 0.0)
    loads["survey"] = min(survey, once) if fits else survey
    loads["merge"] = 0.0 if fits and survey else once
    return loads


def _last_batch_bytes(plan: Plan) -> int:
    files = plan_shards(
        [new_tensor(tensor) for tensor in plan.tensors], parse_size(plan.loaded.recipe.output.shard_size)
    )
    shards = cut_shards(files, {tensor.name: tensor for tensor in plan.tensors}, plan.n_inputs)
    return sum(new_tensor(tensor).n_bytes for tensor in shards[-1].batches[-1].tensors) if shards else 0
