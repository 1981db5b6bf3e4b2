"""Learn gates by gradients, the experts frozen: AdamW with warm-up over shuffled rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import torch
from pydantic import Field

from mediator_cli.strategies.batches import answer_loss, batches

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from mediator_cli.strategies.batches import Batch, Example
    from mediator_cli.strategies.bench import Bench
    from mediator_cli.strategies.strategy import Fitted

Steps = Annotated[int, Field(ge=0, description="Steps of AdamW.")]
BatchRows = Annotated[int, Field(ge=1, description="Rows of one step.")]
Rate = Annotated[float, Field(gt=0, description="Learning rate after warm-up, which then falls to zero.")]
_WARM_UP = 0.1
_LONGEST_GRADIENT = 1.0


@dataclass(frozen=True)
class Schedule:
    """How long and how fast: `rows` are those of one step."""

    steps: int
    rows: int
    rate: float


def train(
    bench: Bench, fitted: Fitted, learned: Sequence[torch.Tensor], examples: Sequence[Example], schedule: Schedule
) -> Iterator[float]:
    """Learn tensors, which gates of `fitted` hold, in place; yields the loss of each step in nats for an answer.

    The same bits for the same bench, seed and number of threads.
    """
    optimizer = torch.optim.AdamW(learned, lr=schedule.rate, weight_decay=0.0)
    turns = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _share(step, schedule.steps))
    feed = _feed(examples, schedule.rows, bench.seed)
    with bench.answering(fitted) as model:
        for _ in range(schedule.steps):
            loss = answer_loss(model, next(feed))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(learned, _LONGEST_GRADIENT)
            optimizer.step()
            turns.step()
            yield float(loss.detach())


def _share(step: int, steps: int) -> float:
    """Give the learning rate's share: rises over the first tenth of the steps, then falls to zero."""
    warm = max(1, round(_WARM_UP * steps))
    return (step + 1) / warm if step < warm else (steps - step) / max(steps - warm, 1)


def _feed(examples: Sequence[Example], rows: int, seed: int) -> Iterator[Batch]:
    epoch = 0
    while True:
        yield from batches(examples, rows, seed * 1000 + epoch)
        epoch += 1
