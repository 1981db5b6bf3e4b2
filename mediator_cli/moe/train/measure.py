"""How well held-out rows are predicted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from mediator_cli.moe.train.lines import groups
from mediator_cli.moe.train.trainer import Beat

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mediator_cli.moe.train.model import Student
    from mediator_cli.moe.train.rows import Example
    from mediator_cli.moe.train.settings import TrainSettings
    from mediator_cli.moe.train.trainer import Hear


@dataclass(frozen=True)
class Measured:
    """Rows of a task: mean cross-entropy of what is predicted, in nats a token, and the share of rows without a miss.

    A row is without a miss where each of its predicted tokens is the likeliest one behind the right ones before it.
    """

    rows: int
    loss: float
    exact: float


@torch.no_grad()
def measure(
    student: Student, tasks: Mapping[str, Sequence[Example]], settings: TrainSettings, stage: str, hear: Hear
) -> dict[str, Measured]:
    """Measure each task that has rows."""
    student.model.eval()
    passes = student.passes(student.model)
    parts = [(task, group) for task, rows in tasks.items() for group in groups(rows, settings.width, passes.tokens)]
    sums: dict[str, list[float]] = {task: [0.0, 0.0, 0.0] for task, rows in tasks.items() if rows}
    device, is_half = student.model.device.type, settings.precision == "bf16"
    for number, (task, group) in enumerate(parts, 1):
        with torch.autocast(device, torch.bfloat16, enabled=is_half):
            found = passes(group)
        losses = functional.cross_entropy(found.logits, found.targets, reduction="none")
        missed = (found.logits.argmax(dim=-1) != found.targets).double()
        misses = torch.zeros(len(group), dtype=torch.double, device=missed.device).index_add(0, found.owners, missed)
        new = (float(losses.double().sum()), float(len(losses)), float((misses == 0).sum()))
        sums[task] = [a + b for a, b in zip(sums[task], new, strict=True)]
        hear(Beat(stage, number, len(parts)))
    return {
        task: Measured(len(tasks[task]), loss / targets, exact / len(tasks[task]))
        for task, (loss, targets, exact) in sums.items()
    }
