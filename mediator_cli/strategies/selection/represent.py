"""One expert for each cluster: its medoid, its average, or one trained anew on the rows of all its tasks."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from mediator_cli.bundle.factors import FactorDelta
from mediator_cli.errors import CheckpointError, Problem
from mediator_cli.strategies.batches import answer_loss, make_batch, read_examples
from mediator_cli.strategies.library import summed
from mediator_cli.strategies.strategy import Fitted

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mediator_cli.strategies.batches import Example
    from mediator_cli.strategies.bench import Bench
    from mediator_cli.strategies.library import Change
    from mediator_cli.strategies.selection.groups import Floats

Representative = Literal["medoid", "average", "retrained"]
REPRESENTATIVES: tuple[Representative, ...] = ("medoid", "average", "retrained")
_BATCH = 8
_RATE = 1e-3
_WARM = 0.06


def medoid(names: Sequence[str], members: Sequence[str], alike: Floats) -> str:
    """Name the member that is most like all members together; of equal ones the first."""
    own = [names.index(name) for name in members]
    # Rounding must not decide between twins.
    sums = np.round(alike[np.ix_(own, own)].sum(axis=1), 9)
    return members[int(sums.argmax())]


def average(bench: Bench, members: Sequence[str]) -> Change:
    """Average what members change, without cross terms; the rank is the sum of their ranks."""
    return summed([(bench.library.experts[name], 1 / len(members)) for name in members])


def retrain(bench: Bench, members: Sequence[str], steps: int) -> tuple[Change, dict[str, Any]]:
    """Train one expert on the train rows of all members' tasks together; it and the loss at start and end.

    LoRA on every matrix that a member changes, of the largest rank that one has there: a drawn as in PEFT, b zero,
    scaling 1. AdamW at 0.001 with warm-up over 6 % and linear decay, 8 rows a step, tasks in turn. Deterministic.
    Raises CheckpointError where a task has no train rows.
    """
    rows = {task.name: task.train for task in bench.seen if task.expert in members}
    if lost := [name for name, own in rows.items() if not own] or ([] if rows else ["+".join(members)]):
        hint = "give train rows, or take the medoid or the average"
        raise CheckpointError(Problem(lost[0], "has no train rows to train a cluster's expert on", hint))
    change = _start(bench, members)
    examples = [read_examples(bench.model, bench.tokenizer, own) for own in rows.values()]
    losses = _train(bench, change, examples, steps)
    tenth = max(1, steps // 10)
    facts = {"steps": steps, "loss_first": float(np.mean(losses[:tenth])), "loss_last": float(np.mean(losses[-tenth:]))}
    return {name: FactorDelta(delta.a.detach(), delta.b.detach()) for name, delta in change.items()}, facts


def _start(bench: Bench, members: Sequence[str]) -> Change:
    generator = torch.Generator().manual_seed(bench.seed)
    found: Change = {}
    changes = [bench.library.experts[name] for name in members]
    for name in dict.fromkeys(name for change in changes for name in change):
        rows, columns = bench.library.shapes[name]
        rank = max(len(change[name].a) for change in changes if name in change)
        if rank:
            bound = 1 / math.sqrt(columns)
            a = (torch.rand(rank, columns, generator=generator) * 2 - 1) * bound
            found[name] = FactorDelta(a.requires_grad_(), torch.zeros(rows, rank).requires_grad_())
    if not found:
        raise CheckpointError(Problem("+".join(members), "change nothing", "leave them out of the library"))
    return found


def _train(bench: Bench, change: Change, examples: Sequence[Sequence[Example]], steps: int) -> list[float]:
    factors = [factor for delta in change.values() for factor in (delta.a, delta.b)]
    optimizer = torch.optim.AdamW(factors, lr=_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
    draw = np.random.default_rng(bench.seed)
    losses = []
    for step in range(steps):
        bench.progress("train a cluster's expert", step, steps)
        tasks = [examples[(step * _BATCH + at) % len(examples)] for at in range(_BATCH)]
        batch = make_batch([own[int(draw.integers(len(own)))] for own in tasks])
        # The factors change with every step, so the model has to stack them anew.
        with bench.answering(Fitted(experts={"own": change})) as model, model.mixing("own"):
            loss = answer_loss(model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


def _rate(step: int, steps: int) -> float:
    warm = max(1, round(_WARM * steps))
    return (step + 1) / warm if step < warm else (steps - step) / max(1, steps - warm)
