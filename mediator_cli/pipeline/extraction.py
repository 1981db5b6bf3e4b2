"""What an extraction is asked for, what it reports, and what its folder says of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from mediator_cli.bundle.adapter import AdapterManifest, ModuleRecord
from mediator_cli.pipeline.adapter_folder import card_head, finish_folder, peft_config, source_record, source_table
from mediator_cli.pipeline.carried import TIED, Choice, find_parts, is_tied, task_type

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from mediator_cli.bundle.record import SourceFile
    from mediator_cli.pipeline.carried import Saved
    from mediator_cli.plan.model import Plan

DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
"""The names of dtypes as an option has them, and as a file has them."""


@dataclass(frozen=True)
class Job:
    """What to extract: `rank` at most, 0 = no limit; the fewest directions that hold a share `energy` of a change."""

    base: str
    model: str
    rank: int = 16
    energy: float = 1.0
    choice: Choice = field(default_factory=Choice)
    save_modules: bool = False
    dtype: str = "float32"
    seed: int = 0


class MatrixReport(BaseModel):
    """One matrix of the adapter: its rank, the share of the change that it holds, the change's size in the base's."""

    model_config = ConfigDict(frozen=True)

    tensor: str
    shape: tuple[int, ...]
    rank: int
    energy: float
    size: float


class ChangeReport(BaseModel):
    """A changed tensor that factors cannot carry, and why; the change's size in the base's."""

    model_config = ConfigDict(frozen=True)

    tensor: str
    reason: str
    size: float


class ExtractionReport(BaseModel):
    """What an extraction found and wrote; `unchanged` and `left_out` count tensors."""

    model_config = ConfigDict(frozen=True)

    adapter: str
    bytes: int
    energy: float
    matrices: tuple[MatrixReport, ...]
    saved: tuple[ChangeReport, ...]
    not_carried: tuple[ChangeReport, ...]
    unchanged: int
    left_out: int
    notices: tuple[str, ...]


def finish_extraction(
    job: Job,
    plan: Plan,
    report: ExtractionReport,
    saved: Sequence[Saved],
    folder: Path,
    title: str,
    sources: Mapping[str, tuple[SourceFile, ...]],
) -> None:
    """Write config, card and manifest beside the factors."""
    finish_folder(
        folder, _config(job, plan, report, saved), _card(job, plan, title, report),
        _manifest(job, plan, report, saved, sources),
    )  # fmt: skip


def _config(job: Job, plan: Plan, report: ExtractionReport, saved: Sequence[Saved]) -> dict[str, Any]:
    ranks = {matrix.tensor.rpartition(".")[0]: matrix.rank for matrix in report.matrices}
    flipped = {part.is_flipped for part in find_parts(plan, job.choice) if part.kind == "linear"}
    return peft_config(
        ranks,
        job.base.split("@")[0],
        task_type(plan.base.config),
        plan.base.tensors,
        fan_in_fan_out=flipped == {True},
        bias="all" if any(each.name.endswith(".base_layer.bias") for each in saved) else "none",
        modules_to_save=sorted({each.module for each in saved if each.module}) or None,
        ensure_weight_tying=is_tied(plan) and any(change.reason == TIED for change in report.saved),
    )


def _manifest(
    job: Job,
    plan: Plan,
    report: ExtractionReport,
    saved: Sequence[Saved],
    sources: Mapping[str, tuple[SourceFile, ...]],
) -> AdapterManifest:
    expert, choice = plan.experts[0], job.choice
    modules = {m.tensor.rpartition(".")[0]: ModuleRecord(rank=m.rank, energy=m.energy) for m in report.matrices}
    return AdapterManifest(
        generator="",
        made_by="extract",
        recipe=None,
        settings={
            "rank": job.rank,
            "energy": job.energy,
            "embeddings": choice.embeddings,
            "include": list(choice.include),
            "exclude": list(choice.exclude),
            "save_modules": job.save_modules,
        },
        base=source_record("base", job.base, plan.base, sources),
        experts=(source_record(expert.name, job.model, expert.source, sources),),
        seed=job.seed,
        dtype=DTYPES[job.dtype],
        modules=modules,
        saved=tuple(dict.fromkeys(each.tensor for each in saved)),
        tensors={},
        files=(),
        digest="",
        notices=report.notices,
    )


def _card(job: Job, plan: Plan, title: str, report: ExtractionReport) -> str:
    rows = [("base", job.base, plan.base.path), ("model", job.model, plan.experts[0].source.path)]
    ranks = sorted({matrix.rank for matrix in report.matrices})
    rank = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    return "\n".join([
        *card_head(title, plan.base, job.base, "extracted"),
        f"A LoRA adapter, extracted with mediator from a fine-tune of its base: {len(report.matrices)} matrices, rank "
        f"{rank}, which hold {report.energy:.1%} of their changes (squared).",
        f"Changed and not held: {len(report.not_carried)} tensors. `adapter_manifest.json` tells of each matrix.",
        "",
        *source_table(rows),
    ]) + "\n"  # fmt: skip
