"""How a Mixture of Experts is trained."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from mediator_cli.errors import MediatorError, Problem, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from mediator_cli.moe.train.select import What

LEARNING_RATES: Mapping[str, float] = {"gates": 1e-2, "projectors": 5e-4, "attention": 1e-4, "all": 2e-5}
"""Peak learning rates for what is trained; see README.md."""
WARM_UP, FLOOR = 0.06, 0.1
"""Share of the steps in which the learning rate rises, and share of its peak at which it ends."""


@dataclass(frozen=True)
class TrainSettings:
    """How a Mixture of Experts is trained.

    `what` is trained for `steps` steps of `batch` rows; rows longer than `length` tokens are left out. `learning_rate`
    None takes that of LEARNING_RATES. `loss_on`: tokens of the answer, or of prompt and answer. `load_balance` is the
    α of Switch's loss. `shares` say how often each task is drawn; evenly where empty. `held_out` rows of each task are
    kept from training to measure on, where none are given. `width` is how many tokens go through the model at once.
    `checkpointing` computes a layer's states again instead of keeping them: slower, in less memory. `save_seconds`
    is the least time between two saves of what a training goes on from.
    """

    what: What = "gates"
    steps: int = 300
    learning_rate: float | None = None
    batch: int = 8
    length: int = 1024
    loss_on: Literal["answer", "text"] = "answer"
    load_balance: float = 0.0
    shares: Mapping[str, float] = field(default_factory=dict)
    held_out: int = 32
    precision: Literal["bf16", "float32"] = "bf16"
    checkpointing: bool = False
    width: int = 384
    seed: int = 0
    save_seconds: float = 60.0

    @property
    def peak(self) -> float:
        """The highest learning rate."""
        return LEARNING_RATES[self.what] if self.learning_rate is None else self.learning_rate


def rate(step: int, steps: int) -> float:
    """Give the share of the peak learning rate at a step, from 0: a straight rise, then half a cosine.

    >>> [round(rate(step, 50), 2) for step in (0, 1, 2, 3, 26, 49)]
    [0.33, 0.67, 1.0, 1.0, 0.57, 0.1]
    """
    warm = max(1, round(WARM_UP * steps))
    if step < warm:
        return (step + 1) / warm
    return FLOOR + (1 - FLOOR) * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm))) / 2


def check_settings(settings: TrainSettings, tasks: Collection[str]) -> None:
    """Raise MediatorError with all that is wrong with settings; `tasks` are those that rows are given of."""
    problems = [
        Problem(name, f"is {getattr(settings, name)}", f"give {least} or more")
        for name, least in (("steps", 1), ("batch", 1), ("length", 2), ("width", 1), ("held_out", 0))
        if getattr(settings, name) < least
    ]
    if not (math.isfinite(settings.peak) and settings.peak > 0):
        problems.append(Problem("learning_rate", f"is {settings.peak}", "give a number above 0, such as 1e-3"))
    if not (math.isfinite(settings.load_balance) and settings.load_balance >= 0):
        problems.append(Problem("load_balance", f"is {settings.load_balance}", "give 0 or more, such as 0.01"))
    for task, share in settings.shares.items():
        if task not in tasks:
            problems.append(Problem("shares", f"no rows are given of '{task}'", did_you_mean(task, tasks)))
        elif not (math.isfinite(share) and share > 0):
            problems.append(Problem("shares", f"of '{task}' is {share}", "give a number above 0; 1 is usual"))
    if problems:
        raise MediatorError(problems)
