"""How a merge runs, and what follows from that for a plan: folder, threads, memory."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from mediator_cli.checkpoint.remote.ahead import KEPT_BYTES
from mediator_cli.checkpoint.remote.folder import remote_file
from mediator_cli.checkpoint.write import NewTensor
from mediator_cli.engine.matrices import whole_bytes
from mediator_cli.engine.streams import RUNTIME_BYTES, make_budget
from mediator_cli.engine.team import Alone
from mediator_cli.pipeline.progress import Progress, silent, unheard

if TYPE_CHECKING:
    from collections.abc import Callable

    from mediator_cli.engine.publish import Mode
    from mediator_cli.engine.streams import Budget
    from mediator_cli.engine.team import Team
    from mediator_cli.plan.model import Plan, TensorPlan

DEFAULT_MEMORY = 2 << 30


@dataclass(frozen=True)
class Settings:
    """How to run: what may stand at the output, memory in bytes, worker threads, where progress and notices go.

    `team` are the processes that share the work.
    """

    overwrite: bool = False
    memory: int = DEFAULT_MEMORY
    workers: int = os.cpu_count() or 1
    progress: Progress = silent
    slab: int | None = None
    notify: Callable[[str], None] = unheard
    resume: bool = False
    team: Team = field(default_factory=Alone)

    @property
    def mode(self) -> Mode:
        """What may stand at the output."""
        if self.resume:
            return "resume"
        return "overwrite" if self.overwrite else "new"


def output_folder(plan: Plan, output: Path | str | None) -> Path:
    """Choose the bundle's folder: the one given, the recipe's output.path, or one named after the recipe, here."""
    written = plan.loaded.recipe.output.path
    if output is not None:
        return Path(output).absolute()
    return plan.loaded.resolve(written) if written else Path.cwd() / plan.loaded.path.stem


def budget_of(plan: Plan, run: Settings) -> Budget:
    """Choose how much runs at a time, so that it fits in the memory that is given."""
    sources = [*plan.base.tensors.values(), *(info for expert in plan.experts for info in expert.infos)]
    is_far = any(remote_file(file) is not None for file in {info.file for info in sources})
    resident = RUNTIME_BYTES + (KEPT_BYTES if is_far else 0)
    whole = whole_bytes(plan.tensors, plan.n_inputs)
    budget = make_budget(plan.n_rows, run.workers, run.memory, resident, whole)
    return budget if run.slab is None else replace(budget, slab=run.slab)


def new_tensor(tensor: TensorPlan) -> NewTensor:
    """Say how a dense tensor will be written."""
    return NewTensor(tensor.name, tensor.dtype, tensor.shape)


def written_tensors(plan: Plan) -> tuple[NewTensor, ...]:
    """List all dense tensors that are written: those of the plan, then what an MoE makes beside them."""
    return (*map(new_tensor, plan.tensors), *(plan.moe.made if plan.moe else ()))


def dense_bytes(plan: Plan) -> int:
    """Count the bytes of the dense expert's tensors, or of the MoE's."""
    return sum(tensor.n_bytes for tensor in written_tensors(plan))


def row_bytes(plan: Plan) -> int:
    """Count the bytes that one element of all sources takes, for progress in bytes; most checkpoints are 16-bit."""
    return (plan.n_inputs + 1) * 2
