"""For each task its own expert: what a router that is never wrong would choose."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mediator_cli.errors import CheckpointError, Problem
from mediator_cli.strategies.strategy import ByTask, Fitted, strategy

if TYPE_CHECKING:
    from mediator_cli.strategies.bench import Bench


@strategy(group="reference", reference="https://arxiv.org/abs/2603.03535", needs=("tasks",))
def oracle(bench: Bench) -> Fitted:
    """Let the expert of the task answer, told the task's name; of tasks that no expert was trained on, the base."""
    right = {task.name: {} if task.expert is None else {task.expert: 1.0} for task in bench.tasks}
    if lost := [name for own in right.values() for name in own if name not in bench.library.experts]:
        raise CheckpointError(Problem(lost[0], "is no expert of the library", "say which expert takes its place"))
    return Fitted(experts=bench.library.experts, decision=ByTask(right), facts={"right": right})
