"""What merging adapters into an adapter will read, write and hold in memory, from the plan alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

from mediator_cli.engine.streams import RUNTIME_BYTES
from mediator_cli.pipeline.adapters import module_bytes, most_bytes, pair_bytes, without_base, workers_for
from mediator_cli.pipeline.download import far_files_of, free_bytes
from mediator_cli.pipeline.estimate import MethodReport
from mediator_cli.pipeline.record import method_records
from mediator_cli.pipeline.settings import output_folder

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from mediator_cli.pipeline.settings import Settings
    from mediator_cli.plan.model import Plan


class AdapterPlanReport(BaseModel):
    """The plan in numbers; sizes in bytes. `ranks` are the least and the most of each adapter, `weights` likewise."""

    model_config = ConfigDict(frozen=True)

    output: str
    n_modules: int
    ranks: dict[str, tuple[int, int]]
    download_bytes: dict[str, int]
    read_bytes: int
    written_bytes: int
    dtype: str
    peak_memory: int
    workers: int
    free_disk: int
    methods: tuple[MethodReport, ...]
    weights: dict[str, tuple[float, float]]
    notices: tuple[str, ...]


def describe_adapter_plan(plan: Plan, output: Path | None, settings: Settings) -> AdapterPlanReport:
    """Put a plan with modules in numbers; reads nothing but free disk space. What is written is an upper bound."""
    target, workers = output_folder(plan, output), workers_for(plan, settings)
    names = [expert.name for expert in plan.experts]
    pairs = [[m.pairs[index] for m in plan.modules] for index in range(len(names))]
    far = far_files_of(without_base(plan))
    return AdapterPlanReport(
        output=str(target),
        n_modules=len(plan.modules),
        ranks={name: _ends(p.rank for p in own if p is not None) for name, own in zip(names, pairs, strict=True)},
        download_bytes={name: sum(file.n_bytes for file in files) for name, files in far.items()},
        read_bytes=sum(pair_bytes(module) for module in plan.modules),
        written_bytes=most_bytes(plan),
        dtype=plan.modules[0].dtype,
        peak_memory=RUNTIME_BYTES + workers * max(map(module_bytes, plan.modules)),
        workers=workers,
        free_disk=free_bytes(target),
        methods=tuple(MethodReport(**record.model_dump()) for record in method_records(plan)),
        weights={name: _ends(module.weights[index] for module in plan.modules) for index, name in enumerate(names)},
        notices=plan.notices,
    )


def _ends(values: Iterable[float]) -> tuple[float, float]:
    known = list(values)
    return (min(known), max(known)) if known else (0, 0)
