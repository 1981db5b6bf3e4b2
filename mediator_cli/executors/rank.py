"""Settings of a merge that this process shares with others."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from mediator_cli.executors.exchange import share_out
from mediator_cli.executors.place import PATIENCE
from mediator_cli.executors.ranks import Ranks

if TYPE_CHECKING:
    from mediator_cli.executors.place import Place
    from mediator_cli.pipeline.settings import Settings
    from mediator_cli.plan.model import Plan

_PULSE = 2.0


def share_merge(plan: Plan, run: Settings, place: Place, patience: float = PATIENCE) -> Settings:
    """Make this process one of those of a place: all call `merge` with the same plan and output on a shared folder.

    Process 0 writes the bundle's last files and renames it; the others return before that. `merge` raises OutputError
    when another process fails, or gives no sign of life for `patience` seconds.
    """
    owners = share_out({tensor.name: tensor.size for tensor in plan.tensors}, place.world)
    team = Ranks(place, owners, patience, min(_PULSE, patience / 5))

    def watched(stage: str, done: int, total: int) -> None:
        run.progress(stage, done, total)
        team.check()

    return replace(run, team=team, progress=watched)
